"""All documents of a configuration, each sent to training or validation, and the name for what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from training.config import DataConfig
from training.data import tokenizer_choice
from training.data.chunks import Chunk
from training.data.file_hashes import FileHashes
from training.data.shards import FORMAT_VERSION
from training.data.sources import Files, Reader, build_reader
from training.errors import UserError


class Corpus:
    """The text of a configuration. Raises UserError where a source is missing.

    Documents are held out for validation by their hash; of a lone text file, its end is.

    Training text is one stream, or a stream for each source where sources are weighted; validation text is
    always one stream. Blank documents are left out and counted.
    """

    def __init__(self, config: DataConfig):
        if any(source.weight for source in config.val_sources):
            raise UserError("data.val_sources: validation text is read once from end to end; leave weight out")
        self.config = config
        self.train = [build_reader(source) for source in config.sources]
        self.val = [build_reader(source) for source in config.val_sources]
        self.weights = [source.weight for source in config.sources if source.weight]
        self.n_streams = len(self.weights) or 1
        first = self.train[0]
        alone = not self.val and len(self.train) == 1 and isinstance(first, Files)
        self.single_text_file = first.single_text_file if alone else None

    def cache_key(self, hashes: FileHashes) -> str:
        """A name for all that decides the tokens on disk: weights do not, whether there are any does."""
        asked: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "sources": [source.identity(hashes) for source in self.train],
            "val_sources": [source.identity(hashes) for source in self.val],
            "val_fraction": None if self.val else self.config.val_fraction,
            "weighted": bool(self.weights),
            "tokenizer": tokenizer_choice.tokenizer_identity(self.config.tokenizer, hashes),
        }
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]

    def chunks(self) -> Iterator[Iterator[Chunk]]:
        """For each source an iterator over its chunks."""
        if self.single_text_file is not None:
            yield split_text(lambda: next(self.train[0].documents()).chunks, self.config.val_fraction)
            return
        val_fraction = 0.0 if self.val else self.config.val_fraction
        for i, source in enumerate(self.train):
            yield chunks(source, i if self.weights else 0, val_fraction)
        for source in self.val:
            yield chunks(source, 0, 1.0)

    def training_text(self) -> Iterator[str]:
        """Chunks of training text, one of each source in turn: any beginning of it is a fair sample."""
        return (chunk.text for chunk in round_robin(self.chunks()) if chunk.split == "train")


def chunks(source: Reader, stream: int, val_fraction: float) -> Iterator[Chunk]:
    """The chunks of a source's documents. A document that begins with a blank chunk is that chunk only."""
    for document in source.documents():
        text = next(document.chunks)
        val = is_held_out(text if document.key is None else document.key, val_fraction)
        split, index = ("val", 0) if val else ("train", stream)
        yield Chunk(text, split, index, first=True)
        if text.strip():
            yield from (Chunk(text, split, index, first=False) for text in document.chunks)


def split_text(text: Callable[[], Iterator[str]], val_fraction: float) -> Iterator[Chunk]:
    """A text that is all there is, given in chunks: validation begins with the first line past 1 - val_fraction."""
    border = int(sum(len(chunk) for chunk in text()) * (1 - val_fraction))
    begun, n_read, split = False, 0, "train"
    for chunk in text():
        if split == "train" and n_read + len(chunk) > border:
            at = max(0, border - n_read)
            at = chunk.find_files("\n", at) + 1 or at
            if chunk[:at]:
                yield Chunk(chunk[:at], split, 0, first=not begun)
            if chunk[at:]:
                yield Chunk(chunk[at:], "val", 0, first=True)
                split = "val"
        else:
            yield Chunk(chunk, split, 0, first=not begun)
        begun, n_read = True, n_read + len(chunk)


def is_held_out(key: str, val_fraction: float) -> bool:
    """Whether a document is for validation: a matter of its key alone, so no other document can move it.

    Documents that are alike are on the same side, and a larger fraction keeps what a smaller one held out.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < val_fraction * 2**64


def round_robin(iterators: Iterable[Iterator[Chunk]]) -> Iterator[Chunk]:
    """One item of each iterator in turn, until all have ended."""
    waiting = deque(iterators)
    while waiting:
        iterator = waiting.popleft()
        for chunk in iterator:
            yield chunk
            waiting.append(iterator)
            break
