"""Local text files: find them by path, folder or glob, and read them document by document."""

import glob
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from training.data.chunks import Document, decode_utf8, split_into_chunks, to_document
from training.data.decompress import DECOMPRESSORS, open_decompressed
from training.errors import UserError

BYTECODE = "__pycache__"  # compiled code, which nobody expects to be read
SKIPPED_FOLDERS = frozenset({BYTECODE, "site-packages", "dist-packages"})
ONLY_BY_NAME = ".json"  # folders of code have .json files that hold no text
MAX_LINE_BYTES = 2**26  # of .jsonl, because a whole line is in memory
MAX_BATCH_ROWS = 256  # of .parquet, in memory at a time
MAX_BATCH_BYTES = 2**30
MAX_PARQUET_RATIO = 200  # text shrinks 3 to 50 times; a page that shrinks more is checked against MAX_PAGE_BYTES
MAX_PAGE_BYTES = 2**28
BOM = b"\xef\xbb\xbf"

Row = tuple[str, Any]  # where it is, for errors, and its value
LeftOut = dict[Path, str]  # files and folders that a search did not use, and their kind


def walk(folder: Path, skip: frozenset[str] = SKIPPED_FOLDERS, left_out: LeftOut | None = None) -> Iterator[Path]:
    """Yield every file below a folder in a fixed order, without hidden ones and folders named in `skip`.

    Follows links, and enters each folder once. Raises UserError for a folder that cannot be read.
    """
    left_out = {} if left_out is None else left_out
    for parent, names in walk_folders(folder, skip, left_out):
        for name in names:
            if name.startswith("."):
                left_out[parent / name] = "hidden file"
            else:
                yield parent / name


def walk_folders(folder: Path, skip: frozenset[str], left_out: LeftOut) -> Iterator[tuple[Path, list[str]]]:
    """Yield (folder, names of its files) for a folder and all below it, as `walk` enters them."""
    entered = set()
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        status = Path(parent).stat()
        if (inode := (status.st_dev, status.st_ino)) in entered:
            folders.clear()
            continue
        entered.add(inode)
        skipped = {name for name in folders if name in skip or name.startswith(".")}
        left_out |= {Path(parent, name): f"{name} folder" for name in skipped - {BYTECODE}}
        folders[:] = sorted(set(folders) - skipped)
        yield Path(parent), sorted(names)


def _raise_unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: this folder cannot be read: {error.strerror}") from None


