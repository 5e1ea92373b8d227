"""Tokens on disk: raw little-endian integers, memory-mapped, and the manifest with their hashes.

A dataset's folder holds `manifest.json`, `tokenizer/`, and for each stream of tokens `train-0.tokens` (uint16, or
uint32 above 65,536 tokens) and `train-0.documents` (uint64: the position at which each document starts). Every
document starts with the end-of-text token, so that its first token of text is a target, too.
"""

import hashlib
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from pydantic import Field, ValidationError

from training.config import Section
from training.data.chunks import Chunk
from training.data.file_hashes import FileHashes
from training.data.tokenizer import END_OF_TEXT, Tokenizer, from_json
from training.errors import UserError
from training.files import open_file, read_bytes

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
HASH_AT_START_BYTES = 2**28  # files up to this size are hashed at every start
COUNTS = ("n_documents", "n_tokens", "n_bytes")


class StreamRecord(Section):
    """One stream in the manifest."""

    split: Literal["train", "val"]
    n_documents: int = Field(ge=0)
    n_tokens: int = Field(ge=0)
    n_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    token_bytes: int | None = Field(None, ge=0, description="bytes of the tokens, if normalization changed the text")


class Manifest(Section):
    """The content of a dataset's folder. `key` hashes the sources and the tokenizer's options."""

    format: Literal[1]
    key: str
    dtype: Literal["<u2", "<u4"]
    vocab_size: int = Field(ge=2)
    tokenizer_sha256: str
    separator: str = Field(END_OF_TEXT, description="the end-of-text token")
    n_blank: int = Field(ge=0, description="blank documents, which are left out")
    # Older manifests lack these.
    n_borders: int = Field(0, ge=0, description="separators in dumps, which are borders between documents")
    as_text: dict[str, int] = Field({}, description="how often the name of a separator is ordinary text")
    n_shared: int = Field(0, ge=0, description="validation documents that are also in the training text")
    n_repeated: int = Field(0, ge=0, description="training documents that equal an earlier one")
    streams: list[StreamRecord]


