"""Prepare the data: use the cached dataset, or tokenize once.

The cache is a folder of datasets, each named by a hash of all that it depends on: the content of the sources, the split
and the tokenizer. A dataset is built under a `.partial` name, flushed to disk and renamed, under a lock that ends with
its process. A killed build leaves only its `.partial` folder, which the next build removes.
"""

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

import numpy as np
from filelock import FileLock, Timeout

from training.config import DataConfig, FilesSource
from training.data import shards
from training.data.chunks import Chunk
from training.data.corpus import Corpus, split_documents
from training.data.file_hashes import FileHashes
from training.data.progress import progress
from training.data.shards import Manifest, Split, Stream, StreamRecord, StreamWriter
from training.data.sources import build_reader, no_text_error
from training.data.tokenizer import Tokenizer, build_tokenizer
from training.data.workers import encode_chunks
from training.errors import UserError
from training.files import fsync_path, rename_durable


@dataclass(frozen=True)
class Dataset:
    """The data of a run. `fingerprint` hashes sources, tokenizer and tokens; `report` is for people."""

    tokenizer: Tokenizer
    train: Split
    val: Split
    fingerprint: str
    report: dict[str, Any]


def prepare(config: DataConfig, *, quiet: bool = False) -> Dataset:
    """Open the token shards in `cache_dir`; build them if they are not there. Many processes may call this at once.

    Raises UserError for text that cannot be read, a split without documents, or a disk that cannot be written.
    """
    start = time.perf_counter()
    corpus = Corpus(config)
    cache = Path(config.cache_dir).expanduser()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        hashes = FileHashes(cache / "digests.json")
        folder = cache / corpus.cache_key(hashes)
        is_cached = folder.exists()
        if not is_cached:
            with lock_dataset(folder, quiet):
                if not folder.exists():
                    remove_leftovers(cache)
                    build_dataset(corpus, folder, hashes, quiet)
        dataset = open_dataset(folder, corpus.weights, hashes, is_cached, start)
        hashes.save()
    except OSError as error:  # from the cache's disk: readers of sources raise UserError
        raise UserError(f"{error.filename or cache}: cannot be written: {error.strerror or error}") from None
    return dataset


@contextmanager
def lock_dataset(folder: Path, quiet: bool) -> Iterator[None]:
    """Hold the lock of one dataset. The system releases it when the process ends."""
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
    """Remove the folders of killed builds; keep those that another process is building."""
    for partial in cache.glob("*.partial"):
        lock = FileLock(partial.with_suffix(".lock"), is_singleton=False)
        try:
            with lock.acquire(timeout=0):
                shutil.rmtree(partial)
        except Timeout:
            continue


