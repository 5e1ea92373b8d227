"""Build a dataset: make the tokenizer, tokenize on all cores, and write streams and manifest."""

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import chain, islice, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.config import BPETokenizer
from training.data.chat_template import default_template
from training.data.chunks import Chunk
from training.data.corpus import Corpus, StreamPlan, chat_template_source, hash_of
from training.data.dialogues import EncodedText, encode_dialogue
from training.data.file_hashes import FileHashes
from training.data.progress import show_progress
from training.data.shards import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Manifest,
    PartRecord,
    StreamRecord,
    TextSize,
)
from training.data.sources import FilesReader, no_text_error
from training.data.stream_writer import StreamWriter
from training.data.token_source import scan, with_end_of_text
from training.data.tokenizer import Tokenizer, build_tokenizer
from training.data.tokenizer_config import OTHER_SEPARATORS
from training.errors import UserError
from training.files import fsync_path

BATCH_CHARS = 1 << 20  # text that a thread tokenizes at a time


@dataclass
class TextCounts:
    """Counts of a text, as in `Manifest`."""

    n_blank: int = 0
    n_borders: int = 0
    n_not_utf8: int = 0
    as_text: Counter[str] = field(default_factory=Counter)
    unwritten: Counter[str] = field(default_factory=Counter)


EncodedChunk = tuple[Chunk, EncodedText]


