"""Readers of text: one class for each kind of source, and the table that maps a source's config to its reader."""

import sysconfig
from collections.abc import Container, Iterator, Sequence
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

from training.config import AVERAGE, FilesSource, HuggingFaceSource, Section, SourceConfig, StdlibSource, chosen_name
from training.data.chunks import Document, look_ahead, to_document
from training.data.file_hashes import FileHashes
from training.data.find_files import SKIPPED_FOLDERS, find_files, name_of_path, walk
from training.data.row_files import Row, has_column, list_names, to_text
from training.data.text_files import format_of, is_plain_text, is_text_file, read_documents
from training.errors import UserError, library_error


class Reader(Protocol):
    """A source of documents."""

    name: str  # in the logs, of letters, digits, `.`, `_` and `-`

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
            yield from (document._replace(key=name) for document in read_documents(path, ""))

    def identity(self, hashes: FileHashes) -> Any:
        return [(name, hashes.sha256(path)) for name, path in self.modules.items()]


class FilesReader:
    """Local files. A file listed by its own path must contain text; files from folders and globs may be empty."""

    def __init__(self, config: FilesSource):
        self.name = config.name or name_of_path(config.paths[0])
        self.column = config.text_column
        self.patterns = config.paths
        self.paths, self.left_out = find_files(config.paths, lambda path: has_column(path, self.column))

    def documents(self) -> Iterator[Document]:
        for path, is_named in self.paths.items():
            is_blank = is_named
            for document in read_documents(path, self.column):
                if is_blank:
                    is_blank, chunks = look_ahead(document.chunks)
                    document = document._replace(chunks=chunks)
                yield document
            if is_blank:
                raise no_text_error(path)

    def identity(self, hashes: FileHashes) -> Any:
        return [self.column, [(format_of(path), hashes.sha256(path)) for path in self.paths]]


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
        options = self.config.model_dump(exclude={"name", "weight", "streaming"})
        if not self.folder.is_dir():
            return [self.config.name, options]
        return [options, [(p.relative_to(self.folder).as_posix(), hashes.sha256(p)) for p in walk(self.folder)]]

    def documents(self) -> Iterator[Document]:
        name, column = self.config.name, self.config.text_column
        for where, row in self.rows():
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

    def _load(self) -> Any:
        import datasets

        name, split = self.config.name, self.config.split
        if not any((self.folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            path = str(self.folder) if self.folder.is_dir() else name
            return datasets.load_dataset(path, self.config.config, split=split, streaming=self.config.streaming)
        saved = datasets.load_from_disk(str(self.folder))
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise UserError(f"{name}: no split {split!r}; there are {', '.join(saved)} (option split)")
        return saved[split]


def drop_repeated_files(readers: list[Reader]) -> list[tuple[Path, Path]]:
    """Keep the first of several paths to one file. Returns (dropped, kept) paths; drops readers without files left.

    Paths differ by spelling, as links do. Rows of one file are other text in another column.
    """
    first: dict[tuple[int, int, str], tuple[FilesReader, Path]] = {}
    repeated = []
    for reader in (reader for reader in readers if isinstance(reader, FilesReader)):
        for path, is_named in list(reader.paths.items()):
            with suppress(OSError):  # a link to nothing: reading it is an error that names it
                status = path.stat()
                key = status.st_dev, status.st_ino, "" if is_text_file(path) else reader.column
                keeper, kept = first.setdefault(key, (reader, path))
                if (keeper, kept) != (reader, path):
                    keeper.paths[kept] |= is_named
                    repeated.append((path, kept))
                    del reader.paths[path]
    readers[:] = [reader for reader in readers if not isinstance(reader, FilesReader) or reader.paths]
    return repeated


READERS: dict[type[Section], type[Reader]] = {
    StdlibSource: StdlibReader,
    FilesSource: FilesReader,
    HuggingFaceSource: HuggingFaceReader,
}


def build_reader(config: Section) -> Reader:
    """Build the reader of a source. Raises UserError if its files are missing."""
    return READERS[type(config)](config)


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
