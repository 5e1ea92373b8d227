"""Text files at URLs: found by the listings of a server, read as streams, identified by what the server tells."""

import functools
import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from training.errors import UserError
from training.remote import open_filesystem, remote_errors

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# What servers say of an object's content, the best first; times of change are for web servers without the others.
VERSION_FIELDS = (
    "ETag",
    "etag",
    "md5Hash",
    "crc32c",
    "content_md5",
    "blob_id",
    "Content-MD5",
    "Digest",
    "Last-Modified",
    "LastModified",
)
FETCHED_BYTES = 2**22  # at a time
BUFFER_BYTES = 2**17
NOT_FOUND = 404


class RemoteStatus(NamedTuple):
    """The parts of `os.stat_result` that readers use."""

    st_size: int
    st_dev: str
    st_ino: str


@functools.total_ordering
class RemoteFile:
    """A file at a URL, with the parts of `Path` that readers use. `version` changes with its content.

    Raises UserError if the server tells nothing that does.
    """

    def __init__(self, fs: "AbstractFileSystem", path: str, url: str, info: Mapping[str, Any]):
        self.fs, self.path, self.url = fs, path, url
        info = info if version_of(info) else self._info()  # a web server's listing has only names
        self.version, self.size = version_of(info), info.get("size")
        if self.version is None:
            problem = "the server gives neither an ETag nor a time of change, so a change would not be noticed"
            raise UserError(f"{url}: {problem}; download the file")
        self._name = PurePosixPath(urlsplit(url).path if url.startswith("http") else url)

    def __str__(self) -> str:
        return self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteFile) and self.url == other.url

    def __lt__(self, other: "RemoteFile") -> bool:
        return self.url < other.url

    @property
    def suffix(self) -> str:
        """Its last ending, such as `.gz`."""
        return self._name.suffix

    @property
    def suffixes(self) -> list[str]:
        """Its endings, such as `.txt` and `.gz`."""
        return self._name.suffixes

    def exists(self) -> bool:
        """Return True: it was there when it was found."""
        return True

    def resolve(self) -> "RemoteFile":
        """Return itself: links are the server's."""
        return self

    def stat(self) -> RemoteStatus:
        """Return its size, and what tells it apart from other files."""
        return RemoteStatus(self.size or 0, "url", self.url)

    def open(self, _mode: str = "rb") -> io.BufferedReader:
        """Open its bytes. Raises UserError, also while they are read, if the server fails or the file has changed."""
        self.check_unchanged()
        with remote_errors(self.url):
            file = self.fs.open(self.path, "rb", block_size=FETCHED_BYTES)
        return io.BufferedReader(_RemoteReader(self, file), BUFFER_BYTES)

    def check_unchanged(self) -> None:
        """Raise UserError if the server has another version than the one that was found."""
        if version_of(self._info()) != self.version:
            raise UserError(f"{self.url}: changed while it was read; start again")

    def _info(self) -> Mapping[str, Any]:
        with _server_errors(self.url):
            return self.fs.info(self.path)


class _RemoteReader(io.RawIOBase):
    """The bytes of a remote file. Each error of the server is a UserError."""

    def __init__(self, remote: RemoteFile, file: Any):
        self.remote, self.file = remote, file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.file.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer: Any) -> int:
        with remote_errors(self.remote.url):
            content = self.file.read(len(buffer))
        if not content:
            self.remote.check_unchanged()
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


@contextmanager
def _server_errors(url: str) -> Iterator[None]:
    """Turn errors into a UserError. fsspec raises FileNotFoundError for all errors of web servers, with a cause."""
    with remote_errors(url):
        try:
            yield
        except FileNotFoundError as error:
            if error.__cause__ is not None and getattr(error.__cause__, "status", None) != NOT_FOUND:
                raise error.__cause__ from None
            raise


def version_of(info: Mapping[str, Any]) -> str | None:
    """Return what changes with a file's content, and its size; None if the server tells nothing of it."""
    field = next((field for field in VERSION_FIELDS if info.get(field)), None)
    return None if field is None else " ".join((field, str(info[field]).strip('"'), str(info.get("size"))))


def find_remote(url: str) -> tuple[list[RemoteFile], bool]:
    """Return the files at a URL, below it as a folder, or that it matches as a glob, and True if it is one file.

    A web server has a folder where the URL ends in `/`. Raises UserError if there is nothing.
    """
    fs, path = open_filesystem(url)
    scheme, is_web = url.partition("://")[0], url.startswith("http")
    with _server_errors(url):
        if any(sign in url for sign in ("*[" if is_web else "*?[")):
            infos = fs.glob(path, detail=True)
        elif (is_web and url.endswith("/")) or (not is_web and fs.isdir(path)):
            infos = fs.find(path, detail=True)
        else:
            return [RemoteFile(fs, path, url, fs.info(path))], True
    return [
        RemoteFile(fs, place, place if "://" in place else f"{scheme}://{place}", info)
        for place, info in sorted(infos.items())
        if info["type"] == "file"
    ], False


def hidden_part(url: str, pattern: str, skipped: frozenset[str]) -> str | None:
    """Return the kind of a file that a search leaves out by a folder's name or its own; None: it is not left out."""
    *folders, name = url.removeprefix(pattern.rstrip("/") + "/").split("/")
    if names := sorted({folder for folder in folders if folder in skipped}):
        return f"{names[0]} folder"
    return "hidden file" if any(part.startswith(".") for part in (*folders, name)) else None
