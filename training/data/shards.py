"""Tokens on disk: raw little-endian integers that are mapped, not read, and the manifest that vouches for them.

A dataset's folder holds `manifest.json`, `tokenizer/`, and for each stream of tokens `train-0.tokens` (uint16,
or uint32 above 65,536 tokens) and `train-0.documents` (uint64: where each document begins). Every document
begins with the end-of-text token, so that all of its text, first token included, has something before it.
"""

from __future__ import annotations

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
HASH_AT_START_BYTES = (
    2**28
)  # bytes of a file that are read at every start, to see that they are those that were written


class StreamRecord(Section):
    """What the manifest says of one stream."""

    split: Literal["train", "val"]
    n_documents: int = Field(ge=0)
    n_tokens: int = Field(ge=0)
    n_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(Section):
    """What a dataset's folder holds. `key` stands for the sources and the tokenizer as they were asked for."""

    format: Literal[1]
    key: str
    dtype: Literal["<u2", "<u4"]
    vocab_size: int = Field(ge=2)
    tokenizer_sha256: str
    n_blank: int = Field(ge=0, description="documents left out because they hold white space only")
    streams: list[StreamRecord]


@dataclass(frozen=True)
class Stream:
    """Documents in a row. `tokens` (n_tokens,) and `documents` (n_documents,) are mapped files.

    `mapped` is the tokens' file, where there is one: it is there as long as it is mapped, deleted or not.
    """

    path: Path
    tokens: np.ndarray
    documents: np.ndarray
    mapped: mmap.mmap | None = None

    def window(self, start: int, stop: int) -> np.ndarray:
        """Some of the tokens, to be read at once.

        Raises UserError where the file is shorter than it was: reading would end the process without a word.
        """
        if self.mapped is not None and (size := self.mapped.size()) < self.tokens.nbytes:
            raise _damaged(self.path, f"cut to {size} bytes while it was read")
        return self.tokens[start:stop]


@dataclass(frozen=True)
class Split:
    """Training or validation text; `weights`, where given, is each stream's share of the samples."""

    name: str
    streams: tuple[Stream, ...]
    weights: tuple[float, ...] | None
    vocab_size: int
    n_documents: int
    n_tokens: int
    n_bytes: int


class StreamWriter:
    """Writes one stream, front to back."""

    def __init__(self, folder: Path, split: str, index: int, tokenizer: Tokenizer):
        self.split, self.tokenizer = split, tokenizer
        self.n_documents = self.n_tokens = self.n_bytes = 0
        self.sha256 = hashlib.sha256()
        self.tokens = (folder / f"{split}-{index}.tokens").open("wb")
        self.documents = (folder / f"{split}-{index}.documents").open("wb")

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(self, *_error: object) -> None:
        with self.tokens, self.documents:
            pass

    def start_document(self) -> None:
        """Note where a document begins, and write its end-of-text token."""
        self.documents.write(np.array([self.n_tokens], "<u8").tobytes())
        self.n_documents += 1
        self._write(np.array([self.tokenizer.end_of_text]))

    def add(self, ids: np.ndarray, n_bytes: int) -> None:
        """Write tokens of the document, which stand for `n_bytes` of text."""
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
        """Hand the rest to the system and say what was written."""
        self.tokens.flush()
        self.documents.flush()
        return StreamRecord(
            split=self.split,
            n_documents=self.n_documents,
            n_tokens=self.n_tokens,
            n_bytes=self.n_bytes,
            sha256=self.sha256.hexdigest(),
        )


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder. Raises UserError where it is damaged."""
    path = folder / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise _damaged(path, error.strerror) from None
    except ValidationError as error:
        raise _damaged(path, error.errors()[0]["msg"]) from None


def open_split(folder: Path, manifest: Manifest, name: str, weights: Sequence[float] | None = None) -> Split:
    """Map the streams of one split. Raises UserError where a file is not as long as the manifest says."""
    records = [record for record in manifest.streams if record.split == name]
    streams = []
    for i, record in enumerate(records):
        path = folder / f"{name}-{i}.tokens"
        tokens, mapped = _mapped(path, manifest.dtype, record.n_tokens)
        documents, _ = _mapped(path.with_suffix(".documents"), "<u8", record.n_documents)
        streams.append(Stream(path, tokens, documents, mapped))
    return Split(
        name=name,
        streams=tuple(streams),
        weights=tuple(weights) if weights else None,
        vocab_size=manifest.vocab_size,
        n_documents=sum(record.n_documents for record in records),
        n_tokens=sum(record.n_tokens for record in records),
        n_bytes=sum(record.n_bytes for record in records),
    )


def check_hashes(split: Split, manifest: Manifest, hashes: FileHashes) -> None:
    """Raise UserError where the tokens are not those that were written.

    A file of up to `HASH_AT_START_BYTES` bytes is read; a longer one only where its size or times changed.
    """
    records = (record for record in manifest.streams if record.split == split.name)
    for stream, record in zip(split.streams, records, strict=True):
        read = stream.tokens.nbytes <= HASH_AT_START_BYTES
        digest = hashlib.sha256(stream.tokens.data).hexdigest() if read else hashes.sha256(stream.path)
        if digest != record.sha256:
            raise _damaged(stream.path, "its SHA-256 is not the one in the manifest")
        if read and (largest := stream.tokens.max(initial=0)) >= split.vocab_size:
            raise _damaged(stream.path, f"token {largest} is not below the vocabulary's {split.vocab_size}")


def _mapped(path: Path, dtype: str, length: int) -> tuple[np.ndarray, mmap.mmap | None]:
    """A file as a read-only array and as what is mapped. Not np.memmap, whose slices cost several times as much."""
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
    """The dataset's tokenizer. Raises UserError where it is not the one that wrote the tokens."""
    path = folder / "tokenizer" / "tokenizer.json"
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise _damaged(path, error.strerror) from None
    if digest != manifest.tokenizer_sha256:
        raise _damaged(path, "not the file that was written")
    return Tokenizer.load(path.parent)


def _damaged(path: Path, reason: str | None) -> UserError:
    folder = next(parent for parent in path.parents if parent.name != "tokenizer")
    return UserError(f"{path}: damaged ({reason}); delete {folder} and start again to prepare the data anew")
