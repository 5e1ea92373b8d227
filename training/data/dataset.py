"""Prepare the data: use the cached dataset, or tokenize once.

The cache is a folder of datasets, each named by a hash of all that it depends on: the content of the sources, the split
and the tokenizer. A dataset is built under a `.partial` name, flushed to disk and renamed, under a lock that ends with
its process. A killed build leaves only its `.partial` folder, which the next build removes.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from training.config import DataConfig, FilesSource, RowsConfig, TokensSource
from training.data import shards
from training.data.build import count_threads, write_dataset, write_streams
from training.data.corpus import DUMP_SUFFIX, Corpus, split_documents
from training.data.file_hashes import FileHashes
from training.data.limits import Budget
from training.data.notes import (
    describe_blank,
    describe_dataset,
    describe_left_out,
    describe_repeated_files,
    describe_separators,
    describe_tokens,
    describe_unwritten,
)
from training.data.progress import show_progress
from training.data.shards import Manifest, Split, Stream
from training.data.sources import build_reader, drop_repeated_files
from training.data.stream_writer import StreamWriter
from training.data.token_source import TokensReader, is_token_path, scan
from training.data.tokenizer import Tokenizer
from training.errors import UserError
from training.files import rename_durable
from training.terminal import print_note

TEXT_ROWS = RowsConfig()  # rows with text in the column "text"


@dataclass(frozen=True)
class Dataset:
    """The data of a run. `fingerprint` hashes tokenizer and tokens, wherever they are from; `report` is for people."""

    tokenizer: Tokenizer
    train: Split
    val: Split
    fingerprint: str
    old_fingerprint: str  # of versions that also hashed the sources, and so their compression
    report: dict[str, Any]

    def is_same_as(self, fingerprint: str) -> bool:
        """Return True if a run that stored this fingerprint read the same tokens."""
        return fingerprint in (self.fingerprint, self.old_fingerprint)


def prepare(config: DataConfig, *, quiet: bool = False) -> Dataset:
    """Open the token shards in `cache_dir`; build them if they are not there. Many processes may call this at once.

    Raises UserError for text that cannot be read, a split without documents, or a disk that cannot be written.
    """
    start = time.perf_counter()
    corpus = Corpus(config)
    if not quiet:
        print_notes(describe_left_out(corpus.train_readers + corpus.val_readers))
    cache = Path(config.cache_dir)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        hashes = FileHashes(cache / "digests.json")
        with show_progress("hashing the sources", quiet, only_if_slow=True) as progress:
            hashes.on_read = progress.add
            folder = corpus.folder_in(cache, hashes)
            if not folder.exists():
                corpus.find_own_validation()
                folder = corpus.folder_in(cache, hashes)
        if not (is_cached := folder.exists()):
            with lock_dataset(folder, quiet):
                if not folder.exists():
                    build_dataset(corpus, folder, hashes, quiet)
        with show_progress("checking the cached tokens", quiet, only_if_slow=True) as progress:
            hashes.on_read = progress.add
            dataset = open_dataset(folder, corpus, hashes)
        hashes.save()
        with suppress(OSError):  # of another user
            os.utime(folder)  # when it was used last, for `training.runs`
    except OSError as error:  # from the cache's disk: readers of sources raise UserError
        raise UserError(f"{error.filename or cache}: cannot be written: {error.strerror or error}") from None
    dataset.report.update(is_cached=is_cached, seconds=time.perf_counter() - start)
    if not quiet:
        print_notes([*describe_repeated_files(corpus.repeated_files), *dataset.report["notes"]])
    return dataset


def lock_dataset(folder: Path, quiet: bool) -> AbstractContextManager:
    """Acquire the lock of one dataset. Leaving the context releases it; so does the end of the process."""
    lock = FileLock(f"{folder}.lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        if not quiet:
            print_note(f"{folder}: another process is preparing this data; waiting for it")
        return lock.acquire(poll_interval=0.1)


def build_dataset(corpus: Corpus, folder: Path, hashes: FileHashes, quiet: bool) -> None:
    """Write a dataset under a temporary name and rename it. The caller holds its lock."""
    for leftover in folder.parent.glob("*.partial"):  # of killed builds; the locks of others are held
        with suppress(Timeout), FileLock(leftover.with_suffix(".lock"), timeout=0):
            shutil.rmtree(leftover, ignore_errors=True)  # its owner may have renamed it since it was listed
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        key = folder.name.removesuffix(DUMP_SUFFIX)  # part of `old_fingerprint`, where older versions had no suffix
        write_dataset(corpus, partial, key, hashes, quiet)
        if corpus.cache_key(hashes) != folder.name:
            raise UserError(f"{folder}: the sources changed while they were read; start again")
        rename_durable(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def open_dataset(folder: Path, corpus: Corpus, hashes: FileHashes) -> Dataset:
    """Map a complete dataset, which was built from this corpus. Raises UserError if it is damaged."""
    manifest, names = shards.read_manifest(folder), {split: corpus.names(split) for split in ("train", "val")}
    shards.check_sources(folder, manifest, *map(len, names.values()))
    train = shards.open_split(folder, manifest, "train", hashes, corpus.weights, corpus.readers("train"))
    val = shards.open_split(folder, manifest, "val", hashes, (), corpus.readers("val"))
    val = replace(val, streams=tuple(shards.streams_by_source(val, manifest, names["val"])))
    tokenizer = shards.open_tokenizer(folder, manifest)
    new, old = fingerprints(manifest)
    notes = [*describe_dataset(folder, manifest, tokenizer, corpus), *describe_tokens(manifest, tokenizer, corpus)]
    report = {"folder": str(folder), "notes": notes}
    return Dataset(tokenizer, train, val, new, old, report)


def fingerprints(manifest: Manifest) -> tuple[str, str]:
    """Return the `fingerprint` and `old_fingerprint` of a dataset."""
    parts = [manifest.tokenizer_sha256, *(record.sha256 for record in manifest.streams)] + [
        "joined"
    ] * manifest.is_joined
    parts += [record.targets_sha256 for record in manifest.streams if record.targets_sha256 is not None]
    new, old = (hashlib.sha256(" ".join(each).encode()).hexdigest() for each in (parts, [manifest.key, *parts]))
    return new, old


def print_notes(lines: Iterable[str]) -> None:
    """Print lines about the text on stderr."""
    for line in lines:
        print_note(f"data: {line}", once=True)


def read_split(paths: Sequence[str], tokenizer: Tokenizer, columns: RowsConfig = TEXT_ROWS) -> Split:
    """Read files without a cache, as a stream for each path, and print notes. Text is tokenized in memory.

    Raises UserError for no text.
    """
    text_paths = [path for path in paths if not is_token_path(path)]
    if columns != TEXT_ROWS and not text_paths:
        raise UserError(f"{', '.join(paths)}: token files have no columns; leave the names of columns out")
    streams = read_texts(text_paths, tokenizer, columns) if text_paths else []
    streams += [read_tokens(path, tokenizer) for path in paths if is_token_path(path)]
    return Split("val", tuple(sorted(streams, key=lambda stream: paths.index(stream.name))), None, tokenizer.vocab_size)


def read_tokens(path: str, tokenizer: Tokenizer) -> Stream:
    """Map and check the token files at a path."""
    reader = TokensReader(TokensSource(paths=(path,)))
    hashes, starts = FileHashes(None), BytesIO()
    counts = scan(reader, 0, reader.n_tokens, tokenizer, starts, count_threads(None), lambda _: None)
    tokens = reader.map([hashes.sha256(file.path) for file in reader.files], hashes)
    print_notes(describe_left_out([reader]))
    return Stream(reader.files[0].path, tokens, np.frombuffer(starts.getbuffer(), "<u8"), counts.n_bytes, name=path)


def read_texts(paths: Sequence[str], tokenizer: Tokenizer, columns: RowsConfig) -> list[Stream]:
    """Tokenize files in memory as a stream for each path. Raises UserError for no text."""
    tokens, starts, targets = BytesIO(), BytesIO(), BytesIO() if columns.has_answers else None
    writer = StreamWriter(tokenizer, tokens, starts, targets)
    readers = [build_reader(FilesSource(paths=(path,), **columns.model_dump())) for path in paths]
    names = dict(zip(readers, paths, strict=True))
    print_notes([*describe_left_out(readers), *describe_repeated_files(drop_repeated_files(readers))])
    chunks = (
        split_documents(reader, i, 0, 1.0, tokenizer.separators, Budget(None, None)) for i, reader in enumerate(readers)
    )
    counts = write_streams(chain.from_iterable(chunks), tokenizer, {("val", 0): writer}, None, len)
    if not writer.n_documents:
        raise UserError(f"{', '.join(paths)}: no {'answer' if columns.has_answers else 'text'} in there")
    print_notes(
        [
            *describe_blank(counts.n_blank, columns.has_answers),
            *describe_unwritten(counts.unwritten),
            *describe_separators(counts.n_borders, counts.as_text, tokenizer),
        ]
    )
    arrays = np.frombuffer(tokens.getbuffer(), tokenizer.dtype), np.frombuffer(starts.getbuffer(), "<u8")
    record = writer.record("val")
    stream = Stream(Path(paths[0]), *arrays, record.n_bytes, record.token_bytes)
    if targets is not None:
        stream = replace(stream, targets=np.frombuffer(targets.getbuffer(), bool))
    return list(shards.split_by_source(stream, record, [names[reader] for reader in readers]))
