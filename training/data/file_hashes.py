"""Hashes of files, computed again only after a file's size or times have changed."""

import hashlib
import json
import re
import stat
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from training.errors import UserError
from training.files import read_bytes

BLOCK_BYTES = 2**20


def hash_file(path: Path, on_read: Callable[[int], object] = lambda _: None) -> str:
    """Return the SHA-256 of a file's bytes, and call `on_read` with the size of each block. Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            on_read(len(block))
    return digest.hexdigest()


class FileHashes:
    """SHA-256 of files, kept in `memo` by path, size and times of change. All are hashed again if it cannot be read."""

    def __init__(self, memo: Path | None):
        """Read the hashes in `memo`; None: keep them in this object only."""
        self.memo = memo
        self.has_changed = False
        self.on_read: Callable[[int], object] = lambda _: None  # called with the size of each block that is hashed
        self.entries: dict[str, list] = {}
        if memo is None:
            return
        with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
            self.entries = {name: list(entry) for name, entry in json.loads(read_bytes(memo)).items()}

    def sha256(self, path: Path) -> str:
        """Return the hash of a file's bytes. Raises UserError if it cannot be read."""
        name = str(path.absolute())
        try:
            status = path.stat()  # before reading: if the file changes meanwhile, the entry does not match
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path}: not a file but a folder, a pipe or a device")
            version = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            *known, sha256 = self.entries.get(name) or [None]
            if known == version and re.fullmatch("[0-9a-f]{64}", str(sha256)):
                return sha256
            sha256 = hash_file(path, self.on_read)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        self.entries[name], self.has_changed = [*version, sha256], True
        return sha256

    def save(self) -> None:
        """Replace the memo atomically. If the disk refuses, the next start hashes the files again."""
        if self.has_changed and self.memo is not None:
            temporary = self.memo.with_name(f"{self.memo.name}.{uuid.uuid4().hex}")
            with suppress(OSError):
                try:
                    temporary.write_text(json.dumps(self.entries))
                    temporary.replace(self.memo)
                finally:
                    temporary.unlink(missing_ok=True)
