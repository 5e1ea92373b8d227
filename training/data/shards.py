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
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from training.config import Section
from training.data.file_hashes import FileHashes
from training.data.tokenizer import Tokenizer
from training.errors import UserError

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
HASH_AT_START_BYTES = 2**28  # files up to this size are hashed at every start


class StreamRecord(Section):
    """One stream in the manifest."""

    split: Literal["train", "val"]
    n_documents: int = Field(ge=0)
    n_tokens: int = Field(ge=0)
    n_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Section):
    """The content of a dataset's folder. `key` hashes the sources and the tokenizer's options."""

    format: Literal[1]
    key: str
    dtype: Literal["<u2", "<u4"]
    vocab_size: int = Field(ge=2)
    tokenizer_sha256: str
    n_blank: int = Field(ge=0, description="blank documents, which are left out")
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
    n_bytes: int


class StreamWriter:
    """Writes one stream from start to end."""

    def __init__(self, folder: Path, split: str, index: int, tokenizer: Tokenizer):
        self.split, self.tokenizer = split, tokenizer
        self.n_documents = self.n_tokens = self.n_bytes = 0
        self.sha256 = hashlib.sha256()
        self.tokens = (folder / f"{split}-{index}.tokens").open("wb")
        self.documents = (folder / f"{split}-{index}.documents").open("wb")

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(self, *_error: object) -> None:
        with self.tokens, self.documents:
            pass

    def start_document(self) -> None:
        """Record where a document starts, and write its end-of-text token."""
        self.documents.write(np.array([self.n_tokens], "<u8").tobytes())
        self.n_documents += 1
        self._write(np.array([self.tokenizer.end_of_text]))

    def add(self, ids: np.ndarray, n_bytes: int) -> None:
        """Write tokens of the current document, which encode `n_bytes` of text."""
        if (ids == self.tokenizer.end_of_text).any():
            raise UserError("data.tokenizer: it gave an end-of-text token for ordinary text, so it cannot be used")
        self._write(ids)
        self.n_bytes += n_bytes

    def _write(self, ids: np.ndarray) -> None:
        data = ids.astype(self.tokenizer.dtype).tobytes()
        self.tokens.write(data)
        self.sha256.update(data)
        self.n_tokens += len(ids)

    def finish(self) -> StreamRecord:
        """Flush the files and return the stream's record for the manifest."""
        self.tokens.flush()
        self.documents.flush()
        counts = {name: getattr(self, name) for name in ("n_documents", "n_tokens", "n_bytes")}
        return StreamRecord(split=self.split, sha256=self.sha256.hexdigest(), **counts)


def read_manifest(folder: Path) -> Manifest:
    """Read a dataset's manifest. Raises UserError if it is damaged."""
    path = folder / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise _damaged(path, error.strerror) from None
    except ValidationError as error:
        raise _damaged(path, error.errors()[0]["msg"]) from None


def open_split(folder: Path, manifest: Manifest, name: str, weights: Sequence[float] | None = None) -> Split:
    """Map the streams of one split. Raises UserError if a file is not as long as the manifest says."""
    records = [record for record in manifest.streams if record.split == name]
    streams = []
    for i, record in enumerate(records):
        path = folder / f"{name}-{i}.tokens"
        tokens, mapped = _map_file(path, manifest.dtype, record.n_tokens)
        documents, _ = _map_file(path.with_suffix(".documents"), "<u8", record.n_documents)
        streams.append(Stream(path, tokens, documents, mapped))
    counts = {
        count: sum(getattr(record, count) for record in records) for count in ("n_documents", "n_tokens", "n_bytes")
    }
    weights = tuple(weights) if weights else None
    return Split(name, tuple(streams), weights, manifest.vocab_size, **counts)


def check_hashes(split: Split, manifest: Manifest, hashes: FileHashes) -> None:
    """Raise UserError if the tokens are not the ones that were written.

    Files up to HASH_AT_START_BYTES are hashed each time, longer ones only after their size or times have changed.
    """
    records = (record for record in manifest.streams if record.split == split.name)
    for stream, record in zip(split.streams, records, strict=True):
        is_short = stream.tokens.nbytes <= HASH_AT_START_BYTES
        sha256 = hashlib.sha256(stream.tokens.data).hexdigest() if is_short else hashes.sha256(stream.path)
        if sha256 != record.sha256:
            raise _damaged(stream.path, "its SHA-256 is not the one in the manifest")
        if is_short and (largest := stream.tokens.max(initial=0)) >= split.vocab_size:
            raise _damaged(stream.path, f"token {largest} is not below the vocabulary's {split.vocab_size}")


def _map_file(path: Path, dtype: str, length: int) -> tuple[np.ndarray, mmap.mmap | None]:
    """Map a file as a read-only array. Not with np.memmap, whose slices cost several times as much."""
    expected = length * np.dtype(dtype).itemsize
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected:
                raise _damaged(path, f"{size} bytes long, not {expected}")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if length else None
        return np.empty(0, dtype) if mapped is None else np.frombuffer(mapped, dtype), mapped
    except OSError as error:
        raise _damaged(path, error.strerror) from None


def open_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """Load the dataset's tokenizer. Raises UserError if it is not the one that wrote the tokens."""
    path = folder / "tokenizer" / "tokenizer.json"
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise _damaged(path, error.strerror) from None
    if sha256 != manifest.tokenizer_sha256:
        raise _damaged(path, "not the file that was written")
    return Tokenizer.load(path.parent)


def _damaged(path: Path, reason: str | None) -> UserError:
    folder = next(parent for parent in path.parents if parent.name != "tokenizer")
    return UserError(f"{path}: damaged ({reason}); delete {folder} and start again to prepare the data anew")
