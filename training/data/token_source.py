"""Token files as a source: they are mapped where they lie, and scanned once to check and count their tokens."""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from training.config import TokensSource
from training.data.file_hashes import FileHashes
from training.data.find_files import name_of_path
from training.data.mapped_tokens import MappedTokens, map_files
from training.data.token_files import SUFFIXES, TokenFile, find_token_files, open_token_file
from training.data.tokenizer import Tokenizer
from training.data.tokenizer_config import NAME
from training.errors import UserError


class TokensReader:
    """The tokens of one source: those of its files, one after another in the order of their names."""

    def __init__(self, config: TokensSource):
        """Find the files and read their headers. Raises UserError if one is missing or no whole token file."""
        self.name = config.name or name_of_path(config.paths[0])
        self.patterns, self.end_of_text = config.paths, config.end_of_text
        paths, self.left_out = find_token_files(config.paths)
        self.files = [open_token_file(path, config.dtype) for path in paths]
        self.n_tokens = sum(file.n_tokens for file in self.files)
        self.mapped: MappedTokens | None = None

    def identity(self, hashes: FileHashes) -> Any:
        """Return JSON-able values that change whenever the tokens or their documents change; not with the paths."""
        files = [
            (file.dtype.str, file.offset, *(hashes.sha256(path) for path in (file.path, file.index) if path))
            for file in self.files
        ]
        return ["tokens", self.end_of_text, files]

    def map(self, sha256: list[str], hashes: FileHashes) -> MappedTokens:
        """Map all tokens, once. Raises UserError if a file is not the one with its SHA-256."""
        if self.mapped is None:
            self.mapped = map_files(self.files, sha256, hashes)
        return self.mapped

    def blocks(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (position, tokens) of the tokens [start, stop) in blocks. Raises UserError for a file cut short."""
        begin = 0
        for file in self.files:
            position = max(start, begin)
            for block in file.blocks(position - begin, min(stop - begin, file.n_tokens)):
                yield position, block
                position += len(block)
            begin += file.n_tokens

    def file_at(self, position: int) -> tuple[TokenFile, int]:
        """Return (file, number of the token in it) of a token of the source."""
        for file in self.files:
            if position < file.n_tokens:
                return file, position
            position -= file.n_tokens
        raise IndexError(position)

    def indexed_starts(self) -> np.ndarray:
        """Return where documents start by the indexes of Megatron-LM, int64 (n,); none without an index."""
        begins = np.cumsum([0, *(file.n_tokens for file in self.files)])
        return np.concatenate([begin + file.document_starts() for begin, file in zip(begins, self.files, strict=False)])

    def held_out_start(self, fraction: float, end_of_text: int) -> int:
        """Return the token from which on the source is held out: `fraction` before its end, or at the next document.

        The next document must start in the first half of that. Raises UserError for a single token.
        """
        if self.n_tokens < 2:
            raise UserError(f"{self.files[0].path}: a single token, so none can be held out; name data.val_sources")
        border = min(max(int(self.n_tokens * (1 - fraction)), 1), self.n_tokens - 1)
        middle = (border + self.n_tokens) // 2
        for position, block in self.blocks(border, middle):
            if len(found := np.flatnonzero(block == end_of_text)):
                return position + int(found[0])
        starts = self.indexed_starts()
        near = starts[(starts >= border) & (starts < middle)]
        return int(near[0]) if len(near) else border


class Block(NamedTuple):
    """What a scan notes of one block: the positions of end-of-text tokens, the bytes of text, and the tokens' own."""

    separators: np.ndarray
    n_bytes: int
    data: bytes


class Scan(NamedTuple):
    """The counts of a part of a source, as in `TextSize`, and the hash of its tokens as `StreamWriter` writes them."""

    n_documents: int
    n_tokens: int
    n_bytes: int
    sha256: str
    is_separated: bool  # by end-of-text tokens


def scan(
    reader: TokensReader,
    start: int,
    stop: int,
    tokenizer: Tokenizer,
    documents: BinaryIO,
    threads: int,
    on_read: Callable[[int], object],
) -> Scan:
    """Read the tokens [start, stop) of a source once and write where documents start, relative to `start`.

    A document starts with the end-of-text token; what is before the first is one, too, and an end-of-text token at the
    very end starts none. In tokens without any, Megatron-LM's index says where they start. Raises UserError for a token
    outside the vocabulary. `on_read` is called with the bytes of each block.
    """
    check_dtypes(reader, tokenizer)
    indexed = reader.indexed_starts()
    sha256, n_bytes, n_documents, n_separators = hashlib.sha256(), 0, 1, 0
    documents.write(np.zeros(1, "<u8").tobytes())
    blocks = reader.blocks(start, stop)
    with ThreadPoolExecutor(threads) as pool:  # NumPy's loops release the GIL
        jobs = (pool.submit(measure, reader, tokenizer, *block) for block in blocks)
        pending = deque(islice(jobs, threads + 2))
        while pending:
            block = pending.popleft().result()
            pending.extend(islice(jobs, 1))
            inside = block.separators[(block.separators > start) & (block.separators < stop - 1)]
            documents.write((inside - start).astype("<u8").tobytes())
            sha256.update(block.data)
            n_bytes += block.n_bytes
            n_documents += len(inside)
            n_separators += len(block.separators)
            on_read(len(block.data))
    if not (is_separated := n_separators > 0):
        inside = indexed[(indexed > start) & (indexed < stop)]
        documents.write((inside - start).astype("<u8").tobytes())
        n_documents += len(inside)
    return Scan(n_documents, stop - start, n_bytes, sha256.hexdigest(), is_separated)


def measure(reader: TokensReader, tokenizer: Tokenizer, position: int, tokens: np.ndarray) -> Block:
    """Measure the tokens of a source from `position` on. Raises UserError for one outside the vocabulary."""
    if tokens.max() >= tokenizer.vocab_size or tokens.min() < 0:
        index = int(np.flatnonzero((tokens >= tokenizer.vocab_size) | (tokens < 0))[0])
        file, number = reader.file_at(position + index)
        problem = f"token {number:,} of it is {tokens[index]}, and data.tokenizer has {tokenizer.vocab_size:,} tokens"
        remedy = "name the tokenizer that made the file" + ", and the file's dtype" * (file.index is None)
        raise UserError(f"{file.path}: {problem}; {remedy}")
    separators = position + np.flatnonzero(tokens == tokenizer.end_of_text)
    n_bytes = int(tokenizer.token_bytes.take(tokens).sum())
    return Block(separators, n_bytes, tokens.astype(tokenizer.dtype, copy=False).tobytes())


def check_dtypes(reader: TokensReader, tokenizer: Tokenizer) -> None:
    """Raise UserError if a file without header cannot hold the tokenizer's tokens, and no option says its type."""
    for file in reader.files:
        if not file.is_dtype_known and tokenizer.vocab_size > 2**16:
            problem = f"no header, and data.tokenizer has {tokenizer.vocab_size:,} tokens, more than uint16 holds"
            raise UserError(f"{file.path}: {problem}; set the source's dtype, such as uint32")


def with_end_of_text(tokenizer: Tokenizer, id_: int | None) -> Tokenizer:
    """Return the tokenizer with the end-of-text token that sources name; None: its own.

    Raises UserError if it is an ordinary token.
    """
    if id_ in (None, tokenizer.end_of_text):
        return tokenizer
    name, added = tokenizer.inner.id_to_token(id_), tokenizer.inner.get_added_tokens_decoder()
    if name is None or not (id_ in added or NAME.fullmatch(name)):
        problem = "is not in its vocabulary" if name is None else f"is the ordinary token {name!r}"
        own = f"{tokenizer.end_of_text} is {tokenizer.separator}"
        raise UserError(f"end_of_text: {id_} {problem}, and so cannot separate documents; data.tokenizer's own {own}")
    named = Tokenizer(tokenizer.inner, "data.tokenizer", name)
    named.chat_template, named.bos_token = tokenizer.chat_template, tokenizer.bos_token
    return named


def is_token_path(path: str) -> bool:
    """Return True if a path's name is that of a token file."""
    return Path(path).suffix.lower() in (*SUFFIXES, ".idx")
