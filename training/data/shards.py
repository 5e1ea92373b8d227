"""Tokens on disk: raw little-endian integers, memory-mapped, and the manifest with their hashes.

A dataset's folder holds `manifest.json`, `tokenizer/`, and for each stream of tokens `train-0.tokens` (uint16, or
uint32 above 65,536 tokens) and `train-0.documents` (uint64: the position at which each document starts). A document of
text starts with the end-of-text token, so that its first token of text is a target, too. A stream with rows whose
answers alone are learned also has `train-0.targets` (bool: which tokens are learned).
"""

import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError

from training.config import Section
from training.data.file_hashes import FileHashes
from training.data.mapped_tokens import MappedTokens
from training.data.tokenizer import Tokenizer, from_json
from training.data.tokenizer_config import END_OF_TEXT
from training.errors import UserError
from training.files import open_file, read_bytes

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
HASH_AT_START_BYTES = 2**28  # files up to this size are hashed at every start


class TextSize(Section):
    """How much text there is."""

    n_documents: int = Field(ge=0)
    n_tokens: int = Field(ge=0)
    n_bytes: int = Field(ge=0)
    token_bytes: int | None = Field(None, ge=0, description="bytes of the tokens, if normalization changed the text")


class PartRecord(TextSize):
    """The part of a stream that is from one source."""

    source: int = Field(ge=0, description="its number among the sources of training or of validation text")
    has_answers: bool = Field(False, description="of its rows only the answers are learned")


class StreamRecord(TextSize):
    """One stream in the manifest."""

    split: Literal["train", "val"]
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    targets_sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$", description="of its targets, if it has a file")
    n_targets: int | None = Field(None, ge=0, description="tokens that are learned, if not all are")
    parts: list[PartRecord] = Field([], description="by source, one after another; older manifests lack them")
    # Of tokens in the files of a source, and then there is one part.
    files: list[str] = Field([], description="SHA-256 of the source's files; none: the tokens are in this folder")
    start: int = Field(0, ge=0, description="the source's token that is the stream's first")
    is_separated: bool = Field(True, description="an end-of-text token is between its documents")


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
    n_not_utf8: int = Field(0, ge=0, description="files left out because they are not UTF-8 (encoding: skip)")
    as_text: dict[str, int] = Field({}, description="how often the name of a separator is ordinary text")
    unwritten: dict[str, int] = Field({}, description="what the chat template does not write, by its kind")
    val_splits: list[tuple[int, str]] = Field([], description="(source, split) of validation text that sources bring")
    n_shared: int = Field(0, ge=0, description="validation documents that are also in the training text")
    shared: list[tuple[int, int, int]] = Field([], description="the same by source: validation, training, documents")
    n_repeated: int = Field(0, ge=0, description="training documents that equal an earlier one")
    is_joined: bool = Field(False, description="the training streams are read as one, one after another")
    streams: list[StreamRecord]

    def of_split(self, name: str) -> list[StreamRecord]:
        """Return the streams of a split. Validation text has one, and one for each source of tokens."""
        return [record for record in self.streams if record.split == name]

    @property
    def train_tokens(self) -> list[int]:
        """The tokens of each training stream, as a run reads them."""
        n_tokens = [record.n_tokens for record in self.of_split("train")]
        return [sum(n_tokens)] if self.is_joined else n_tokens


@dataclass(frozen=True)
class Stream:
    """Documents one after another: `tokens` (n_tokens,) and the start of each in `documents` (n_documents,).

    `mapped` is the map of the tokens' file, which stays readable if the file is deleted; None: in memory, or the tokens
    check their own files.
    """

    path: Path
    tokens: np.ndarray | MappedTokens
    documents: np.ndarray
    n_bytes: int  # of the text
    token_bytes: int | None = None  # of the tokens, if they are not the text's; older datasets lack it
    mapped: mmap.mmap | None = None
    name: str = ""  # of its source, if it has only one
    targets: np.ndarray | None = None  # bool (n_tokens,): True for tokens that are learned; None: all are

    def window(self, start: int, stop: int) -> np.ndarray:
        """Return the tokens [start, stop) as a view of the file. Copy them at once.

        Raises UserError if the file has been truncated: reading past its end would kill the process (SIGBUS).
        """
        if self.mapped is not None and (size := self.mapped.size()) < len(self.mapped):
            raise _damaged(self.path, f"cut to {size} bytes while it was read")
        return self.tokens[start:stop]


@dataclass(frozen=True)
class Split:
    """Training or validation text; validation text has a stream for each source.

    `weights` are the streams' shares of the samples; None: in proportion to size.
    """

    name: str
    streams: tuple[Stream, ...]
    weights: tuple[float, ...] | None
    vocab_size: int

    @property
    def n_documents(self) -> int:
        return sum(len(stream.documents) for stream in self.streams)

    @property
    def n_tokens(self) -> int:
        return sum(len(stream.tokens) for stream in self.streams)

    @property
    def n_bytes(self) -> int:
        """Bytes of the text."""
        return sum(stream.n_bytes for stream in self.streams)


def read_manifest(folder: Path) -> Manifest:
    """Read a dataset's manifest. Raises UserError if it is damaged."""
    path = folder / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(read_bytes(path))
    except OSError as error:
        raise _damaged(path, error.strerror) from None
    except ValidationError as error:
        raise _damaged(path, error.errors()[0]["msg"]) from None


