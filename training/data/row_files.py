"""Files of rows: JSON lines, JSON arrays, CSV, TSV and Parquet, read row by row."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from training.data.chunks import ENCODING_ADVICE
from training.data.decompress import open_utf8
from training.errors import UserError

MAX_LINE_BYTES = 2**26  # of .jsonl and of a row of .csv, because a whole one is in memory
MAX_NAMES = 10  # columns that an error lists
MAX_NAME_CHARS = 40
MAX_BATCH_ROWS = 256  # of .parquet, in memory at a time
MAX_BATCH_BYTES = 2**30
MAX_PARQUET_RATIO = 200  # text shrinks 3 to 50 times; a page that shrinks more is checked against MAX_PAGE_BYTES
MAX_PAGE_BYTES = 2**28
BOM = b"\xef\xbb\xbf"

Row = tuple[str, Any]  # where it is, for errors, and its value


class FileOptions(NamedTuple):
    """How the files of a source are read."""

    column: str | None = None  # of rows, which holds the text; None: all columns
    encoding: str = "utf-8"
    split_on: str | None = None  # between the documents of text files
    on_read: Callable[[int], object] | None = None  # called with the bytes that are read, before decompression


def jsonl_rows(path: Path, options: FileOptions) -> Iterator[Row]:
    """Yield the value of each line that is not blank."""
    with open_utf8(path, options.encoding, options.on_read) as file:
        yield from _read_lines(file, path)


def json_rows(path: Path, options: FileOptions) -> Iterator[Row]:
    """Yield each value of an array, or that of each line that is not blank."""
    with open_utf8(path, options.encoding, options.on_read) as file:
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
        return json.loads(_decode(data, where, part))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}){hint}") from None


def _decode(data: bytes, where: str, part: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        problem = f"byte {error.start}{part} is not UTF-8 ({error.reason})"
        raise UserError(f"{where}: {problem}; {ENCODING_ADVICE}") from None


def text_of(row: Any, column: str, where: str) -> str:
    """Return the text of a row's column. Raises UserError if there is none."""
    return to_text(value_of(row, column, where), column, where)


def value_of(row: Any, column: str, where: str, option: str = "text_column") -> Any:
    """Return a row's value. Raises UserError if the row has no columns, or not this one."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a JSON {type(row).__name__}, not an object with a {column!r}")
    if column not in row:
        raise UserError(f"{where}: no column {column!r}; there are {list_names(row)} (option {option})")
    return row[column]


def list_names(columns: Iterable[str]) -> str:
    """Return the names of columns for an error: without a header row, a first row of long texts is taken for names."""
    names = [name if len(name) <= MAX_NAME_CHARS else name[:MAX_NAME_CHARS] + "..." for name in map(str, columns)]
    return ", ".join([*names[:MAX_NAMES], *["..."] * (len(names) > MAX_NAMES)]) or "none"


def csv_rows(path: Path, options: FileOptions) -> Iterator[Row]:
    """Yield each row after the header row, as texts by column. Raises UserError if it lacks `options.column`.

    A quoted field may hold separators, line ends and doubled quotes. Rows count from 1, without the header.
    """
    column = options.column
    with open_utf8(path, options.encoding, options.on_read) as file:
        records = _read_records(file, path)
        where, names = next(records, (f"{path}: line 1", []))
        if names and column is not None and column not in names:
            hint = "; the first row must name the columns"
            raise UserError(f"{where}: no column {column!r}; there are {list_names(names)} (option text_column){hint}")
        if repeated := sorted({name for name in names if name and names.count(name) > 1}):
            raise UserError(f"{where}: two columns have the name {repeated[0]!r}; rename one")
        for number, (where, fields) in enumerate(records, 1):
            place = f"{path}: row {number} ({where.removeprefix(f'{path}: ')})"
            if len(fields) != len(names):
                raise UserError(f"{place}: {len(fields)} fields, but the header row has {len(names)}")
            yield place, dict(zip(names, fields, strict=True))


def has_column(path: Path, options: FileOptions) -> bool:
    """Return True if a .csv or .tsv file has a header row with `options.column`."""
    try:
        next(csv_rows(path, options), None)
    except UserError:
        return False
    return True


def _read_records(file: io.BufferedReader, path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield (place, fields) of each record that is not a blank line, the header first."""
    n_lines, n_bytes, first = 0, 0, 1

    def lines() -> Iterator[str]:
        nonlocal n_lines, n_bytes
        while line := file.readline(MAX_LINE_BYTES + 1):
            n_lines, n_bytes = n_lines + 1, n_bytes + len(line)
            if n_bytes > MAX_LINE_BYTES:
                limit = f"{MAX_LINE_BYTES >> 20} MiB, the limit for one row"
                raise UserError(f"{path}: line {first}: the row is longer than {limit}; is a quote not closed?")
            if b"\0" in line:
                raise UserError(f"{path}: line {n_lines}: byte {line.index(0)} of the line is NUL: this is not text")
            yield _decode(line.removeprefix(BOM) if n_lines == 1 else line, f"{path}: line {n_lines}", " of the line")

    csv.field_size_limit(MAX_LINE_BYTES)  # of the process; its default of 131,072 characters is less than a document
    records = csv.reader(lines(), delimiter="\t" if ".tsv" in path.suffixes[-2:] else ",", strict=True)
    while True:
        first, n_bytes = n_lines + 1, 0
        try:
            if (fields := next(records, None)) is None:
                return
        except csv.Error as error:
            raise UserError(f"{path}: line {first}: the row cannot be read ({error})") from None
        if fields:
            yield f"{path}: line {first}", fields


def parquet_rows(path: Path, options: FileOptions) -> Iterator[Row]:
    """Yield each row with all of its columns, or with `options.column` only. Reads only these."""
    import pyarrow
    from pyarrow import parquet

    number, column = 0, options.column
    try:
        with path.open("rb") as content, parquet.ParquetFile(content) as file:
            names = file.schema_arrow.names
            if column is not None and column not in names:
                raise UserError(f"{path}: no column {column!r}; there are {list_names(names)} (option text_column)")
            columns = names if column is None else [column]
            size = min((batch_rows(path, file.metadata, name) for name in columns), default=1)
            for batch in file.iter_batches(batch_size=size, columns=columns):
                if options.on_read is not None:
                    options.on_read(path.stat().st_size * batch.num_rows // max(1, file.metadata.num_rows))
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


# Functions of (path, options). With `options.column` they may leave out the other columns.
ROWS = {
    ".jsonl": jsonl_rows,
    ".parquet": parquet_rows,
    ".ndjson": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
}
