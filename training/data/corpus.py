"""All documents of a configuration, split into training and validation text, and the key of their cache."""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import zip_longest

from training.config import DataConfig
from training.data.chunks import Chunk
from training.data.file_hashes import FileHashes
from training.data.shards import FORMAT_VERSION
from training.data.sources import FilesReader, Reader, build_reader
from training.data.text_files import is_text_file
from training.data.tokenizer import tokenizer_identity
from training.errors import UserError


class Corpus:
    """The text of a configuration. Raises UserError if a source is missing.

    Documents are held out for validation by a hash; a single text file is split near its end instead.
    Training text is one stream, or one stream for each source if sources have weights. Validation text is one stream.
    """

    def __init__(self, config: DataConfig):
        if any(source.weight for source in config.val_sources):
            raise UserError("data.val_sources: validation text is read once from end to end; leave weight out")
        self.config = config
        self.train_readers = [build_reader(source) for source in config.sources]
        self.val_readers = [build_reader(source) for source in config.val_sources]
        self.weights = [source.weight for source in config.sources if source.weight]
        self.n_streams = len(self.weights) or 1
        self.single_text_file = None  # its end is held out, as it is one document
        readers = self.train_readers + self.val_readers
        if len(readers) == 1 and isinstance(readers[0], FilesReader) and len(readers[0].paths) == 1:
            (path,) = readers[0].paths
            self.single_text_file = path if is_text_file(path) else None

    def cache_key(self, hashes: FileHashes) -> str:
        """Return a hash of everything that changes the tokens on disk. Of the weights, only their presence does."""
        inputs = {
            "format": FORMAT_VERSION,
            "sources": [reader.identity(hashes) for reader in self.train_readers],
            "val_sources": [reader.identity(hashes) for reader in self.val_readers],
            "val_fraction": None if self.val_readers else self.config.val_fraction,
            "weighted": bool(self.weights),
            "tokenizer": tokenizer_identity(self.config.tokenizer, hashes),
        }
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]

    def chunks(self) -> Iterator[Iterator[Chunk]]:
        """Yield an iterator over the chunks of each source."""
        if self.single_text_file is not None:
            yield split_text(lambda: next(self.train_readers[0].documents()).chunks, self.config.val_fraction)
            return
        val_fraction = 0.0 if self.val_readers else self.config.val_fraction
        for i, reader in enumerate(self.train_readers):
            yield split_documents(reader, i if self.weights else 0, val_fraction)
        for reader in self.val_readers:
            yield split_documents(reader, 0, 1.0)

    def training_text(self) -> Iterator[str]:
        """Yield training text, one chunk of each source in turn, so that any prefix is a fair sample."""
        for chunks in zip_longest(*self.chunks()):
            yield from (chunk.text for chunk in chunks if chunk is not None and chunk.split == "train")


def split_documents(reader: Reader, stream: int, val_fraction: float) -> Iterator[Chunk]:
    """Yield the chunks of a source's documents. After a blank first chunk, it skips the rest."""
    for document in reader.documents():
        text = next(document.chunks)
        is_val = is_held_out(text if document.key is None else document.key, val_fraction)
        split, index = ("val", 0) if is_val else ("train", stream)
        yield Chunk(text, split, index, starts_document=True)
        if text.strip():
            yield from (Chunk(text, split, index, starts_document=False) for text in document.chunks)


def split_text(chunks: Callable[[], Iterator[str]], val_fraction: float) -> Iterator[Chunk]:
    """Split one text: validation starts at the first line after 1 - val_fraction of its characters."""
    border = int(sum(len(text) for text in chunks()) * (1 - val_fraction))
    n_read, split = 0, "train"
    for text in chunks():
        if split == "train" and n_read + len(text) > border:
            cut = max(0, border - n_read)
            cut = text.find("\n", cut) + 1 or cut
            if text[:cut]:
                yield Chunk(text[:cut], split, 0, starts_document=n_read == 0)
            if text[cut:]:
                yield Chunk(text[cut:], "val", 0, starts_document=True)
                split = "val"
        else:
            yield Chunk(text, split, 0, starts_document=n_read == 0)
        n_read += len(text)


def is_held_out(key: str, val_fraction: float) -> bool:
    """Return True if a document is for validation, by its key alone. A larger fraction holds out the same and more."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < val_fraction * 2**64