def build_dataset(corpus: Corpus, folder: Path, hashes: FileHashes, quiet: bool) -> None:
    """Write a dataset under a temporary name and rename it. The caller holds its lock."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_dataset(corpus, partial, folder.name, quiet)
        if corpus.cache_key(hashes) != folder.name:
            raise UserError(f"{folder}: the sources changed while they were read; start again")
        rename_durable(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_dataset(corpus: Corpus, folder: Path, key: str, quiet: bool) -> None:
    """Write the tokenizer, the streams and, last, the manifest; flush all files to disk."""
    with progress("making the tokenizer", quiet=quiet) as advance:
        texts = count_bytes(corpus.training_text(), advance)
        tokenizer = build_tokenizer(corpus.config.tokenizer, texts)
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
    """Yield the texts, and call `advance` with the bytes of each."""
    for text in texts:
        advance(len(text.encode()))
        yield text


def write_streams(
    corpus: Corpus, tokenizer: Path, writers: dict[tuple[str, int], StreamWriter], advance: Callable[[int], object]
) -> int:
    """Tokenize everything. Returns the number of blank documents, which are left out."""
    n_blank = 0

    def non_blank() -> Iterator[Chunk]:
        nonlocal n_blank
        for chunk in chain.from_iterable(corpus.chunks()):
            if chunk.starts_document and not chunk.text.strip():
                n_blank += 1
            else:
                yield chunk

    for chunk, ids in encode_chunks(non_blank(), tokenizer, corpus.config.workers):
        writer = writers[chunk.split, chunk.stream]
        if chunk.starts_document:
            writer.start_document()
        n_bytes = len(chunk.text.encode())
        writer.add(ids, n_bytes)
        advance(n_bytes)
    return n_blank


def check_splits(corpus: Corpus, records: Sequence[StreamRecord]) -> None:
    """Raise UserError if there is nothing to train on or nothing to validate on."""
    *train, val = (record.n_documents for record in records)
    config, n_documents = corpus.config, sum(train) + val
    if n_documents == 0 and corpus.single_text_file is not None:
        raise no_text_error(corpus.single_text_file)
    counts = {"sources": n_documents}
    if n_documents and config.val_sources:
        counts = {"sources": sum(train), "val_sources": val}
    for option, count in counts.items():
        if not count:
            raise UserError(f"data.{option}: no text in them: every document is empty, or all white space")
    fraction = f"of {n_documents} documents, with data.val_fraction {config.val_fraction}"
    if not val:
        raise UserError(
            f"no document was held out for validation {fraction}: a hash chooses them, so it may choose none of a "
            "few; raise data.val_fraction, give more documents, or name data.val_sources"
        )
    for i, count in enumerate(train):
        if not count:
            option = f"data.sources.{i}" if len(train) > 1 else "data.sources"
            advice = "give more text, lower data.val_fraction, or name data.val_sources"
            raise UserError(f"{option}: no document is left to train on {fraction}: {advice}")


def open_dataset(folder: Path, weights: Sequence[float], hashes: FileHashes, is_cached: bool, start: float) -> Dataset:
    """Map a complete dataset; `start` is when `prepare` began, in seconds. Raises UserError if it is damaged."""
    manifest = shards.read_manifest(folder)
    train = shards.open_split(folder, manifest, "train", weights)
    val = shards.open_split(folder, manifest, "val")
    for split in (train, val):
        shards.check_hashes(split, manifest, hashes)
    tokenizer = shards.open_tokenizer(folder, manifest)
    parts = [manifest.key, manifest.tokenizer_sha256, *(record.sha256 for record in manifest.streams)]
    report = {
        split.name: {"documents": split.n_documents, "tokens": split.n_tokens, "bytes": split.n_bytes}
        for split in (train, val)
    }
    report |= {
        "vocab_size": manifest.vocab_size,
        "blank_documents": manifest.n_blank,
        "folder": str(folder),
        "is_cached": is_cached,
        "seconds": time.perf_counter() - start,
    }
    return Dataset(tokenizer, train, val, hashlib.sha256(" ".join(parts).encode()).hexdigest(), report)


def read_split(paths: Sequence[str], text_column: str, tokenizer: Tokenizer) -> Split:
    """Tokenize files into memory as one stream, without a cache, to evaluate a model on them.

    Raises UserError if they cannot be read or hold no text.
    """
    arrays, starts, n_tokens, n_bytes = [], [], 0, 0
    reader = build_reader(FilesSource(paths=tuple(paths), text_column=text_column))
    for chunk in split_documents(reader, 0, 1.0):
        if chunk.starts_document and not chunk.text.strip():
            continue
        ids = tokenizer.encode(chunk.text)
        if chunk.starts_document:
            starts.append(n_tokens)
            ids = np.concatenate([[tokenizer.end_of_text], ids])
        arrays.append(ids.astype(tokenizer.dtype))
        n_tokens += len(ids)
        n_bytes += len(chunk.text.encode())
    if not starts:
        raise UserError(f"{', '.join(paths)}: no text in there")
    stream = Stream(Path(paths[0]), np.concatenate(arrays), np.array(starts, np.uint64))
    return Split("val", (stream,), None, tokenizer.vocab_size, len(starts), n_tokens, n_bytes)
