"""Local text files: find them by path, folder or glob, decompress them, read them document by document."""

import bz2
import glob
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from training.data.chunks import Document, decode_utf8, split_into_chunks, to_document
from training.errors import UserError

SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages"})
MAX_LINE_BYTES = 2**26  # of .jsonl, because a whole line is in memory


def walk(folder: Path, skip: frozenset[str] = SKIPPED_FOLDERS) -> Iterator[Path]:
    """Yield every file below a folder, sorted by path, without hidden files and folders and those named in `skip`."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in skip and not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def format_of(path: Path) -> str:
    """Return the extension that names the format, without the compression's: `.jsonl` of `a.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in OPENERS and suffixes[-2] != ".parquet":
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def find_files(patterns: Iterable[str]) -> dict[Path, bool]:
    """Return the files of paths, folders and globs, each once; True: by its own path. Raises UserError for none."""
    files: dict[Path, bool] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_file():
            if format_of(path) not in FORMATS:
                raise UserError(f"{path}: no usable file: its name does not end in {EXTENSIONS}")
            files[path] = True
        elif matches := sorted(search(path)):
            files |= {match: False for match in matches if match not in files}
        elif path.is_dir():
            raise UserError(f"{pattern}: no usable file in this folder: no name ends in {EXTENSIONS}")
        elif glob.has_magic(str(path)):
            raise UserError(f"{pattern}: the glob matches no usable file (names that end in {EXTENSIONS})")
        else:
            raise UserError(f"{pattern}: no such file or folder")
    return files


def search(path: Path) -> Iterator[Path]:
    """Yield the usable files below a folder, or those that a glob matches, also below folders that it matches."""
    matches = [path] if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))  # noqa: PTH207 (it may be absolute)
    for match in matches:
        yield from (file for file in (walk(match) if match.is_dir() else [match]) if format_of(file) in FORMATS)


def _open_zstd(path: Path, _mode: str) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))


OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}


@contextmanager
def open_decompressed(path: Path) -> Iterator[BinaryIO]:
    """Open a file's decompressed bytes. Raises UserError, also while they are read, if it cannot be read to its end."""
    try:
        with OPENERS.get(path.suffix.lower(), Path.open)(path, "rb") as file:
            yield file
    except EOFError:
        raise UserError(f"{path}: cut short: the compressed data end in the middle") from None
    except (OSError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def read_text(path: Path, _column: str) -> Iterator[Document]:
    """Yield a text file as one document. A .txt may be a dump of many."""

    def chunks() -> Iterator[str]:
        with open_decompressed(path) as file:
            yield from split_into_chunks(decode_utf8(file, str(path)))

    yield Document(chunks(), is_dump=format_of(path) == ".txt")


def read_jsonl(path: Path, column: str) -> Iterator[Document]:
    """Yield a document for each line that is not blank."""
    with open_decompressed(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), 1):
            if len(line) > MAX_LINE_BYTES:
                limit = f"{MAX_LINE_BYTES >> 20} MiB"
                raise UserError(f"{path}: line {number} is longer than {limit}, the limit for one document")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield to_document(_parse_line(line, column, f"{path}: line {number}"))


def _parse_line(line: bytes, column: str, where: str) -> str:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start} of the line is not UTF-8 ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        hint = "" if line.endswith(b"\n") else "; it is the last line: was it cut short?"
        raise UserError(f"{where}: not JSON ({error}){hint}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, not an object with a {column!r}")
    if column not in row:
        raise UserError(f"{where}: no column {column!r}; there are {', '.join(row) or 'none'} (option text_column)")
    return to_text(row[column], column, where)


def read_parquet(path: Path, column: str) -> Iterator[Document]:
    """Yield a document for each row."""
    import pyarrow
    from pyarrow import parquet

    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path}: no column {column!r}; there are {names} (option text_column)")
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0):
                    yield to_document(to_text(value.as_py(), column, f"{path}: row {row}"))
                    row += 1
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: row {row}: cannot be read: {str(error).splitlines()[0]}") from None


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


FORMATS = {".txt": read_text, ".md": read_text, ".py": read_text, ".jsonl": read_jsonl, ".parquet": read_parquet}
EXTENSIONS = ", ".join(FORMATS) + " (each but .parquet also with " + ", ".join(OPENERS) + ")"


def read_documents(path: Path, column: str) -> Iterator[Document]:
    """Return the documents of a file in one of FORMATS."""
    return FORMATS[format_of(path)](path, column)


def is_text_file(path: Path) -> bool:
    """Return True if the file is one document, not rows of documents."""
    return FORMATS[format_of(path)] is read_text
