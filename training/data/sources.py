"""Readers of text: one class for each kind of source, and the table that maps a source's config to its reader."""

import json
import re
import sysconfig
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

from training.config import (
    AUTO_SPLIT,
    AVERAGE,
    SKIP_ENCODING,
    FilesSource,
    HuggingFaceSource,
    LimitConfig,
    RowsConfig,
    Section,
    SourceConfig,
    StdlibSource,
    TokensSource,
    canonical_encoding,
    chosen_name,
)
from training.data.chunks import Document, look_ahead, to_document
from training.data.dialogues import to_dialogue
from training.data.file_hashes import FileHashes
from training.data.find_files import SKIPPED_FOLDERS, TABLES, find_files, name_of_path, walk
from training.data.remote_files import RemoteFile
from training.data.row_files import FileOptions, Row, has_column, list_names, to_text
from training.data.text_files import format_of, is_plain_text, is_text_file, is_utf8, read_documents, read_rows
from training.data.token_source import TokensReader
from training.errors import UserError, library_error

VALIDATION = "validation"  # the name that `datasets` gives to a split of files such as valid.csv and dev.csv
ANSWER_COLUMNS = {"prompt_column", "completion_column", "messages_column"}


class Reader(Protocol):
    """A source of documents."""

    name: str  # in the logs, of letters, digits, `.`, `_` and `-`
    limit: LimitConfig | None  # of the first part that is read; set by `build_reader`

    def documents(self) -> Iterator[Document]:
        """Yield every document, in an order that depends only on the source. Called more than once."""

    def identity(self, hashes: FileHashes) -> Any:
        """Return JSON-able values that change whenever the documents change. The cache's key is a hash of them."""


class StdlibReader:
    """Python's standard library, one document per module. Its path decides the split, which is alike in all releases.

    Tests, installed packages and modules that were generated for this machine are left out.
    """

    def __init__(self, config: StdlibSource):
        self.name = config.name or "stdlib"
        self.options = FileOptions()
        root = Path(sysconfig.get_path("stdlib"))
        self.modules = {
            path.relative_to(root).as_posix(): path
            for path in walk(root, SKIPPED_FOLDERS | {"test", "tests", "idle_test"})
            if path.suffix == ".py" and not path.match("_sysconfigdata*") and not path.match("config-*/*")
        }
        if not self.modules:
            raise UserError(f"{root}: the standard library is not here as .py files; use another source")

    def documents(self) -> Iterator[Document]:
        for name, path in self.modules.items():
            yield from (document._replace(key=name) for document in read_documents(path, self.options))

    def identity(self, hashes: FileHashes) -> Any:
        return [(name, hashes.sha256(path)) for name, path in self.modules.items()]


class FilesReader:
    """Files on a disk or at URLs. A file listed by its own path must contain text; others may be empty."""

    def __init__(self, config: FilesSource):
        self.name = config.name or name_of_path(config.paths[0])
        self.config = config
        encoding = canonical_encoding(config.encoding)
        self.skips = encoding == SKIP_ENCODING
        column = config.messages_column or config.prompt_column or config.text_column
        self.options = FileOptions(column, "utf-8" if self.skips else encoding, config.split_on)
        self.patterns = config.paths
        self.paths, self.left_out = find_files(config.paths, self._reason_unwanted)
        self.not_utf8: dict[Path, bool] = {}  # of each file that `documents` has read, if it skips
        if config.split_on and not any(map(is_text_file, self.paths)):
            no_effect = (
                "split_on has no effect: it separates documents of .txt, .md and .py files, and here are only rows"
            )
            raise UserError(f"{', '.join(config.paths)}: {no_effect}")

    def documents(self) -> Iterator[Document]:
        for path, is_named in self.paths.items():
            if self.skips and self._is_not_utf8(path):
                continue
            is_blank = is_named
            for document in self._documents(path):
                if is_blank and document.dialogue is None:
                    is_blank, chunks = look_ahead(document.chunks)
                    document = document._replace(chunks=chunks)
                is_blank = is_blank and document.dialogue is None
                yield document
            if is_blank:
                raise no_text_error(path)
        if self.not_utf8 and all(map(self.not_utf8.get, self.paths)):
            raise UserError(
                f"{', '.join(self.patterns)}: no file is UTF-8; set encoding to the right one, such as cp1252"
            )

    def _is_not_utf8(self, path: Path) -> bool:
        """Return True if a file is not UTF-8. It is read to its end the first time, before any of it is used."""
        if path not in self.not_utf8:
            self.not_utf8[path] = not is_utf8(path)
        return self.not_utf8[path]

    def _reason_unwanted(self, path: Path) -> str | None:
        """Return why a file that a search found is not read; None if it is."""
        if self.config.has_answers and is_text_file(path):
            return f"{format_of(path)} file, which has no rows"
        if format_of(path) in TABLES and not has_column(path, self.options):
            names = ("messages_column", "prompt_column", "text_column")
            return f"{format_of(path)} file without the {next(name for name in names if getattr(self.config, name))}"
        return None

    def _documents(self, path: Path) -> Iterator[Document]:
        if self.config.has_answers:
            rows = read_rows(path, self.options._replace(column=None))
            return (to_answers(where, row, self.config) for where, row in rows)
        return read_documents(path, self.options)

    def identity(self, hashes: FileHashes) -> Any:
        files = [(format_of(path), content_of(path, hashes)) for path in self.paths]
        own = {"encoding": SKIP_ENCODING if self.skips else self.options.encoding, "split_on": self.options.split_on}
        own = {name: value for name, value in own.items() if value not in ("utf-8", None)}
        columns = answer_columns(self.config) or self.options.column
        return [columns, files, *([own] if own else [])]  # as it was before these options


