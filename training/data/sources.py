"""Readers of text: one class for each kind of source, and the table that maps a source's config to its reader."""

import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from training.config import FilesSource, HuggingFaceSource, Section, StdlibSource
from training.data.chunks import Document, to_document
from training.data.file_hashes import FileHashes
from training.data.text_files import SKIPPED_FOLDERS, find_files, format_of, is_text_file, read_documents, to_text, walk
from training.errors import UserError, library_error


class Reader(Protocol):
    """A source of documents."""

    def documents(self) -> Iterator[Document]:
        """Yield every document, in an order that depends only on the source. Called more than once."""

    def identity(self, hashes: FileHashes) -> Any:
        """Return JSON-able values that change whenever the documents change. The cache's key is a hash of them."""


class StdlibReader:
    """Python's standard library, one document per module. Its path decides the split, which is alike in all releases.

    Tests, installed packages and modules that were generated for this machine are left out.
    """

    LEFT_OUT = SKIPPED_FOLDERS | {"test", "tests", "idle_test"}

    def __init__(self, _config: StdlibSource):
        self.root = Path(sysconfig.get_path("stdlib"))
        self.modules = [path for path in walk(self.root, self.LEFT_OUT) if self._is_module(path)]
        if not self.modules:
            raise UserError(f"{self.root}: the standard library is not here as .py files; use another source")

    def _is_module(self, path: Path) -> bool:
        is_generated = path.name.startswith("_sysconfigdata") or path.parent.name.startswith("config-")
        return path.suffix == ".py" and not is_generated

    def documents(self) -> Iterator[Document]:
        for path in self.modules:
            for document in read_documents(path, ""):
                yield document._replace(key=self._name(path))

    def identity(self, hashes: FileHashes) -> Any:
        return [(self._name(path), hashes.sha256(path)) for path in self.modules]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


class FilesReader:
    """Local files. A file listed by its own path must contain text; files from folders and globs may be empty."""

    def __init__(self, config: FilesSource):
        self.column = config.text_column
        self.paths = find_files(config.paths)

    def documents(self) -> Iterator[Document]:
        for path, is_named in self.paths.items():
            documents = read_documents(path, self.column)
            yield from _check_text(path, documents) if is_named else documents

    @property
    def single_text_file(self) -> Path | None:
        """The file, if this source is a single text file, and so a single document."""
        first = next(iter(self.paths))
        return first if len(self.paths) == 1 and is_text_file(first) else None

    def identity(self, hashes: FileHashes) -> Any:
        return [self.column, [(format_of(path), hashes.sha256(path)) for path in self.paths]]


def _check_text(path: Path, documents: Iterator[Document]) -> Iterator[Document]:
    """Yield the documents. Raises UserError at the end if all are blank."""
    is_blank = True
    for document in documents:
        first = next(document.chunks)
        is_blank = is_blank and not first.strip()
        yield document._replace(chunks=chain([first], document.chunks))
    if is_blank:
        raise no_text_error(path)


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
        self.folder = Path(config.name).expanduser()

    def identity(self, hashes: FileHashes) -> Any:
        options = self.config.model_dump(exclude={"name", "weight", "streaming"})
        if not self.folder.is_dir():
            return [self.config.name, options]
        return [
            options,
            [(p.relative_to(self.folder).as_posix(), hashes.sha256(p)) for p in walk(self.folder)],
        ]

    def documents(self) -> Iterator[Document]:
        name, column, row = self.config.name, self.config.text_column, 0
        for batch in self._batches():
            if column not in batch:
                raise UserError(f"{name}: no column {column!r}; there are {', '.join(batch)} (option text_column)")
            for value in batch[column]:
                yield to_document(to_text(value, column, f"{name}: row {row}"))
                row += 1

    def _batches(self) -> Iterator[dict[str, list]]:
        try:
            yield from self._load().iter(batch_size=256)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.config.name}: cannot be read: {library_error(error.__cause__ or error)}") from None

    def _load(self) -> Any:
        import datasets

        name, split = self.config.name, self.config.split
        if not any((self.folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            path = str(self.folder) if self.folder.is_dir() else name
            return datasets.load_dataset(path, self.config.config, split=split, streaming=self.config.streaming)
        saved = datasets.load_from_disk(str(self.folder))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise UserError(f"{name}: no split {split!r}; there are {', '.join(saved)} (option split)")
            return saved[split]
        return saved


READERS: dict[type[Section], type[Reader]] = {
    StdlibSource: StdlibReader,
    FilesSource: FilesReader,
    HuggingFaceSource: HuggingFaceReader,
}


def build_reader(config: Section) -> Reader:
    """Build the reader of a source. Raises UserError if its files are missing."""
    return READERS[type(config)](config)
