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


class FileHashes:
    """SHA-256 of files, kept in `memo` by path, size and times of change. All are hashed again if it cannot be read."""

    def __init__(self, memo: Path):
        self.memo = memo
        self.has_changed = False
        self.on_read: Callable[[int], object] = lambda _: None  # called with the size of each block that is hashed
        try:
            self.entries = {name: list(entry) for name, entry in json.loads(read_bytes(memo)).items()}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            self.entries = {}

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
            with path.open("rb") as file:
                digest = hashlib.sha256()
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
                    self.on_read(len(block))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        self.entries[name], self.has_changed = [*version, digest.hexdigest()], True
        return digest.hexdigest()

    def save(self) -> None:
        """Replace the memo atomically. If the disk refuses, the next start hashes the files again."""
        if self.has_changed:
            temporary = self.memo.with_name(f"{self.memo.name}.{uuid.uuid4().hex}")
            with suppress(OSError):
                try:
                    temporary.write_text(json.dumps(self.entries))
                    temporary.replace(self.memo)
                finally:
                    temporary.unlink(missing_ok=True)