def check_sources(folder: Path, manifest: Manifest, n_train: int, n_val: int) -> None:
    """Raise UserError if a manifest's records by source do not add up, or name more sources than there are."""
    n_sources = {"train": n_train, "val": n_val}
    for record in manifest.streams:
        parts, last = record.parts, n_sources[record.split] - 1
        sums = [sum(getattr(part, name) for part in parts) for name in ("n_documents", "n_tokens", "n_bytes")]
        is_whole = not parts or sums == [record.n_documents, record.n_tokens, record.n_bytes]
        is_whole = is_whole and (not record.files or len(parts) == 1)
        if not is_whole or any(part.source > last for part in parts):
            raise _damaged(folder / MANIFEST_FILE, f"the parts of its {record.split} text do not fit the sources")
    if any(not (0 <= val < n_val and 0 <= train < n_train) for val, train, _ in manifest.shared):
        raise _damaged(folder / MANIFEST_FILE, "the sources of documents that are there twice are none of the sources")


def open_split(
    folder: Path, manifest: Manifest, name: str, hashes: FileHashes, weights: Sequence[float], readers: Sequence[Any]
) -> Split:
    """Map the streams of one split. Raises UserError if they are not the ones that were written.

    Tokens are hashed each time in files up to HASH_AT_START_BYTES, else only after a file's size or times have changed.
    `readers` are those of the split's sources, in whose files some tokens are.
    """
    streams = []
    for i, record in enumerate(manifest.of_split(name)):
        path = folder / f"{name}-{i}.tokens"
        documents, _ = _map_file(path.with_suffix(".documents"), "<u8", record.n_documents)
        if record.files:
            streams.append(_open_token_files(folder, record, documents, readers, hashes))
            continue
        tokens, mapped = _map_file(path, manifest.dtype, record.n_tokens)
        is_short = tokens.nbytes <= HASH_AT_START_BYTES
        sha256 = hashlib.sha256(tokens.data).hexdigest() if is_short else hashes.sha256(path)
        if sha256 != record.sha256:
            raise _damaged(path, "its SHA-256 is not the one in the manifest")
        if is_short and (largest := tokens.max(initial=0)) >= manifest.vocab_size:
            raise _damaged(path, f"token {largest} is not below the vocabulary's {manifest.vocab_size}")
        targets = open_targets(path.with_suffix(".targets"), record, hashes)
        streams.append(Stream(path, tokens, documents, record.n_bytes, record.token_bytes, mapped, targets=targets))
    if manifest.is_joined and name == "train":
        streams = [join_streams(streams)]
    return Split(name, tuple(streams), tuple(weights) or None, manifest.vocab_size)


def _open_token_files(
    folder: Path, record: StreamRecord, documents: np.ndarray, readers: Sequence[Any], hashes: FileHashes
) -> Stream:
    reader = readers[record.parts[0].source]
    stop = record.start + record.n_tokens
    if len(getattr(reader, "files", ())) != len(record.files) or stop > reader.n_tokens:
        raise _damaged(folder / MANIFEST_FILE, "its token files are not those of the sources")
    tokens = reader.map(record.files, hashes).between(record.start, stop)
    return Stream(reader.files[0].path, tokens, documents, record.n_bytes, name=reader.name)


def join_streams(streams: Sequence[Stream]) -> Stream:
    """Return streams one after another as one. `mapped` is that of the first, the only one whose file is ours."""
    tokens, documents, start = [], [], 0
    for stream in streams:
        tokens += stream.tokens.parts if isinstance(stream.tokens, MappedTokens) else [(stream.tokens, None)]
        documents.append(stream.documents + np.uint64(start))
        start += len(stream.tokens)
    n_bytes = sum(stream.n_bytes for stream in streams)
    return replace(
        streams[0], tokens=MappedTokens(tokens), documents=np.concatenate(documents), n_bytes=n_bytes, token_bytes=None
    )


def open_targets(path: Path, record: StreamRecord, hashes: FileHashes) -> np.ndarray | None:
    """Map which tokens of a stream are learned; None: all. Raises UserError for other bytes than were written."""
    if record.targets_sha256 is None:
        return None
    targets, _ = _map_file(path, "?", record.n_tokens)
    is_short = targets.nbytes <= HASH_AT_START_BYTES
    sha256 = hashlib.sha256(targets.data).hexdigest() if is_short else hashes.sha256(path)
    if sha256 != record.targets_sha256:
        raise _damaged(path, "its SHA-256 is not the one in the manifest")
    return targets


def split_by_source(stream: Stream, record: StreamRecord, names: Sequence[str]) -> Iterator[Stream]:
    """Yield the part of each source as a stream with its name; the whole without one if the record has no parts."""
    if not record.parts or record.files:
        yield stream
        return
    token = document = 0
    for part in record.parts:
        yield replace(
            stream,
            tokens=stream.tokens[token : (token_end := token + part.n_tokens)],
            documents=stream.documents[document : (document_end := document + part.n_documents)] - token,
            n_bytes=part.n_bytes,
            token_bytes=part.token_bytes,
            name=names[part.source],
            targets=stream.targets[token:token_end] if part.has_answers else None,
        )
        token, document = token_end, document_end


def streams_by_source(split: Split, manifest: Manifest, names: Sequence[str]) -> list[Stream]:
    """Return the streams of a split's sources in their order, each with its name; none of a source without text."""
    streams = []
    for stream, record in zip(split.streams, manifest.of_split(split.name), strict=True):
        if record.n_documents:
            sources = [part.source for part in record.parts] or [0]
            streams += zip(sources, split_by_source(stream, record, names), strict=True)
    return [stream for _, stream in sorted(streams, key=itemgetter(0))]


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
    tokenizer = from_json(path, manifest.separator)
    tokenizer.read_chat_files(path.parent)
    return tokenizer


def _damaged(path: Path, reason: str | None) -> UserError:
    folder = next(parent for parent in path.parents if parent.name != "tokenizer")
    return UserError(f"{path}: damaged ({reason}); delete {folder} and start again, which prepares the data")
