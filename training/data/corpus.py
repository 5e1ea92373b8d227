"""All documents of a configuration, split into training and validation text, and the key of their cache."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from training.config import (
    AUTO_SPLIT,
    DataConfig,
    FileTokenizer,
    HuggingFaceTokenizer,
    TokenizerConfig,
    TokensSource,
    has_answers,
)
from training.data.chat_template import default_template, read_template
from training.data.chunks import Chunk, mark_blank, number_parts
from training.data.file_hashes import FileHashes
from training.data.limits import Budget, first_part
from training.data.shards import FORMAT_VERSION
from training.data.sources import (
    FilesReader,
    HuggingFaceReader,
    Reader,
    StdlibReader,
    build_readers,
    drop_repeated_files,
    identity_of,
    plain_bytes,
    stored_bytes,
)
from training.data.text_files import format_of, is_text_file
from training.data.token_source import TokensReader
from training.data.tokenizer import Tokenizer, tokenizer_files, tokenizer_identity
from training.data.tokenizer_config import END_OF_TEXT, own_bos_token, own_chat_template
from training.errors import UserError

DUMP_SUFFIX = "-documents"  # of a cache's folder whose .txt files were split into documents, which older ones were not


class StreamPlan(NamedTuple):
    """A stream to write: the `index`-th of its split. `source`: number of the token source that it is; None: text."""

    split: str
    index: int
    source: int | None


class Corpus:
    """The text of a configuration. Raises UserError if a source is missing.

    Documents are held out for validation by a hash; a single text file is split near its end instead.
    Training text is one stream, or one stream for each source if sources have weights. Validation text is one stream,
    in which each source has a part of its own. A source of token files has streams of its own, of which the end is held
    out; without weights, they follow the stream of the text.
    A file that sources without weights list several times is read once; `repeated_files` has the other spellings.
    """

    def __init__(self, config: DataConfig):
        if any(source.weight for source in config.val_sources):
            raise UserError("data.val_sources: validation text is read once from end to end; leave weight out")
        self.config = config
        self.train_readers = build_readers(config.sources)
        self.val_readers = build_readers(config.val_sources)
        self.weights = [source.weight for source in config.sources if source.weight]
        together = [[reader] for reader in self.train_readers] if self.weights else [self.train_readers]
        together.append(self.val_readers)
        self.repeated_files = [pair for readers in together for pair in drop_repeated_files(readers)]
        readers = self.train_readers + self.val_readers
        text_readers = [reader for reader in readers if not isinstance(reader, TokensReader)]
        self.has_text = bool(text_readers)
        tokens = [source for source in (*config.sources, *config.val_sources) if isinstance(source, TokensSource)]
        self.end_of_text = next((each.end_of_text for each in tokens if each.end_of_text is not None), None)
        sizes = [plain_bytes(reader) for reader in text_readers]
        self.n_bytes = None if None in sizes else sum(sizes)  # of text; None: unknown before it is read
        sizes = [stored_bytes(reader) for reader in text_readers]
        self.n_stored = None if None in sizes else sum(sizes)  # of files, before decompression; None: unknown
        self.own_validation: dict[int, str] = {}  # by number of the source: the split that is its validation text
        self.single_text_file = None  # its end is held out, as it is one document
        if len(readers) == 1 and isinstance(readers[0], FilesReader) and len(readers[0].paths) == 1:
            (path,) = readers[0].paths
            self.single_text_file = path if is_text_file(path) else None
        # Borders that sources name; None: a source without one has .txt files, which may be dumps.
        borders = {
            reader.options.split_on
            for reader in readers
            if isinstance(reader, FilesReader)
            if reader.options.split_on or any(format_of(path) == ".txt" for path in reader.paths)
        }
        self.split_on = sorted(borders, key=str)
        self.has_dumps = None in borders

    def cache_key(self, hashes: FileHashes, *, with_splits: bool = False) -> str:
        """Return a hash of everything that changes the tokens on disk. Of the weights, only their presence does.

        `with_splits`: as if validation splits of the sources were found. Older versions did not split dumps. The suffix
        keeps their cache from being used for text that may be one.
        """
        inputs = {
            "format": FORMAT_VERSION,
            "sources": [identity_of(reader, hashes) for reader in self.train_readers],
            "val_sources": [identity_of(reader, hashes) for reader in self.val_readers],
            "val_fraction": None if self.val_readers else self.config.val_fraction,
            "weighted": bool(self.weights),
            "tokenizer": tokenizer_identity(self.config.tokenizer, hashes),
        }
        if self.config.has_messages:
            inputs |= {"chat_template": chat_template_source(self.config), "with_tools": True}
            if (bos_token := _bos_token(self.config.tokenizer)) is not None:
                inputs["bos_token"] = bos_token
        if self.own_validation or with_splits:
            inputs["own_validation"] = self._val_splits()
        return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16] + DUMP_SUFFIX * self.has_dumps

    def _val_splits(self) -> list[tuple[int, str]]:
        """Return (number of the source, option `val_split`) for those that may have validation text of their own."""
        readers = [] if self.val_readers else self.train_readers
        options = [(i, r.config.val_split) for i, r in enumerate(readers) if isinstance(r, HuggingFaceReader)]
        return [(i, split) for i, split in options if split is not None]

    @property
    def may_have_validation(self) -> bool:
        """True if a source may have a validation split that is used."""
        return bool(self._val_splits())

    def folder_in(self, cache: Path, hashes: FileHashes) -> Path:
        """Return the folder of the prepared text, which may not exist.

        A data set is asked for its splits only if nothing is prepared yet. With `val_split: auto`, text with held-out
        documents keeps the name that it had before validation splits were used, and is used if it is there.
        """
        if not (splits := self._val_splits()) or self.own_validation:
            return cache / self.cache_key(hashes)
        with_splits = cache / self.cache_key(hashes, with_splits=True)
        is_chosen = any(split != AUTO_SPLIT for _, split in splits)
        return with_splits if is_chosen or with_splits.exists() else cache / self.cache_key(hashes)

    def find_own_validation(self) -> None:
        """Find the validation splits of the sources, if there are no val_sources. Each split is read once."""
        splits: dict[tuple, int] = {}
        for i, _ in self._val_splits():
            reader = self.train_readers[i]
            if split := reader.validation_split():
                config = reader.config
                if splits.setdefault((config.name, config.config, config.data_files, split), i) == i:
                    self.own_validation[i] = split

    def readers(self, split: str) -> list[Reader | TokensReader]:
        """Return the readers of a split's sources."""
        return self.val_readers if split == "val" and self.val_readers else self.train_readers

    def has_targets(self, split: str, stream: int) -> bool:
        """Return True if a stream has documents of which a model learns the answers only."""
        sources = self.config.sources
        if split == "val":
            sources = self.config.val_sources or sources
        elif self.weights:
            sources = sources[stream : stream + 1]
        return any(map(has_answers, sources))

    def names(self, split: str) -> list[str]:
        """Return the name of each source of a split's text."""
        return [reader.name for reader in self.readers(split)]

    def streams(self) -> list[StreamPlan]:
        """Return the streams of the dataset, in the order of the manifest."""
        plans = []
        for split in ("train", "val"):
            tokens = [i if isinstance(reader, TokensReader) else None for i, reader in enumerate(self.readers(split))]
            if split == "val" or not self.weights:  # the text of all sources is one stream
                tokens = [None] * (None in tokens) + [i for i in tokens if i is not None]
            plans += [StreamPlan(split, index, source) for index, source in enumerate(tokens)]
        return plans

    def token_range(self, plan: StreamPlan, end_of_text: int) -> tuple[TokensReader, int, int]:
        """Return the source of a stream of tokens and the range of them that it has."""
        reader = self.readers(plan.split)[plan.source]
        if self.val_readers:
            return reader, 0, reader.n_tokens
        cut = reader.held_out_start(self.config.val_fraction, end_of_text)
        return (reader, 0, cut) if plan.split == "train" else (reader, cut, reader.n_tokens)

    @property
    def bytes_to_read(self) -> int | None:
        """The bytes that `chunks` reads of files; None if unknown. A single text file is measured before it is read."""
        return self.n_stored and self.n_stored * (1 + (self.single_text_file is not None))

    def count_reads(self, on_read: Callable[[int], object]) -> None:
        """Call `on_read` with the bytes that are read of files from here on."""
        for reader in self.train_readers + self.val_readers:
            if isinstance(reader, FilesReader | StdlibReader):
                reader.options = reader.options._replace(on_read=on_read)

    def chunks(self, tokenizer: Tokenizer | None = None, *, with_validation: bool = True) -> Iterator[Iterator[Chunk]]:
        """Yield an iterator over the chunks of each source. The tokenizer's separators divide dumps; None: GPT-2's.

        Without `with_validation`, text that is only for validation is not read.
        """
        separators = (END_OF_TEXT,) if tokenizer is None else tokenizer.separators
        if self.single_text_file is not None:
            yield split_text(lambda: self._single_text(separators, tokenizer), self.config.val_fraction)
            return
        val_fraction = 0.0 if self.val_readers else self.config.val_fraction
        for i, reader in enumerate(self.train_readers):
            if isinstance(reader, TokensReader):
                continue
            budget, own_split = Budget(reader.limit, tokenizer), self.own_validation.get(i)
            fraction = val_fraction if own_split is None else 0.0
            yield split_documents(reader, i, i if self.weights else 0, fraction, separators, budget)
            if own_split is not None and with_validation:
                val_reader, budget = reader.validation_reader(own_split), Budget(reader.limit, tokenizer)
                yield split_documents(val_reader, i, 0, 1.0, separators, budget)
        for i, reader in enumerate(self.val_readers if with_validation else ()):
            if not isinstance(reader, TokensReader):
                yield split_documents(reader, i, 0, 1.0, separators, Budget(reader.limit, tokenizer))

    def _single_text(self, separators: Sequence[str], tokenizer: Tokenizer | None) -> Iterator[tuple[int, str]]:
        """Yield (number of the document, text) of the single text file."""
        (reader,) = self.train_readers
        return first_part(number_parts(next(reader.documents()), separators), Budget(reader.limit, tokenizer))

    def training_text(self) -> Iterator[str]:
        """Yield training text, one chunk of each source in turn, so that any prefix is a fair sample."""
        for chunks in zip_longest(*self.chunks(with_validation=False)):
            yield from (chunk.text for chunk in chunks if chunk is not None and chunk.split == "train")