def to_answers(where: str, row: Any, config: RowsConfig) -> Document:
    """Return a row as a document of which only the answers are learned. Raises UserError."""
    return Document(iter(()), dialogue=to_dialogue(row, config, where))


def answer_columns(config: RowsConfig) -> dict[str, str]:
    """Return the columns with answers, by option; {} if there are none, as in the cache keys of older versions."""
    columns = config.model_dump(include=ANSWER_COLUMNS)
    return {name: column for name, column in columns.items() if column is not None}


def content_of(path: Path | RemoteFile, hashes: FileHashes) -> str:
    """Return what changes with a file's content: its hash, or what its server tells."""
    return path.version if isinstance(path, RemoteFile) else hashes.sha256(path)


def stored_bytes(reader: Reader) -> int | None:
    """Return the bytes of the files that a source reads, which may be compressed; None if they are unknown."""
    paths = reader.paths if isinstance(reader, FilesReader) else getattr(reader, "modules", {}).values()
    is_known = paths and reader.limit is None
    return sum(path.stat().st_size for path in paths if path.exists()) if is_known else None


def plain_bytes(reader: Reader) -> int | None:
    """Return the bytes of a source's text if all of it is in plain text files, else None."""
    paths = reader.paths if isinstance(reader, FilesReader) else getattr(reader, "modules", {}).values()
    is_known = paths and all(map(is_plain_text, paths))
    return sum(path.stat().st_size for path in paths if path.exists()) if is_known else None


def no_text_error(path: Path) -> UserError:
    """Return the error for a named file without text."""
    return UserError(f"{path}: no text in this file: it is empty, or all white space")


