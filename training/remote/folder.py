"""A folder at a URL: put, read, hash, fetch and remove its files by relative names."""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

from training.files import fsync_path, mkdir_durable, write_atomically
from training.remote.filesystem import open_filesystem, remote_errors, scheme_of

PIECE = 2**26  # bytes read from a server at a time


class TransferError(Exception):
    """A file whose bytes at the server are not those that were sent."""


class RemoteFolder:
    """A folder at a URL or path. Its methods raise UserError, or RestartNeeded where trying again may help."""

    def __init__(self, url: str):
        self.fs, self.path = open_filesystem(url)
        self.url = url.rstrip("/")
        self.is_local = scheme_of(url) == "file"

    def url_of(self, name: str) -> str:
        """Return the URL of a file, for messages."""
        return f"{self.url}/{name}"

    def check_writable(self) -> None:
        """Write a small file, read it and remove it: wrong URLs, buckets and credentials are found at the start."""
        # One name for all starts: what a killed one has left there, the next one removes.
        name, content = ".write-test", b"written to check that checkpoint.copy_to works\n"
        with remote_errors(self.url):
            self.write(name, content)
            if self.fs.cat_file(self._at(name)) != content:
                raise TransferError("what was written cannot be read")
            self.fs.rm_file(self._at(name))

    def names(self, folder: str = "") -> list[str]:
        """Return the names of all files in a folder below this one, at any depth, sorted; [] if there is none."""
        with remote_errors(self.url_of(folder)):
            try:
                paths = self.fs.find(self._at(folder))
            except FileNotFoundError:
                return []
        prefix = self.path.rstrip("/") + "/"
        names = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
        return sorted(name for name in names if is_relative(name))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        with remote_errors(self.url_of(name)):
            if self.is_local:
                self._write_local(name, [content])
            else:
                self.fs.pipe_file(self._at(name), content)

    def put(self, source: Path, name: str) -> None:
        """Copy a file there. It appears whole or not at all, as object stores do; on a disk it is renamed."""
        with remote_errors(self.url_of(name)):
            if self.is_local:
                with source.open("rb") as file:
                    self._write_local(name, iter(lambda: file.read(2**20), b""))
            else:
                self.fs.put_file(str(source), self._at(name))

    def read(self, name: str) -> bytes | None:
        """Return the bytes of a file; None if there is none."""
        with remote_errors(self.url_of(name)):
            try:
                return self.fs.cat_file(self._at(name))
            except (FileNotFoundError, IsADirectoryError):
                return None

    def sha256(self, name: str, n_bytes: int) -> str | None:
        """Read a file of `n_bytes` back; return its SHA-256, None if it is not there or has another size."""
        with remote_errors(self.url_of(name)):
            digest = hashlib.sha256()
            try:
                if n_bytes > PIECE and self.fs.size(self._at(name)) != n_bytes:
                    return None
                for piece in self._pieces(name, n_bytes):
                    digest.update(piece)
                    n_bytes -= len(piece)
            except FileNotFoundError:
                return None
        return digest.hexdigest() if n_bytes == 0 else None

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file from there to a path, durably."""
        with remote_errors(self.url_of(name)):
            self.fs.get_file(self._at(name), str(target))
            fsync_path(target)

    def copy(self, name: str, new_name: str) -> None:
        """Copy a file to another name, at the server."""
        with remote_errors(self.url_of(name)):
            if self.is_local:
                mkdir_durable(Path(self._at(new_name)).parent)
            self.fs.cp_file(self._at(name), self._at(new_name))

    def remove(self, name: str) -> None:
        """Remove a file, if it exists."""
        with remote_errors(self.url_of(name)):
            try:
                self.fs.rm_file(self._at(name))
            except FileNotFoundError:
                return
            if self.is_local:
                with suppress(OSError):  # not empty
                    Path(self._at(name)).parent.rmdir()

    def _at(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}" if name else self.path

    def _write_local(self, name: str, content: Iterator[bytes] | list[bytes]) -> None:
        target = Path(self._at(name))
        mkdir_durable(target.parent)
        write_atomically(target, content)

    def _pieces(self, name: str, n_bytes: int) -> Iterator[bytes]:
        if n_bytes <= PIECE:
            yield self.fs.cat_file(self._at(name))
        for start in range(0, n_bytes if n_bytes > PIECE else 0, PIECE):
            yield self.fs.cat_file(self._at(name), start=start, end=min(start + PIECE, n_bytes))


def is_relative(name: str) -> bool:
    """Return True if a name leads to a file below its folder."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts) and "/".join(parts) == name and ".." not in parts and not name.startswith("/") and "\0" not in name
    )