def format_of(path: Path) -> str:
    """Return the extension that names the format, without the compression's: `.jsonl` of `a.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in DECOMPRESSORS and suffixes[-2] != ".parquet":
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def find_files(patterns: Iterable[str]) -> tuple[dict[Path, bool], LeftOut]:
    """Return the files of paths, folders and globs, each once (True: by its own path), and what a search left out.

    Raises UserError for a path, folder or glob without a usable file.
    """
    files: dict[Path, bool] = {}
    left_out: LeftOut = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_file():
            if format_of(path) not in FORMATS:
                raise UserError(f"{path}: no usable file: its name does not end in {EXTENSIONS}")
            files[path] = True
        elif matches := sorted(search(path, left_out)):
            files |= {match: False for match in matches if match not in files}
        elif path.is_dir():
            raise UserError(f"{pattern}: no usable file in this folder: no name ends in {EXTENSIONS}")
        elif path.exists():
            raise UserError(f"{pattern}: not a file but a pipe or a device; write its text to a file first")
        elif glob.has_magic(str(path)):
            raise UserError(f"{pattern}: the glob matches no usable file (names that end in {EXTENSIONS})")
        else:
            raise UserError(f"{pattern}: no such file or folder")
    return files, {path: kind for path, kind in left_out.items() if path not in files}


def name_of_path(path: str) -> str:
    """Return a name for text at this path: its last part that is no pattern, in letters, digits, `.`, `_` and `-`."""
    parts = [part for part in Path(path).parts if not set(part) & set("*?[")]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", parts[-1] if parts else "")[:64].strip("-._") or "files"


def search(path: Path, left_out: LeftOut) -> Iterator[Path]:
    """Yield the usable files below a folder, or those that a glob matches, also below folders that it matches."""
    if not path.is_dir():
        _check_listable(path)
    for match in [path] if path.is_dir() else expand_glob(path):
        is_folder = match.is_dir()
        for file in walk(match, left_out=left_out) if is_folder else [match]:
            name = format_of(file)
            if name in FORMATS and not (is_folder and name == ONLY_BY_NAME):
                yield file
            else:
                left_out[file] = f"{name} file" if name else "file without an extension"


def expand_glob(pattern: Path) -> Iterator[Path]:
    """Yield what a glob matches. `**` enters each folder once, where `glob.glob` follows links in circles."""
    parts = pattern.parts
    if "**" not in parts:
        yield from map(Path, glob.glob(str(pattern)))  # noqa: PTH207 (it may be absolute)
        return
    first = parts.index("**")
    rest = parts[first + 1 :]
    for root in filter(Path.is_dir, expand_glob(Path(*parts[:first]))):
        for folder, names in walk_folders(root, skip=frozenset(), left_out={}):
            if rest:
                yield from expand_glob(Path(glob.escape(str(folder)), *rest))
            else:
                yield from (folder / name for name in names if not name.startswith("."))


def _check_listable(pattern: Path) -> None:
    """Raise UserError if a folder that a glob searches cannot be read: `glob` takes it for an empty one."""
    for path in (pattern, *pattern.parents):
        if glob.has_magic(str(path)):
            for folder in filter(Path.is_dir, expand_glob(path.parent)):
                try:
                    os.scandir(folder).close()
                except OSError as error:
                    _raise_unreadable(error)


def read_text(path: Path, _column: str) -> Iterator[Document]:
    """Yield a text file as one document. A .txt may be a dump of many."""

    def chunks() -> Iterator[str]:
        with open_decompressed(path) as file:
            yield from split_into_chunks(decode_utf8(file, str(path)))

    yield Document(chunks(), is_dump=format_of(path) == ".txt")


def jsonl_rows(path: Path, _column: str | None = None) -> Iterator[Row]:
    """Yield the value of each line that is not blank."""
    with open_decompressed(path) as file:
        yield from _read_lines(file, path)


def json_rows(path: Path, _column: str | None = None) -> Iterator[Row]:
    """Yield each value of an array, or that of each line that is not blank."""
    with open_decompressed(path) as file:
        if not file.peek().removeprefix(BOM).lstrip().startswith(b"["):
            yield from _read_lines(file, path)
            return
        array = file.read(MAX_LINE_BYTES + 1)
        if len(array) > MAX_LINE_BYTES:
            limit = f"longer than {MAX_LINE_BYTES >> 20} MiB, the limit for an array"
            raise UserError(f"{path}: {limit}; write a .jsonl with one object per line (jq -c '.[]')")
        for number, row in enumerate(_parse(array.removeprefix(BOM), str(path))):
            yield f"{path}: item {number}", row


def _read_lines(file: io.BufferedReader, path: Path) -> Iterator[Row]:
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
        if len(line) > MAX_LINE_BYTES:
            limit = f"{MAX_LINE_BYTES >> 20} MiB"
            raise UserError(f"{path}: line {number} is longer than {limit}, the limit for one document")
        if number == 1:
            line = line.removeprefix(BOM)
        if line.strip():
            where = f"{path}: line {number}"
            hint = "" if line.endswith(b"\n") else "; it is the last line: was it cut short?"
            yield where, _parse(line, where, " of the line", hint)


def _parse(data: bytes, where: str, part: str = "", hint: str = "") -> Any:
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start}{part} is not UTF-8 ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}){hint}") from None


def _text_of(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, not an object with a {column!r}")
    if column not in row:
        raise UserError(f"{where}: no column {column!r}; there are {', '.join(row) or 'none'} (option text_column)")
    return to_text(row[column], column, where)


def parquet_rows(path: Path, column: str | None = None) -> Iterator[Row]:
    """Yield each row with all of its columns, or with one of them. Reads only these."""
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column is not None and column not in names:
                raise UserError(f"{path}: no column {column!r}; there are {', '.join(names)} (option text_column)")
            columns = names if column is None else [column]
            size = min((batch_rows(path, file.metadata, name) for name in columns), default=1)
            for batch in file.iter_batches(batch_size=size, columns=columns):
                for values in zip(*batch.columns, strict=True):
                    row = {name: value.as_py() for name, value in zip(columns, values, strict=True)}
                    yield f"{path}: row {number}", row
                    number += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: row {number}: cannot be read: {str(error).splitlines()[0]}") from None


def batch_rows(path: Path, metadata: Any, column: str) -> int:
    """Return how many rows fit into MAX_BATCH_BYTES at worst. Raises UserError for a page that would fill memory.

    A row is at most as long as all of its row group's column on disk, before compression: a dictionary's entry is
    stored once.
    """
    largest = 1
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        parts = [group.column(j) for j in range(group.num_columns)]
        parts = [part for part in parts if part.path_in_schema.split(".")[0] == column]
        size = sum(part.total_uncompressed_size for part in parts)
        compressed = sum(part.total_compressed_size for part in parts)
        if size > MAX_PAGE_BYTES and size > MAX_PARQUET_RATIO * compressed:
            sizes = f"{compressed:,} bytes unpack to {size:,}"
            raise UserError(f"{path}: row group {i}: {sizes}, too many for text; write it in smaller row groups")
        largest = max(largest, size)
    return min(max(MAX_BATCH_BYTES // largest, 1), MAX_BATCH_ROWS)


def to_text(value: Any, column: str, where: str) -> str:
    """Return the text of a row's column, "" for null. Raises UserError for anything but text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"{where}: {column!r} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {column!r} is not Unicode text (character {error.start}: {error.reason})") from None
    return value


# Functions of (path, column). With a column they may leave out the others.
ROWS = {".jsonl": jsonl_rows, ".parquet": parquet_rows, ".ndjson": jsonl_rows, ".json": json_rows}


def read_column(path: Path, column: str) -> Iterator[Document]:
    """Yield a document for each row of a file in one of ROWS."""
    for where, row in ROWS[format_of(path)](path, column):
        yield to_document(_text_of(row, column, where))


FORMATS = {
    ".txt": read_text,
    ".md": read_text,
    ".py": read_text,
    **dict.fromkeys(ROWS, read_column),
}
EXTENSIONS = ", ".join(FORMATS) + " (each but .parquet also with " + ", ".join(DECOMPRESSORS) + ")"


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a file as plain data. Raises UserError for a file without rows, or one that cannot be read."""
    if is_text_file(path):
        raise UserError(f"{path}: rows are in .jsonl, .ndjson, .json or .parquet files")
    yield from ROWS[format_of(path)](path)


def read_documents(path: Path, column: str) -> Iterator[Document]:
    """Return the documents of a file in one of FORMATS."""
    return FORMATS[format_of(path)](path, column)


def is_text_file(path: Path) -> bool:
    """Return True if the file is one document, not rows of documents."""
    return FORMATS[format_of(path)] is read_text


def is_plain_text(path: Path) -> bool:
    """Return True if the file's bytes are one document's."""
    return path.suffix.lower() not in DECOMPRESSORS and is_text_file(path)
