"""Prepare the data: found in the cache at once, or else tokenized once, whole or not at all.

The cache is a folder of datasets, each named by what it depends on: the content of the sources, the split and
the tokenizer. One is built under a `.partial` name, made durable and renamed, under a lock that ends with its
process: a build that was killed leaves nothing that counts, and whoever builds next removes it.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from training.config import DataConfig
from training.data import shards, tokenizer_choice
from training.data.chunks import Chunk
from training.data.corpus import Corpus
from training.data.file_hashes import FileHashes
from training.data.progress import progress
from training.data.shards import Manifest, Split, StreamRecord, StreamWriter
from training.data.sources import no_text_error
from training.data.tokenizer import Tokenizer
from training.data.workers import encode_chunks
from training.errors import UserError
from training.files import fsync_path


@dataclass(frozen=True)
class Dataset:
    """What a run reads. `fingerprint` is over sources, tokenizer and tokens; `report` is for people."""

    tokenizer: Tokenizer
    train: Split
    val: Split
    fingerprint: str
    report: dict[str, Any]


def prepare(config: DataConfig, *, quiet: bool = False) -> Dataset:
    """Build the token shards, or find them in `cache_dir`. Safe to call from many processes at once.

    Raises UserError for text that cannot be read, a split without documents, or a disk that cannot be written.
    """
    start = time.perf_counter()
    corpus = Corpus(config)
    cache = Path(config.cache_dir).expanduser()
    with writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        hashes = FileHashes(cache / "digests.json")
        folder = cache / corpus.cache_key(hashes)
        found = folder.exists()
        if not found:
            with lock_dataset(folder, quiet):
                if not folder.exists():
                    remove_leftovers(cache)
                    build_dataset(corpus, folder, hashes, quiet)
        dataset = open_dataset(folder, corpus.weights, hashes, found, start)
        hashes.save()
    return dataset


@contextmanager
def writing(cache: Path) -> Iterator[None]:
    """What the cache's disk refuses becomes a UserError (the sources' errors are UserErrors already)."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or cache}: cannot be written: {error.strerror or error}") from None


@contextmanager
def lock_dataset(folder: Path, quiet: bool) -> Iterator[None]:
    """Hold the lock of one dataset; the system releases it when the process ends, however it ends."""
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not quiet:
            print(f"{folder}: another process is preparing this data; waiting for it", file=sys.stderr, flush=True)
        lock.acquire(poll_interval=0.1)
    try:
        yield
    finally:
        lock.release()


def remove_leftovers(cache: Path) -> None:
    """Remove what builds that were killed have left behind, but nothing that is being built."""
    for partial in cache.glob("*.partial"):
        lock = FileLock(partial.with_suffix(".lock"), is_singleton=False)
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(partial)
        except Timeout:
            continue


def build_dataset(corpus: Corpus, folder: Path, hashes: FileHashes, quiet: bool) -> None:
    """Write a dataset beside its place and move it there. The caller holds its lock."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_dataset(corpus, partial, folder.name, quiet)
        if corpus.cache_key(hashes) != folder.name:
            raise UserError(f"{folder}: the sources changed while they were read; start again")
        partial.rename(folder)
        fsync_path(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_dataset(corpus: Corpus, folder: Path, key: str, quiet: bool) -> None:
    """Make the tokenizer, write the streams, and last the manifest, each durably."""
    with progress("making the tokenizer", quiet=quiet) as advance:
        tokenizer = tokenizer_choice.build_tokenizer(
            corpus.config.tokenizer, count_bytes(corpus.training_text(), advance)
        )
    tokenizer.save(folder / "tokenizer")
    streams = [("train", i) for i in range(corpus.n_streams)] + [("val", 0)]
    with ExitStack() as stack, progress("tokenizing", quiet=quiet) as advance:
        writers = {stream: stack.enter_context(StreamWriter(folder, *stream, tokenizer)) for stream in streams}
        n_blank = write_streams(corpus, folder / "tokenizer", writers, advance)
        records = [writer.finish() for writer in writers.values()]
    check_splits(corpus, records)
    manifest = Manifest(
        format=shards.FORMAT_VERSION,
        key=key,
        dtype=tokenizer.dtype.str,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=hashlib.sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest(),
        n_blank=n_blank,
        streams=records,
    )
    (folder / shards.MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n")
    for path in [*folder.rglob("*"), folder]:
        fsync_path(path)


def count_bytes(texts: Iterable[str], advance: Callable[[int], object]) -> Iterator[str]:
    """The texts, each reported as it goes by."""
    for text in texts:
        advance(len(text.encode()))
        yield text


def write_streams(
    corpus: Corpus, tokenizer: Path, writers: dict[tuple[str, int], StreamWriter], advance: Callable[[int], object]
) -> int:
    """Tokenize everything; returns how many documents were left out for being blank."""
    n_blank = 0

    def present() -> Iterator[Chunk]:
        nonlocal n_blank
        for chunk in chain.from_iterable(corpus.chunks()):
            if chunk.first and not chunk.text.strip():
                n_blank += 1
            else:
                yield chunk

    for chunk, ids in encode_chunks(present(), tokenizer, corpus.config.workers):
        writer = writers[chunk.split, chunk.stream]
        if chunk.first:
            writer.start_document()
        n_bytes = len(chunk.text.encode())
        writer.add(ids, n_bytes)
        advance(n_bytes)
    return n_blank


def check_splits(corpus: Corpus, records: Sequence[StreamRecord]) -> None:
    """Raise UserError, which says what to do, where there is nothing to train on or nothing to validate on."""
    *train, val = (record.n_documents for record in records)
    config, n_documents = corpus.config, sum(train) + val
    share = f"of {n_documents} documents, with data.val_fraction {config.val_fraction}"
    if n_documents == 0 and corpus.single_text_file is not None:
        raise no_text_error(corpus.single_text_file)
    if n_documents == 0:
        raise UserError("data.sources: no text in them: every document is empty, or all white space")
    if config.val_sources:
        for option, count in (("sources", sum(train)), ("val_sources", val)):
            if not count:
                raise UserError(f"data.{option}: no text in them: every document is empty, or all white space")
    if not val:
        raise UserError(f"no document was held out for validation {share}: raise it, or name data.val_sources")
    for i, count in enumerate(train):
        if not count:
            where = f"data.sources.{i}" if len(train) > 1 else "data.sources"
            todo = "give more text, lower it, or name data.val_sources"
            raise UserError(f"{where}: no document is left to train on {share}: {todo}")


def open_dataset(folder: Path, weights: Sequence[float], hashes: FileHashes, found: bool, start: float) -> Dataset:
    """Map a dataset that is complete. Raises UserError where it is damaged."""
    manifest = shards.read_manifest(folder)
    train = shards.open_split(folder, manifest, "train", weights)
    val = shards.open_split(folder, manifest, "val")
    for split in (train, val):
        shards.check_hashes(split, manifest, hashes)
    tokenizer = shards.open_tokenizer(folder, manifest)
    parts = [manifest.key, manifest.tokenizer_sha256, *(record.sha256 for record in manifest.streams)]
    counts = {
        split.name: {"documents": split.n_documents, "tokens": split.n_tokens, "bytes": split.n_bytes}
        for split in (train, val)
    }
    report = {
        **counts,
        "vocab_size": manifest.vocab_size,
        "blank_documents": manifest.n_blank,
        "folder": str(folder),
        "found": found,
        "seconds": time.perf_counter() - start,
    }
    return Dataset(tokenizer, train, val, hashlib.sha256(" ".join(parts).encode()).hexdigest(), report)
