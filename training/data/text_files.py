"""Local text files in every format, read document by document."""

from collections.abc import Iterator
from pathlib import Path

from training.data.chunks import Document, NotUTF8Error, decode_utf8, split_into_chunks, to_document
from training.data.decompress import DECOMPRESSORS, open_decompressed, open_utf8
from training.data.row_files import ROWS, FileOptions, Row, text_of
from training.errors import UserError


def format_of(path: Path) -> str:
    """Return the extension that names the format, without the compression's: `.jsonl` of `a.jsonl.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in DECOMPRESSORS and suffixes[-2] != ".parquet":
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def read_text(path: Path, options: FileOptions) -> Iterator[Document]:
    """Yield a text file as one document. A .txt may be a dump of many, any file one with `options.split_on`."""

    def chunks() -> Iterator[str]:
        with open_utf8(path, options.encoding, options.on_read) as file:
            yield from split_into_chunks(decode_utf8(file, str(path)))

    yield Document(chunks(), is_dump=format_of(path) == ".txt", split_on=options.split_on)


def read_column(path: Path, options: FileOptions) -> Iterator[Document]:
    """Yield a document for each row of a file in one of ROWS."""
    for where, row in ROWS[format_of(path)](path, options):
        yield to_document(text_of(row, options.column, where))


FORMATS = {
    ".txt": read_text,
    ".md": read_text,
    ".py": read_text,
    **dict.fromkeys(ROWS, read_column),
}
EXTENSIONS = ", ".join(FORMATS) + " (each but .parquet also with " + ", ".join(DECOMPRESSORS) + ")"


def read_rows(path: Path, options: FileOptions | None = None) -> Iterator[Row]:
    """Yield the rows of a file as plain data. Raises UserError for a file without rows, or one that cannot be read."""
    if is_text_file(path):
        raise UserError(f"{path}: rows are in .jsonl, .ndjson, .json, .csv, .tsv or .parquet files")
    yield from ROWS[format_of(path)](path, options or FileOptions())


def read_documents(path: Path, options: FileOptions) -> Iterator[Document]:
    """Return the documents of a file in one of FORMATS."""
    return FORMATS[format_of(path)](path, options)


def is_utf8(path: Path) -> bool:
    """Return True if all of a file's text is UTF-8. Raises UserError if it cannot be read to its end."""
    if format_of(path) == ".parquet":
        return True
    try:
        with open_decompressed(path) as file:
            for _ in decode_utf8(file, str(path)):
                pass
    except NotUTF8Error:
        return False
    return True


def is_text_file(path: Path) -> bool:
    """Return True if the file is one document, not rows of documents."""
    return FORMATS[format_of(path)] is read_text


def is_plain_text(path: Path) -> bool:
    """Return True if the file's bytes are one document's."""
    return path.suffix.lower() not in DECOMPRESSORS and is_text_file(path)
