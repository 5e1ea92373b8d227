"""Tokens of several files as one array, mapped where they lie.

Other programs may change these files while a run reads them. A map of a file that was cut short kills the process that
reads past its end (SIGBUS), and one of a file that was rewritten returns other tokens. So every read first asks the
system for the file's size and time of change.
"""

import mmap
import os
import resource
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from training.data.file_hashes import FileHashes, hash_file
from training.data.token_files import TokenFile, unreadable
from training.errors import UserError
from training.files import open_file

SPARE_FILES = 256  # that a process opens beside its token files


class MappedFile:
    """A token file in memory: `tokens` (n_tokens,). A deleted or replaced file stays readable as it was."""

    def __init__(self, file: TokenFile, sha256: str, hashes: FileHashes):
        """Map a file. Raises UserError if its content is not the one with this SHA-256."""
        self.path, self.sha256 = file.path, sha256
        try:
            with open_file(file.path) as opened:
                self.status = os.fstat(opened.fileno())
                self.map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise unreadable(file.path, error) from None
        if hashes.sha256(file.path) != sha256 or len(self.map) < file.offset + file.n_tokens * file.dtype.itemsize:
            raise UserError(f"{file.path}: changed while it was opened; start again")
        self.tokens = np.frombuffer(self.map, file.dtype, file.n_tokens, file.offset)

    def check(self) -> None:
        """Raise UserError if the file was cut short or holds other bytes. A new time with the same bytes is fine."""
        if (size := self.map.size()) < len(self.map):
            raise UserError(f"{self.path}: cut to {size} bytes while it was read; restore it and start again")
        with suppress(OSError):  # gone: the map still has its tokens
            status = self.path.stat()
            if os.path.samestat(status, self.status) and version(status) != version(self.status):
                if hash_file(self.path) != self.sha256:
                    raise UserError(f"{self.path}: changed while it was read; restore it and start again")
                self.status = status


def version(status: os.stat_result) -> tuple[int, int]:
    """Return what changes whenever a file is written."""
    return status.st_size, status.st_mtime_ns


class MappedTokens:
    """A read-only array of tokens in parts, as slices of files; only slices of it with a step of 1 can be read."""

    def __init__(self, parts: Sequence[tuple[np.ndarray, MappedFile | None]]):
        """Join arrays; the file of each is checked before it is read, None: it need not be."""
        self.parts = tuple(parts)
        self.ends = np.cumsum([len(tokens) for tokens, _ in self.parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, key: slice) -> np.ndarray:
        """Return the tokens of a slice: a view within one file, a copy across files. Raises UserError, as `check`."""
        start, stop, _ = key.indices(len(self))
        if start >= stop:
            return self.parts[0][0][:0]
        first, last = np.searchsorted(self.ends, (start, stop - 1), side="right").tolist()
        arrays = []
        for i in range(first, last + 1):
            tokens, file = self.parts[i]
            begin = int(self.ends[i]) - len(tokens)
            if file is not None:
                file.check()
            arrays.append(tokens[max(0, start - begin) : stop - begin])
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def between(self, start: int, stop: int) -> "MappedTokens":
        """Return the tokens [start, stop) as such an array, without reading them."""
        parts = []
        for (tokens, file), end in zip(self.parts, self.ends.tolist(), strict=True):
            begin = end - len(tokens)
            part = tokens[max(0, start - begin) : max(0, stop - begin)]
            if len(part):
                parts.append((part, file))
        return MappedTokens(parts)


def map_files(files: Sequence[TokenFile], sha256: Sequence[str], hashes: FileHashes) -> MappedTokens:
    """Map files one after another. Raises UserError if one cannot be read or is not the one with its SHA-256."""
    allow_open_files(len(files))
    mapped = [MappedFile(file, digest, hashes) for file, digest in zip(files, sha256, strict=True)]
    return MappedTokens([(file.tokens, file) for file in mapped])


def allow_open_files(n_files: int) -> None:
    """Raise the process's limit of open files, which is often 1024, if that many more need it: a map holds a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0  # noqa: PTH208, PTH112
    needed += n_files + SPARE_FILES
    if soft != resource.RLIM_INFINITY and needed > soft:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
