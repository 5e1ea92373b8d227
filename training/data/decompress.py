"""Decompressed bytes of .gz, .bz2, .xz and .zst files, read to their end or not at all, and text of other encodings.

The standard library's `bz2.open` and `lzma.open` take damage in a later stream of a file for its end, and
`zstandard`'s reader takes a cut frame for a whole one. Here both are errors.
"""

import bz2
import codecs
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import UserError

BLOCK_BYTES = 2**12  # compressed bytes at a time, which unpack to 128 MiB at most (zstd: 4 bytes to 128 KiB)
TRANSCODED_BYTES = 2**16
COUNTED_BYTES = 2**17
MAX_ZSTD_WINDOW = 2**31  # of `zstd --long=31`, the largest that the tool writes


def _new_zstd_stream() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW).decompressobj()


# By extension: a function that returns a decompressor of one stream, with `decompress`, `eof` and `unused_data`.
DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    ".zst": _new_zstd_stream,
}


class CountedFile(io.RawIOBase):
    """The bytes of a file, whose number is reported as they are read."""

    def __init__(self, file: io.BufferedReader, on_read: Callable[[int], object]):
        self.file, self.on_read = file, on_read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self.file.readinto(buffer)
        self.on_read(n)
        return n


class DecompressedFile(io.RawIOBase):
    """The bytes of all streams of a compressed file, one after another. Zeros between streams are padding.

    Raises UserError for damage anywhere, and if the last stream is cut short.
    """

    def __init__(self, path: Path, file: io.BufferedReader):
        self.path, self.file = path, file
        self.new_stream = DECOMPRESSORS[path.suffix.lower()]
        self.stream = self.new_stream()
        self.output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.output:
            compressed = self._next_compressed()
            if not compressed:
                return 0
            try:
                self.output = memoryview(self.stream.decompress(compressed))
            except MemoryError:
                raise
            except Exception as error:  # each library has its own class
                reason = f"damaged, or not a {self.path.suffix} file ({error})"
                raise UserError(f"{self.path}: cannot be read: {reason}") from None
        n = min(len(buffer), len(self.output))
        buffer[:n], self.output = self.output[:n], self.output[n:]
        return n

    def _next_compressed(self) -> bytes:
        """Return the next bytes of the stream, or the first of the next stream; b"" after the last."""
        if not self.stream.eof:
            if not (compressed := self.file.read(BLOCK_BYTES)):
                raise UserError(f"{self.path}: cut short: the compressed data end in the middle")
            return compressed
        compressed = self.stream.unused_data or self.file.read(BLOCK_BYTES)
        while compressed and not (compressed := compressed.lstrip(b"\0")):
            compressed = self.file.read(BLOCK_BYTES)
        self.stream = self.new_stream() if compressed else self.stream
        return compressed


class TranscodedFile(io.RawIOBase):
    """The text of a file in another encoding, as UTF-8 bytes. Raises UserError for bytes that are not in it."""

    def __init__(self, path: Path, file: io.BufferedReader, encoding: str):
        self.path, self.file, self.encoding = path, file, encoding
        self.decoder = codecs.getincrementaldecoder(encoding)()
        self.n_read, self.output, self.is_at_end = 0, memoryview(b""), False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.output and not self.is_at_end:
            block = self.file.read(TRANSCODED_BYTES)
            self.is_at_end = not block
            start = self.n_read - len(self.decoder.getstate()[0])
            try:
                self.output = memoryview(self.decoder.decode(block, final=self.is_at_end).encode())
            except UnicodeDecodeError as error:
                reason = f"byte {start + error.start} is not {self.encoding} text ({error.reason})"
                raise UserError(f"{self.path}: {reason}; check encoding of the source") from None
            except UnicodeError as error:  # no byte order mark, or a lone surrogate
                raise UserError(
                    f"{self.path}: not {self.encoding} text ({error}); check encoding of the source"
                ) from None
            self.n_read += len(block)
        n = min(len(buffer), len(self.output))
        buffer[:n], self.output = self.output[:n], self.output[n:]
        return n


@contextmanager
def open_utf8(path: Path, encoding: str, on_read: Callable[[int], object] | None = None) -> Iterator[io.BufferedReader]:
    """Open a file's decompressed text as UTF-8 bytes, which are checked only if `encoding` is another one."""
    with open_decompressed(path, on_read) as file:
        yield file if encoding == "utf-8" else io.BufferedReader(TranscodedFile(path, file, encoding))


@contextmanager
def open_decompressed(path: Path, on_read: Callable[[int], object] | None = None) -> Iterator[io.BufferedReader]:
    """Open a file's decompressed bytes. Raises UserError, also while they are read, if it cannot be read to its end.

    `on_read` is called with the number of bytes that are read, before decompression.
    """
    try:
        with path.open("rb") as file:
            file = file if on_read is None else io.BufferedReader(CountedFile(file, on_read), COUNTED_BYTES)
            is_compressed = path.suffix.lower() in DECOMPRESSORS
            yield io.BufferedReader(DecompressedFile(path, file)) if is_compressed else file
    except OSError as error:  # of a disk: remote files raise UserError
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
