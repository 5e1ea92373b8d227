"""Documents in chunks: text of any length with bounded memory.

A document is a stream of chunks of about a million characters, cut where no token spans the cut: the
usual pre-tokenizers (GPT-2's and tiktoken's patterns) always begin a new word there, so the chunks'
tokens are the document's tokens. Where a text offers no such place, it is cut all the same.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

from training.errors import UserError

CHUNK_CHARS = 1 << 20  # characters
MAX_SEARCH_CHARS = 1 << 16  # characters in which a place to cut is looked for
CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")


class Document(NamedTuple):
    """One document: its text in chunks, to be read before the next document is asked for.

    `key` decides whether it is held out for validation; None: its first chunk, that is, its content.
    """

    chunks: Iterator[str]
    key: str | None = None


class Chunk(NamedTuple):
    """A chunk of a document on its way to a stream of tokens; `first`: the document begins with it."""

    text: str
    split: str
    stream: int
    first: bool


def document(text: str) -> Document:
    """A document whose text is in memory already."""
    return Document(cut(text[i : i + CHUNK_CHARS] for i in range(0, len(text), CHUNK_CHARS)))


def cut(blocks: Iterable[str]) -> Iterator[str]:
    """Join blocks of text and cut them into chunks; at least one, and the same however they came."""
    rest = ""
    for block in blocks:
        rest += block
        while len(rest) >= CHUNK_CHARS + MAX_SEARCH_CHARS:
            match = CUT.search(rest, CHUNK_CHARS, CHUNK_CHARS + MAX_SEARCH_CHARS)
            end = match.start() if match else CHUNK_CHARS
            yield rest[:end]
            rest = rest[end:]
    yield rest


def decode_utf8(file: BinaryIO, name: str) -> Iterator[str]:
    """The UTF-8 text of a file, in blocks. A byte order mark is dropped, line ends are kept as they are.

    Raises UserError with the byte's offset (counted from 0, after decompression) for a byte that is not
    UTF-8 and for a NUL byte, which no text file holds but most binary files and UTF-16 do.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_read = 0
    while True:
        start = n_read - len(decoder.getstate()[0])
        block = file.read(CHUNK_CHARS)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(f"{name}: byte {start + error.start} is not UTF-8 text ({error.reason})") from None
        if "\0" in text:
            offset = start + len(text[: text.index("\0")].encode())
            raise UserError(f"{name}: byte {offset} is NUL: this is not a UTF-8 text file")
        yield text.removeprefix("\ufeff") if n_read == 0 else text
        if not block:
            return
        n_read += len(block)