class HuggingFaceReader:
    """A data set read with `datasets`, from the hub or from a local folder.

    A local folder is identified by its content, a data set on the hub by its name: later changes on the hub are not
    noticed. Delete the cached dataset to download it again.
    """

    def __init__(self, config: HuggingFaceSource):
        self.config = config
        self.folder = Path(config.name)
        self.name = name_of_path("-".join(filter(None, (config.name, config.config))))

    def identity(self, hashes: FileHashes) -> Any:
        names = ("type", "config", "split", "text_column")  # in the order of older versions' cache keys
        options = {name: getattr(self.config, name) for name in names} | answer_columns(self.config)
        if self.config.data_files:
            options["data_files"] = self.config.data_files
        if not self.folder.is_dir():
            return [self.config.name, options]
        return [options, [(p.relative_to(self.folder).as_posix(), hashes.sha256(p)) for p in walk(self.folder)]]

    def documents(self) -> Iterator[Document]:
        name, column = self.config.name, self.config.text_column
        for where, row in self.rows():
            if self.config.has_answers:
                yield to_answers(where, row, self.config)
                continue
            if column not in row:
                raise UserError(f"{name}: no column {column!r}; there are {list_names(row)} (option text_column)")
            yield to_document(to_text(row[column], column, where))

    def rows(self) -> Iterator[Row]:
        """Yield each row as plain data."""
        name, numbers = self.config.name, count()
        try:
            for batch in self._load().iter(batch_size=256):
                for values in zip(*batch.values(), strict=True):
                    yield f"{name}: row {next(numbers)}", dict(zip(batch, values, strict=True))
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{name}: cannot be read: {library_error(error.__cause__ or error)}") from None

    def validation_split(self) -> str | None:
        """Return the name of the split that is its validation text; None if it has none. May ask the hub.

        Raises UserError if there is no split of the name that was chosen, or the data set cannot be read.
        """
        wanted = self.config.val_split
        if wanted != AUTO_SPLIT:
            if wanted is not None and wanted not in (names := self._split_names()):
                raise UserError(f"{self.config.name}: no split {wanted!r}; there are {', '.join(names)} (val_split)")
            return wanted
        is_trained_on = VALIDATION in re.split(r"\W", self.config.split)  # such as train+validation[:50%]
        return None if is_trained_on or VALIDATION not in self._split_names() else VALIDATION

    def validation_reader(self, split: str) -> "HuggingFaceReader":
        """Return the reader of another split, which has the same limit."""
        reader = HuggingFaceReader(self.config.model_copy(update={"split": split, "val_split": None}))
        reader.limit = self.limit
        return reader

    def _split_names(self) -> list[str]:
        import datasets

        try:
            if self._is_saved():
                saved = self.folder / "dataset_dict.json"
                return json.loads(saved.read_bytes())["splits"] if saved.is_file() else []
            path, files = str(self.folder) if self.folder.is_dir() else self.config.name, self.config.data_files
            return datasets.get_dataset_split_names(path, self.config.config, data_files=list(files) or None)
        except Exception as error:
            reason = library_error(error.__cause__ or error)
            chosen = f" (data_files: {', '.join(self.config.data_files)})" if self.config.data_files else ""
            raise UserError(f"{self.config.name}: its splits cannot be listed: {reason}{chosen}") from None

    def _is_saved(self) -> bool:
        """Return True for a folder that `save_to_disk` wrote."""
        return any((self.folder / marker).is_file() for marker in ("state.json", "dataset_dict.json"))

    def _load(self) -> Any:
        import datasets

        name, split, files = self.config.name, self.config.split, list(self.config.data_files)
        if not self._is_saved():
            path = str(self.folder) if self.folder.is_dir() else name
            options = {"data_files": files} if files else {}
            streaming = self.config.streaming
            return datasets.load_dataset(path, self.config.config, split=split, streaming=streaming, **options)
        if files:
            raise UserError(f"{name}: data_files has no effect on a folder that `save_to_disk` wrote; use split")
        saved = datasets.load_from_disk(str(self.folder))
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise UserError(f"{name}: no split {split!r}; there are {', '.join(saved)} (option split)")
        return saved[split]


def drop_repeated_files(readers: list[Reader]) -> list[tuple[Path, Path]]:
    """Keep the first of several paths to one file. Returns (dropped, kept) paths; drops readers without files left.

    Paths differ by spelling, as links do. Rows of one file are other text in another column, and so is any file that
    is read with other options.
    """
    first: dict[tuple, tuple[FilesReader, Path]] = {}
    repeated = []
    for reader in (reader for reader in readers if isinstance(reader, FilesReader)):
        for path, is_named in list(reader.paths.items()):
            with suppress(OSError):  # a link to nothing: reading it is an error that names it
                status = path.stat()
                options = reader.options._replace(**{"column" if is_text_file(path) else "split_on": None})
                key = status.st_dev, status.st_ino, options, reader.limit
                keeper, kept = first.setdefault(key, (reader, path))
                if (keeper, kept) != (reader, path):
                    keeper.paths[kept] |= is_named
                    repeated.append((path, kept))
                    del reader.paths[path]
    readers[:] = [reader for reader in readers if not isinstance(reader, FilesReader) or reader.paths]
    return repeated


READERS: dict[type[Section], type[Reader | TokensReader]] = {
    StdlibSource: StdlibReader,
    FilesSource: FilesReader,
    HuggingFaceSource: HuggingFaceReader,
    TokensSource: TokensReader,
}


def build_reader(config: Section) -> Reader:
    """Build the reader of a source. Raises UserError if its files are missing."""
    reader = READERS[type(config)](config)
    reader.limit = getattr(config, "limit", None)
    return reader


def identity_of(reader: Reader, hashes: FileHashes) -> Any:
    """Return the reader's identity with its limit; without one as before there were limits."""
    identity = reader.identity(hashes)
    return identity if reader.limit is None else [identity, reader.limit.model_dump(exclude_none=True)]


def build_readers(sources: Sequence[SourceConfig]) -> list[Reader]:
    """Build the readers of all sources. A name that no option chose gets -2, -3, ... if another source has it."""
    readers = [build_reader(source) for source in sources]
    used_names = {AVERAGE, *map(chosen_name, sources)}
    for source, reader in zip(sources, readers, strict=True):
        if chosen_name(source) is None:
            reader.name = free_name(reader.name, used_names)
            used_names.add(reader.name)
    return readers


def free_name(name: str, used_names: Container[str | None]) -> str:
    """Return the name, or with -2, -3, ... after it if it is in use."""
    return next(each for each in chain([name], (f"{name}-{number}" for number in count(2))) if each not in used_names)
