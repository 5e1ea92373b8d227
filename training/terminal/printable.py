"""Text as a terminal may show it: control characters, bidi overrides and lone surrogates become visible escapes."""

import unicodedata

# Unicode categories: control characters, invisible format characters, lone surrogates, line and paragraph separators.
ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
JOINERS = "\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"  # Persian, Hindi and emoji are written with them
TEXT = "\n\t"  # the control characters that belong to a text of several lines


def printable(text: str, keep: str = "") -> str:
    r"""Return the text with `\x1b`, `\n` or `\u202e` in place of each character that a terminal obeys or hides.

    Characters in `keep` stay.
    """
    if text.isprintable():
        return text
    keep += JOINERS
    return "".join(c if c in keep or unicodedata.category(c) not in ESCAPED else _escape(c) for c in text)


def one_line(text: str, limit: int = 500) -> str:
    """Return a library's message as one line of `limit` characters at most, its line breaks and indents as blanks."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def valid_utf8(text: str) -> str:
    """Return text from a shell or a stream with U+FFFD for bytes that are not UTF-8 (`surrogateescape`)."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
