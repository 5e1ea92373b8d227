"""Where text comes from: one class a kind of source, and the dict that says which answers for which.

A reader has two methods. `documents()` yields every document in an order that depends on nothing but the
source; it is called more than once. `identity(hashes)` is JSON-able and differs where the documents do:
it decides whether text that was tokenized before can be used again.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

from training.config import FilesSource, HuggingFaceSource, Section, StdlibSource
from training.data.chunks import Document, document
from training.data.file_hashes import FileHashes
from training.data.text_files import (
    FORMATS,
    SKIPPED_FOLDERS,
    find_files,
    format_of,
    read_documents,
    read_text,
    text_of,
    walk,
)
from training.errors import UserError


class Reader(Protocol):
    """What a source must answer."""

    def documents(self) -> Iterator[Document]: ...

    def identity(self, hashes: FileHashes) -> Any: ...


class Stdlib:
    """Python's standard library: a module is a document, held out by its path and so alike in every release.

    Left out: tests, installed packages, and the modules that were generated for this one machine.
    """

    LEFT_OUT = SKIPPED_FOLDERS | {"test", "tests", "idle_test"}

    def __init__(self, _config: StdlibSource):
        self.root = Path(sysconfig.get_path("stdlib"))
        self.modules = [path for path in walk(self.root, self.LEFT_OUT) if self._is_module(path)]
        if not self.modules:
            raise UserError(f"{self.root}: the standard library is not here as .py files; use another source")

    def _is_module(self, path: Path) -> bool:
        generated = path.name.startswith("_sysconfigdata") or path.parent.name.startswith("config-")
        return path.suffix == ".py" and not generated

    def documents(self) -> Iterator[Document]:
        for path in self.modules:
            for each in read_documents(path, ""):
                yield Document(each.chunks, key=self._name(path))

    def identity(self, hashes: FileHashes) -> Any:
        return [(self._name(path), hashes.sha256(path)) for path in self.modules]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


class Files:
    """Local files. One that is named by itself must hold text; one that was searched for may be empty."""

    def __init__(self, config: FilesSource):
        self.column = config.text_column
        self.paths = find_files(config.paths)

    def documents(self) -> Iterator[Document]:
        for path, named in self.paths.items():
            yield from (
                _holding_text(path, read_documents(path, self.column)) if named else read_documents(path, self.column)
            )

    @property
    def single_text_file(self) -> Path | None:
        """The file, where this is a single text file, and so a single document."""
        first = next(iter(self.paths))
        return first if len(self.paths) == 1 and FORMATS[format_of(first)] is read_text else None

    def identity(self, hashes: FileHashes) -> Any:
        return [self.column, [(format_of(path), hashes.sha256(path)) for path in self.paths]]


def _holding_text(path: Path, documents: Iterator[Document]) -> Iterator[Document]:
    """The documents, checked to hold one character that is not white space."""
    blank = True
    for each in documents:
        first = next(each.chunks)
        blank = blank and not first.strip()
        yield Document(chain([first], each.chunks), each.key)
    if blank:
        raise no_text_error(path)


def no_text_error(path: Path) -> UserError:
    """What is said of a file that was named by itself."""
    return UserError(f"{path}: no text in this file: it is empty, or all white space")


class HuggingFace:
    """A data set read with `datasets`, from the hub or from a local folder.

    A local folder is known by its content. A data set on the hub is known by its name: it is fetched once,
    and the shards stay what they were; delete their folder to fetch it again.
    """

    def __init__(self, config: HuggingFaceSource):
        self.config = config
        self.folder = Path(config.name).expanduser()

    def identity(self, hashes: FileHashes) -> Any:
        asked = self.config.model_dump(exclude={"name", "weight", "streaming"})
        if not self.folder.is_dir():
            return [self.config.name, asked]
        return [asked, [(p.relative_to(self.folder).as_posix(), hashes.sha256(p)) for p in walk(self.folder)]]

    def documents(self) -> Iterator[Document]:
        name, column, row = self.config.name, self.config.text_column, 0
        for batch in self._batches():
            if column not in batch:
                raise UserError(f"{name}: no column {column!r}; there are {', '.join(batch)} (option text_column)")
            for value in batch[column]:
                yield document(text_of(value, column, f"{name}: row {row}"))
                row += 1

    def _batches(self) -> Iterator[dict[str, list]]:
        try:
            yield from self._load().iter(batch_size=256)
        except UserError:
            raise
        except Exception as error:  # `datasets` raises whatever its readers and the network do
            cause = error.__cause__ or error
            reason = (str(cause).strip() or "no reason given").splitlines()[0]
            raise UserError(f"{self.config.name}: cannot be read: {type(cause).__name__}: {reason}") from None

    def _load(self) -> Any:
        import datasets

        name, split = self.config.name, self.config.split
        if not any((self.folder / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
            path = str(self.folder) if self.folder.is_dir() else name
            return datasets.load_dataset(path, self.config.config, split=split, streaming=self.config.streaming)
        saved = datasets.load_from_disk(str(self.folder))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise UserError(f"{name}: no split {split!r}; there are {', '.join(saved)} (option split)")
            return saved[split]
        return saved


READERS: dict[type[Section], type[Reader]] = {
    StdlibSource: Stdlib,
    FilesSource: Files,
    HuggingFaceSource: HuggingFace,
}


def build_reader(config: Section) -> Reader:
    """The reader that answers for a source. Raises UserError where its files are missing."""
    return READERS[type(config)](config)
