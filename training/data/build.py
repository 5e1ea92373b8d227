"""Build a dataset: make the tokenizer, tokenize on all cores, and write streams and manifest."""

import hashlib
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np

from training.data.chunks import Chunk
from training.data.corpus import Corpus
from training.data.shards import FORMAT_VERSION, MANIFEST_FILE, Manifest, StreamRecord, StreamWriter
from training.data.sources import no_text_error
from training.data.tokenizer import OTHER_SEPARATORS, Tokenizer, build_tokenizer
from training.errors import UserError
from training.files import fsync_path
from training.terminal import is_terminal, print_note, redirects, rich_console

BATCH_CHARS = 1 << 20  # text that a thread tokenizes at a time


@dataclass
class TextCounts:
    """Counts for the manifest, of its meanings."""

    n_blank: int = 0
    n_borders: int = 0
    as_text: Counter[str] = field(default_factory=Counter)


EncodedChunk = tuple[Chunk, np.ndarray]  # a chunk and its tokens


def write_dataset(corpus: Corpus, folder: Path, key: str, quiet: bool) -> None:
    """Write the tokenizer, the streams and, last, the manifest; flush all files to disk."""
    with progress("making the tokenizer", quiet) as advance:
        texts = map(advance, corpus.training_text())
        build_tokenizer(corpus.config.tokenizer, texts).save(folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")  # as readers will load it
    with ExitStack() as files, progress("tokenizing", quiet) as advance:
        writers = {}
        for split, i in [*(("train", i) for i in range(corpus.n_streams)), ("val", 0)]:
            paths = (folder / f"{split}-{i}.{kind}" for kind in ("tokens", "documents"))
            writers[split, i] = StreamWriter(*(files.enter_context(path.open("wb")) for path in paths), tokenizer)
        chunks = chain.from_iterable(corpus.chunks(tokenizer.separators))
        counts = write_streams(chunks, tokenizer, writers, corpus.config.workers, advance)
    records = [writer.record(split) for (split, _), writer in writers.items()]
    check_splits(corpus, records)
    train = np.concatenate([writer.document_hashes() for (split, _), writer in writers.items() if split == "train"])
    manifest = Manifest(
        format=FORMAT_VERSION,
        key=key,
        dtype=tokenizer.dtype.str,
        vocab_size=tokenizer.vocab_size,
        separator=tokenizer.separator,
        tokenizer_sha256=hashlib.sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest(),
        **vars(counts),
        n_shared=int(np.isin(writers["val", 0].document_hashes(), train).sum()),
        n_repeated=len(train) - len(np.unique(train)),
        streams=records,
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n")
    for path in [*folder.rglob("*"), folder]:
        fsync_path(path)


def write_streams(
    chunks: Iterable[Chunk],
    tokenizer: Tokenizer,
    writers: dict[tuple[str, int], StreamWriter],
    threads: int | None,
    advance: Callable[[str], str],
) -> TextCounts:
    """Tokenize everything and count what is special in it."""
    counts, names = TextCounts(), dict.fromkeys(tokenizer.separators + OTHER_SEPARATORS)
    for chunk, ids in encode_chunks(chunks, tokenizer, threads):
        counts.n_borders += chunk.follows_border
        if chunk.is_blank_document:
            counts.n_blank += 1
        else:
            writers[chunk.split, chunk.stream].add(chunk, ids)
            counts.as_text.update({name: n for name in names if (n := chunk.text.count(name))})
            advance(chunk.text)
    return counts


def encode_chunks(chunks: Iterable[Chunk], tokenizer: Tokenizer, threads: int | None) -> Iterator[EncodedChunk]:
    """Yield each chunk with its tokens, in order. Holds a few batches in memory; threads None: one per core."""
    if threads is None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def encode(batch: list[Chunk]) -> list[EncodedChunk]:
        return list(zip(batch, tokenizer.encode_batch([chunk.text for chunk in batch]), strict=True))

    batches = to_batches(chunks)
    with ThreadPoolExecutor(threads) as pool:  # the tokenizers' native code releases the GIL
        pending = deque(pool.submit(encode, batch) for batch in islice(batches, threads + 1))
        while pending:
            encoded = pending.popleft().result()
            pending.extend(pool.submit(encode, batch) for batch in islice(batches, 1))
            yield from encoded


def to_batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    """Group consecutive chunks into batches of about BATCH_CHARS characters."""
    batch, length = [], 0
    for chunk in chunks:
        batch.append(chunk)
        length += len(chunk.text)
        if length >= BATCH_CHARS:
            yield batch
            batch, length = [], 0
    yield batch


def check_splits(corpus: Corpus, records: Sequence[StreamRecord]) -> None:
    """Raise UserError if there is nothing to train on or nothing to validate on."""
    *train, val = (record.n_documents for record in records)
    config, n_documents = corpus.config, sum(train) + val
    if n_documents == 0 and corpus.single_text_file is not None:
        raise no_text_error(corpus.single_text_file)
    counts = {"sources": sum(train), "val_sources": val} if config.val_sources else {"sources": n_documents}
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


@contextmanager
def progress(stage: str, quiet: bool) -> Iterator[Callable[[str], str]]:
    """Show a stage on stderr. Yields a function to call with each processed text, which it returns."""
    if quiet:
        yield lambda text: text
        return
    start, total, bar = time.perf_counter(), 0, None

    def advance(text: str) -> str:
        nonlocal total
        total += len(text.encode())
        if bar:
            bar.update(task, completed=total)
        return text

    if not is_terminal("stderr"):
        print_note(f"{stage} ...")
        yield advance
        seconds = time.perf_counter() - start
        print_note(f"{stage}: {total / 1e6:.1f} MB in {seconds:.1f} s")
        return

    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    columns += TransferSpeedColumn(), TimeElapsedColumn()
    bar = Progress(*columns, console=rich_console("stderr"), **redirects())
    task = bar.add_task(stage, total=None)  # unknown: text may be compressed, or come from the network
    with bar:
        yield advance