def chat_template_source(config: DataConfig) -> str | None:
    """Return the chat template of `data.chat_template` or of the tokenizer's folder; None: not known before loading."""
    if config.chat_template is not None:
        return read_template(Path(config.chat_template))
    if isinstance(config.tokenizer, FileTokenizer):
        (file, *_) = tokenizer_files(Path(config.tokenizer.path))
        return own_chat_template(file.parent) or default_template()
    return None if isinstance(config.tokenizer, HuggingFaceTokenizer) else default_template()


def _bos_token(config: TokenizerConfig) -> str | None:
    """Return the token that a tokenizer's folder names for the beginning of a dialogue, if it has a folder."""
    return own_bos_token(tokenizer_files(Path(config.path))[0].parent) if isinstance(config, FileTokenizer) else None


def split_documents(
    reader: Reader, source: int, stream: int, val_fraction: float, separators: Sequence[str], budget: Budget
) -> Iterator[Chunk]:
    """Yield the chunks of the documents of source number `source` until `budget` is spent; a blank one is one chunk.

    Training text goes to `stream`, a share `val_fraction` of the documents to the only stream of validation text.
    """
    for document in reader.documents():
        if (dialogue := document.dialogue) is not None:
            split, index = ("val", 0) if is_held_out(dialogue.text, val_fraction) else ("train", stream)
            is_blank = not dialogue.has_answer
            yield Chunk(dialogue.text, split, source, index, True, is_blank_document=is_blank, dialogue=dialogue)
            if not is_blank:
                budget.spend(dialogue.text, True)
            if budget.is_spent:
                return
            continue
        for number, text, starts, is_blank in mark_blank(number_parts(document, separators)):
            if starts and budget.is_spent:
                return
            if not is_blank:
                budget.spend(text, starts)
            if starts:
                is_val = is_held_out(text if document.key is None else document.key, val_fraction)
                split, index = ("val", 0) if is_val else ("train", stream)
            yield Chunk(text, split, source, index, starts, starts and number > 0, is_blank)
        if budget.is_spent:  # before the next row is fetched
            return


