"""Documents as streams of text chunks, so that text of any length needs bounded memory.

A chunk has about a million characters. It ends where the usual pre-tokenizers (GPT-2's and tiktoken's patterns) always
start a new word. No token spans such a cut, so the chunks' tokens are the document's tokens. If no word starts within
the next MAX_SEARCH_CHARS, the text is cut at CHUNK_CHARS, possibly inside a token.

A dump, as nanoGPT's or TinyStories', is a .txt file of many documents with `<|endoftext|>` between them. There the
separator is a border between documents. In other text (.md, .py, rows) it is ordinary characters. A source's `split_on`
replaces both rules.
"""

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import Any, BinaryIO, NamedTuple

from training.errors import UserError


class NotUTF8Error(UserError):
    """Bytes that are not UTF-8 text."""


ENCODING_ADVICE = "set encoding of the source to the right one, such as cp1252, or to skip to leave such files out"
UTF16_ADVICE = "if it is UTF-16, set encoding of the source to utf-16; else leave the file out"
UTF16_STARTS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

CHUNK_CHARS = 1 << 20
MAX_SEARCH_CHARS = 1 << 16  # how far past CHUNK_CHARS to look for a place to cut
MAX_BLANK_BYTES = 1 << 26  # of white space at the head of a file, which is kept in memory until text follows
WORD_START = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")


class Document(NamedTuple):
    """One document. Read its chunks before asking for the next document."""

    chunks: Iterator[str]
    key: str | None = None  # decides whether the document is held out for validation; None: its first chunk does
    is_dump: bool = False  # the tokenizer's separators in the text are borders between documents
    split_on: str | None = None  # another text that is a border, instead of them
    dialogue: Any = None  # a `training.data.dialogues.Dialogue`, of which only the answers are learned


class Chunk(NamedTuple):
    """A chunk of a document and the token stream that it goes to."""

    text: str
    split: str  # "train" or "val"
    source: int  # its number among the readers of its text
    stream: int
    starts_document: bool
    follows_border: bool = False  # the document begins after a separator in the text
    is_blank_document: bool = False  # the whole document is empty or white space, or has no answer
    dialogue: Any = None  # as in `Document`

    @property
    def is_dialogue(self) -> bool:
        """True for a dialogue with something to learn; a blank one is counted and left out, as blank text is."""
        return self.dialogue is not None and not self.is_blank_document


def to_document(text: str) -> Document:
    """Return a document whose text is in memory."""
    return Document(split_into_chunks(text[i : i + CHUNK_CHARS] for i in range(0, len(text), CHUNK_CHARS)))


def look_ahead(chunks: Iterator[str]) -> tuple[bool, Iterator[str]]:
    """Return (True if all chunks are blank, the chunks). Reads up to the first chunk with text."""
    head = []
    for chunk in chunks:
        head.append(chunk)
        if chunk.strip():
            return False, chain(head, chunks)
    return True, iter(head)


def split_into_chunks(blocks: Iterable[str]) -> Iterator[str]:
    """Cut text that comes in blocks of any size into chunks; yield at least one."""
    rest = ""
    for block in blocks:
        rest += block
        while len(rest) >= CHUNK_CHARS + MAX_SEARCH_CHARS:
            match = WORD_START.search(rest, CHUNK_CHARS, CHUNK_CHARS + MAX_SEARCH_CHARS)
            end = match.start() if match else CHUNK_CHARS
            yield rest[:end]
            rest = rest[end:]
    yield rest


def number_parts(document: Document, separators: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Yield (number of separators before the text, text), at least once. Only a dump has `separators`."""
    separators = [document.split_on] if document.split_on else separators
    if not document.is_dump and not document.split_on:
        yield from ((0, chunk) for chunk in document.chunks)
        return
    border, number = re.compile("|".join(map(re.escape, separators))), 0
    for chunk in join_cut_separators(document.chunks, border, max(map(len, separators))):
        for i, text in enumerate(border.split(chunk)):
            number += i > 0
            yield number, text


def mark_blank(parts: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str, bool, bool]]:
    """Yield (number, text, True if it starts the document, True if the document is blank), a blank one in one text."""
    for number, group in groupby(parts, key=itemgetter(0)):
        is_blank, texts = look_ahead(text for _, text in group)
        for i, text in enumerate(["".join(texts)] if is_blank else texts):
            yield number, text, i == 0, is_blank


def join_cut_separators(chunks: Iterable[str], border: re.Pattern[str], longest: int) -> Iterator[str]:
    """Join two chunks if the cut between them went through a separator, as it may in text without spaces."""
    chunks = iter(chunks)
    previous = next(chunks)
    for chunk in chunks:
        tail = previous[max(0, len(previous) + 1 - longest) :]
        if any(match.start() < len(tail) < match.end() for match in border.finditer(tail + chunk[: longest - 1])):
            previous += chunk
        else:
            yield previous
            previous = chunk
    yield previous


def decode_utf8(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield a file's text in blocks, without its byte order mark and with its line ends as they are.

    Raises UserError with the byte's offset (from 0, after decompression) for a byte that is not UTF-8 and for a
    NUL byte, which most binary files and UTF-16 contain and no text file does; and for a head of MAX_BLANK_BYTES of
    white space.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_read, is_blank = 0, True
    while True:
        start = n_read - len(decoder.getstate()[0])
        block = file.read(CHUNK_CHARS)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            problem = f"byte {start + error.start} is not UTF-8 text ({error.reason})"
            advice = UTF16_ADVICE if n_read == 0 and block.startswith(UTF16_STARTS) else ENCODING_ADVICE
            raise NotUTF8Error(f"{name}: {problem}; {advice}") from None
        if "\0" in text:
            offset = start + len(text[: text.index("\0")].encode())
            raise NotUTF8Error(f"{name}: byte {offset} is NUL: this is not a UTF-8 text file; {UTF16_ADVICE}")
        if n_read == 0:
            text = text.removeprefix("\ufeff")
        is_blank = is_blank and not text.strip()
        if is_blank and n_read > MAX_BLANK_BYTES:
            raise UserError(f"{name}: begins with {MAX_BLANK_BYTES >> 20} MiB of white space; remove it")
        yield text
        if not block:
            return
        n_read += len(block)