@dataclass(frozen=True)
class Stream:
    """Documents one after another: `tokens` (n_tokens,) and the start of each in `documents` (n_documents,).

    `mapped` is the map of the tokens' file, which stays readable if the file is deleted; None: in memory.
    """

    path: Path
    tokens: np.ndarray
    documents: np.ndarray
    mapped: mmap.mmap | None = None

    def window(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens [start, stop) as a view of the file. Copy them at once.

        Raises UserError if the file has been truncated: reading past its end would kill the process (SIGBUS).
        """
        if self.mapped is not None and (size := self.mapped.size()) < self.tokens.nbytes:
            raise _damaged(self.path, f"cut to {size} bytes while it was read")
        return self.tokens[start:stop]


@dataclass(frozen=True)
class Split:
    """Training or validation text. `weights` are the streams' shares of the samples; None: in proportion to size."""

    name: str
    streams: tuple[Stream, ...]
    weights: tuple[float, ...] | None
    vocab_size: int
    n_documents: int
    n_tokens: int
    n_bytes: int  # of the text
    token_bytes: int | None = None  # of the tokens, if they are not the text's; older datasets lack it


class StreamWriter:
    """Writes the documents of one stream to two binary files: tokens, and where each document starts."""

    def __init__(self, tokens: BinaryIO, documents: BinaryIO, tokenizer: Tokenizer):
        self.tokens, self.documents, self.tokenizer = tokens, documents, tokenizer
        self.n_documents = self.n_tokens = self.n_bytes = 0
        self.token_bytes = None if tokenizer.normalization is None else 0
        self.sha256, self.document = hashlib.sha256(), hashlib.blake2b(digest_size=8)
        self.earlier_documents = bytearray()  # 8 bytes for each

    def add(self, chunk: Chunk, ids: np.ndarray) -> None:
        """Write the tokens of a chunk. An end-of-text token comes before each document."""
        if (ids == self.tokenizer.end_of_text).any():
            raise UserError("data.tokenizer: it gave an end-of-text token for ordinary text, so it cannot be used")
        if self.token_bytes is not None:
            self.token_bytes += int(self.tokenizer.token_bytes[ids].sum())
        if chunk.starts_document:
            self.documents.write(np.array([self.n_tokens], "<u8").tobytes())
            if self.n_documents:
                self.earlier_documents += self.document.digest()
            self.document = hashlib.blake2b(digest_size=8)
            self.n_documents += 1
            ids = np.append(self.tokenizer.end_of_text, ids)
        data = ids.astype(self.tokenizer.dtype).tobytes()
        self.tokens.write(data)
        self.sha256.update(data)
        self.document.update(data)
        self.n_tokens += len(ids)
        self.n_bytes += len(chunk.text.encode())

    def document_hashes(self) -> np.ndarray:
        """Return a hash of each document, uint64 (n_documents,)."""
        return np.frombuffer(self.earlier_documents + self.document.digest(), np.uint64)[: self.n_documents]

    def record(self, split: str) -> StreamRecord:
        """Return the stream's record for the manifest."""
        counts = {name: getattr(self, name) for name in COUNTS}
        return StreamRecord(split=split, sha256=self.sha256.hexdigest(), token_bytes=self.token_bytes, **counts)


def read_manifest(folder: Path) -> Manifest:
    """Read a dataset's manifest. Raises UserError if it is damaged."""
    path = folder / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(read_bytes(path))
    except OSError as error:
        raise _damaged(path, error.strerror) from None
    except ValidationError as error:
        raise _damaged(path, error.errors()[0]["msg"]) from None


def open_split(folder: Path, manifest: Manifest, name: str, hashes: FileHashes, weights: Sequence[float] = ()) -> Split:
    """Map the streams of one split. Raises UserError if they are not the ones that were written.

    Tokens are hashed each time in files up to HASH_AT_START_BYTES, else only after a file's size or times have changed.
    """
    records = [record for record in manifest.streams if record.split == name]
    streams = []
    for i, record in enumerate(records):
        path = folder / f"{name}-{i}.tokens"
        tokens, mapped = _map_file(path, manifest.dtype, record.n_tokens)
        documents, _ = _map_file(path.with_suffix(".documents"), "<u8", record.n_documents)
        is_short = tokens.nbytes <= HASH_AT_START_BYTES
        sha256 = hashlib.sha256(tokens.data).hexdigest() if is_short else hashes.sha256(path)
        if sha256 != record.sha256:
            raise _damaged(path, "its SHA-256 is not the one in the manifest")
        if is_short and (largest := tokens.max(initial=0)) >= manifest.vocab_size:
            raise _damaged(path, f"token {largest} is not below the vocabulary's {manifest.vocab_size}")
        streams.append(Stream(path, tokens, documents, mapped))
    counts = {count: sum(getattr(record, count) for record in records) for count in COUNTS}
    token_bytes = None if None in (sizes := [record.token_bytes for record in records]) else sum(sizes)
    return Split(name, tuple(streams), tuple(weights) or None, manifest.vocab_size, token_bytes=token_bytes, **counts)


def _map_file(path: Path, dtype: str, length: int) -> tuple[np.ndarray, mmap.mmap | None]:
    """Map a file as a read-only array. Not with np.memmap, whose slices cost several times as much."""
    expected = length * np.dtype(dtype).itemsize
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected:
                raise _damaged(path, f"{size} bytes long, not {expected}")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if length else None
        return np.frombuffer(mapped or b"", dtype), mapped
    except OSError as error:
        raise _damaged(path, error.strerror) from None


def open_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """Load the dataset's tokenizer. Raises UserError if it is not the one that wrote the tokens."""
    path = folder / "tokenizer" / "tokenizer.json"
    try:
        sha256 = hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError as error:
        raise _damaged(path, error.strerror) from None
    if sha256 != manifest.tokenizer_sha256:
        raise _damaged(path, "not the file that was written")
    return from_json(path, manifest.separator)


def _damaged(path: Path, reason: str | None) -> UserError:
    folder = next(parent for parent in path.parents if parent.name != "tokenizer")
    return UserError(f"{path}: damaged ({reason}); delete {folder} and start again, which prepares the data")