def split_text(parts: Callable[[], Iterator[tuple[int, str]]], val_fraction: float) -> Iterator[Chunk]:
    """Split the text of one file, as (number of the document, text).

    Validation starts at `val_fraction` before the end, or at the next line or document in the half after that.
    """
    size, first, end = measure_text(text for _, text in parts())
    border = int(size * (1 - val_fraction))
    if not first < border < end:  # one split would be white space
        border = first + int((end - first) * (1 - val_fraction))
    n_read, split = 0, "train"
    for number, text, starts, is_blank in mark_blank(parts()):
        follows = starts and number > 0
        if split == "train" and n_read + len(text) > border:
            cut = max(0, border - n_read)
            if cut > 0 or not follows:
                middle = (border + end) // 2 - n_read  # a later line would leave little to validate on, or nothing
                cut = text.find("\n", cut, middle) + 1 or cut
            if text[:cut]:
                yield Chunk(text[:cut], split, 0, 0, starts, follows, is_blank)
            if text[cut:]:
                yield Chunk(text[cut:], "val", 0, 0, True, follows and cut == 0, is_blank)
                split = "val"
        else:
            yield Chunk(text, split, 0, 0, starts, follows, is_blank)
        n_read += len(text)


def measure_text(chunks: Iterator[str]) -> tuple[int, int, int]:
    """Return a text's length and the range that remains without white space around it, in characters."""
    size, first, end = 0, None, 0
    for text in chunks:
        if inner := text.strip():
            end = size + len(text.rstrip())
            first = end - len(inner) if first is None else first
        size += len(text)
    return size, first or 0, end


def is_held_out(key: str, val_fraction: float) -> bool:
    """Return True if a document is for validation, by its key alone. A larger fraction holds out the same and more."""
    return hash_of(key) < val_fraction * 2**64


def hash_of(key: str) -> int:
    """Return a document's place among 2^64."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