def write_dataset(corpus: Corpus, folder: Path, key: str, hashes: FileHashes, quiet: bool) -> None:
    """Write the tokenizer, the streams and, last, the manifest; flush all files to disk."""
    sizes = sizes_to_learn_from(corpus)
    is_trained = isinstance(corpus.config.tokenizer, BPETokenizer)
    with show_progress("making the tokenizer", quiet, only_if_slow=not is_trained, **sizes) as progress:
        corpus.count_reads(progress.add_read)
        texts = progress.watch(corpus.training_text(), "making the tokenizer: all text is read, learning the merges")
        tokenizer = with_end_of_text(build_tokenizer(corpus.config.tokenizer, texts), corpus.end_of_text)
        if corpus.config.has_messages:
            tokenizer.chat_template = (
                chat_template_source(corpus.config) or tokenizer.chat_template or default_template()
            )
        tokenizer.save(folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")  # as readers will load it
    writers, counts = write_text(corpus, folder, tokenizer, quiet)
    records = [
        writers[plan.split, plan.index].record(plan.split)
        if plan.source is None
        else write_token_source(corpus, plan, folder, tokenizer, hashes, quiet)
        for plan in corpus.streams()
    ]
    counts.n_not_utf8 = count_not_utf8(corpus)
    check_splits(corpus, records)
    train, val = (labeled_documents(writers, split) for split in ("train", "val"))
    shared = val.select(np.isin(val.hashes, train.hashes))
    manifest = Manifest(
        format=FORMAT_VERSION,
        key=key,
        dtype=tokenizer.dtype.str,
        vocab_size=tokenizer.vocab_size,
        separator=tokenizer.separator,
        tokenizer_sha256=hashlib.sha256((folder / "tokenizer" / "tokenizer.json").read_bytes()).hexdigest(),
        **vars(counts),
        val_splits=sorted(corpus.own_validation.items()),
        n_shared=len(shared.hashes),
        shared=count_by_source(train, shared),
        n_repeated=len(train.hashes) - len(np.unique(train.hashes)),
        is_joined=not corpus.weights and sum(record.split == "train" for record in records) > 1,
        streams=records,
    )
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    with show_progress("flushing the tokens to disk", quiet, only_if_slow=True):
        for path in [*folder.rglob("*"), folder]:
            fsync_path(path)


def count_not_utf8(corpus: Corpus) -> int:
    """Return the number of files that were left out because they are not UTF-8."""
    readers = [r for r in corpus.train_readers + corpus.val_readers if isinstance(r, FilesReader)]
    return sum(sum(reader.not_utf8.values()) for reader in readers)


def write_text(
    corpus: Corpus, folder: Path, tokenizer: Tokenizer, quiet: bool
) -> tuple[dict[tuple[str, int], StreamWriter], TextCounts]:
    """Tokenize all text and write its streams. Returns their writers by split and index, and the counts."""
    writers: dict[tuple[str, int], StreamWriter] = {}
    if not corpus.has_text:
        return writers, TextCounts()
    sizes = {"total": corpus.n_bytes, "total_read": corpus.bytes_to_read}
    with ExitStack() as files, show_progress("tokenizing", quiet, **sizes) as progress:
        corpus.count_reads(progress.add_read)
        for split, i, source in corpus.streams():
            if source is None:
                kinds = ["tokens", "documents"] + ["targets"] * corpus.has_targets(split, i)
                paths = {kind: folder / f"{split}-{i}.{kind}" for kind in kinds}
                opened = {kind: files.enter_context(path.open("wb")) for kind, path in paths.items()}
                writers[split, i] = StreamWriter(tokenizer, **opened)
        chunks = chain.from_iterable(corpus.chunks(tokenizer))
        return writers, write_streams(chunks, tokenizer, writers, corpus.config.workers, progress)


def write_token_source(
    corpus: Corpus, plan: StreamPlan, folder: Path, tokenizer: Tokenizer, hashes: FileHashes, quiet: bool
) -> StreamRecord:
    """Scan a stream of tokens, which stay where they are, and write where its documents start."""
    reader, start, stop = corpus.token_range(plan, tokenizer.end_of_text)
    files = [hashes.sha256(file.path) for file in reader.files]
    n_bytes = (stop - start) * tokenizer.dtype.itemsize
    with (
        show_progress(f"scanning the tokens of {reader.name}", quiet, total=n_bytes) as progress,
        (folder / f"{plan.split}-{plan.index}.documents").open("wb") as documents,
    ):
        counts = scan(reader, start, stop, tokenizer, documents, count_threads(corpus.config.workers), progress.add)
    counts = counts._asdict()
    part = PartRecord(source=plan.source, **{name: counts[name] for name in TextSize.model_fields if name in counts})
    return StreamRecord(split=plan.split, parts=[part], files=files, start=start, **counts)


class LabeledDocuments(NamedTuple):
    """The hash of each document of a split, uint64, and the number of its source, both (n_documents,)."""

    hashes: np.ndarray
    sources: np.ndarray

    def select(self, mask: np.ndarray) -> "LabeledDocuments":
        """Return the documents where a mask (n_documents,) is True."""
        return LabeledDocuments(self.hashes[mask], self.sources[mask])


def labeled_documents(writers: Mapping[tuple[str, int], StreamWriter], split: str) -> LabeledDocuments:
    """Return the documents of a split."""
    written = [writer for (name, _), writer in writers.items() if name == split]
    parts = [(source, counts["n_documents"]) for writer in written for source, counts in writer.parts.items()]
    sources, sizes = np.array(parts, np.int64).reshape(-1, 2).T
    hashes = [np.zeros(0, np.uint64), *(writer.document_hashes() for writer in written)]
    return LabeledDocuments(np.concatenate(hashes), np.repeat(sources, sizes))


def count_by_source(train: LabeledDocuments, shared: LabeledDocuments) -> list[tuple[int, int, int]]:
    """Return (source of validation text, source of training text, validation documents that are in both).

    `shared` are the validation documents that are also training documents.
    """
    train = train.select(np.isin(train.hashes, shared.hashes))
    pairs = []
    for val_source, train_source in product(np.unique(shared.sources), np.unique(train.sources)):
        own = shared.hashes[shared.sources == val_source]
        if n := int(np.isin(own, train.hashes[train.sources == train_source]).sum()):
            pairs.append((int(val_source), int(train_source), n))
    return pairs


def sizes_to_learn_from(corpus: Corpus) -> dict[str, int | None]:
    """Return the sizes of the text that a BPE is trained on, as `Progress` takes them; none if no text is needed."""
    config = corpus.config.tokenizer
    if not isinstance(config, BPETokenizer):
        return {}
    total = None if corpus.n_bytes is None else min(corpus.n_bytes, config.max_bytes)
    return {"total": total, "total_read": corpus.bytes_to_read, "at_most": config.max_bytes}


def write_streams(
    chunks: Iterable[Chunk],
    tokenizer: Tokenizer,
    writers: dict[tuple[str, int], StreamWriter],
    threads: int | None,
    advance: Callable[[str], str],
) -> TextCounts:
    """Tokenize and write all chunks; count blank documents, borders, and separators that are ordinary text."""
    counts, names = TextCounts(), dict.fromkeys(tokenizer.separators + OTHER_SEPARATORS)
    for chunk, encoded in encode_chunks(chunks, tokenizer, threads):
        counts.n_borders += chunk.follows_border
        if chunk.is_blank_document:
            counts.n_blank += 1
        else:
            writers[chunk.split, chunk.stream].add(chunk, encoded)
            counts.unwritten.update(encoded.unwritten)
            counts.as_text.update({name: n for name in names if (n := chunk.text.count(name))})
            advance(chunk.text)
    return counts


def encode_chunks(chunks: Iterable[Chunk], tokenizer: Tokenizer, threads: int | None) -> Iterator[EncodedChunk]:
    """Yield each chunk with its tokens, in order. Holds a few batches in memory; threads None: one per core."""
    threads = count_threads(threads)

    def encode(batch: list[Chunk]) -> list[EncodedChunk]:
        ids = iter(tokenizer.encode_batch([chunk.text for chunk in batch if not chunk.is_dialogue]))
        return [
            (chunk, encode_dialogue(chunk.dialogue, tokenizer))
            if chunk.is_dialogue
            else (chunk, EncodedText(next(ids), None, len(chunk.text.encode())))
            for chunk in batch
        ]

    batches = to_batches(chunks)
    with ThreadPoolExecutor(threads) as pool:  # the tokenizers' native code releases the GIL
        pending = deque(pool.submit(encode, batch) for batch in islice(batches, threads + 1))
        while pending:
            encoded = pending.popleft().result()
            pending.extend(pool.submit(encode, batch) for batch in islice(batches, 1))
            yield from encoded


def count_threads(threads: int | None) -> int:
    """Return the number of threads; None: one per core."""
    if threads is not None:
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    train, vals = ([record.n_documents for record in records if record.split == name] for name in ("train", "val"))
    train = train if corpus.weights else [sum(train)]
    config, val, n_documents = corpus.config, sum(vals), sum(train) + sum(vals)
    if n_documents == 0 and corpus.single_text_file is not None:
        raise no_text_error(corpus.single_text_file)
    counts = {"sources": sum(train), "val_sources": val} if config.val_sources else {"sources": n_documents}
    for option, count in counts.items():
        if not count:
            reason = "no text in them: every document is empty, or all white space"
            if corpus.config.has_answers:
                reason = "no answer in them: no row has a completion, or a turn of role assistant, with text"
            raise UserError(f"data.{option}: {reason}")
    fraction = f"of {n_documents} documents, with data.val_fraction {config.val_fraction}"
    if not val:
        raise UserError(
            f"no document was held out for validation {fraction}: a hash chooses them, so it may choose none of a "
            f"few; {advice_for_few_documents(corpus)}, or name data.val_sources"
        )
    for i, count in enumerate(train):
        if not count:
            option = f"data.sources.{i}" if len(train) > 1 else "data.sources"
            advice = f"{advice_for_few_documents(corpus)}, or name data.val_sources"
            raise UserError(f"{option}: no document is left to train on {fraction}: {advice}")


def advice_for_few_documents(corpus: Corpus) -> str:
    """Return what to change so that both splits get documents: the smallest fraction that holds out one of several."""
    if corpus.single_text_file is not None:
        return "give more text"
    chunks = (chunk for chunk in chain.from_iterable(corpus.chunks()) if chunk.starts_document)
    hashes = sorted({hash_of(chunk.text) for chunk in chunks if not chunk.is_blank_document})
    if len(hashes) < 2:
        return "give more documents, or the only one as a .txt file, whose end is then held out"
    return f"give more documents, set data.val_fraction to {(hashes[0] + hashes[1]) / 2**65:.4g}, which holds out one"
