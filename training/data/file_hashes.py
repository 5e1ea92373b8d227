"""What files hold, as hashes that are computed again only where a file's size or times have changed."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from contextlib import suppress
from pathlib import Path

from training.errors import UserError


class FileHashes:
    """SHA-256 of files, remembered in `memo` by path, size, and times of change.

    The content decides: a file that was touched but holds the same keeps its digest. Losing the memo
    costs time only, so one that cannot be read is begun anew.
    """

    def __init__(self, memo: Path):
        self.memo = memo
        self.changed = False
        try:
            self.known = dict(json.loads(memo.read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):
            self.known = {}

    def sha256(self, path: Path) -> str:
        """The digest of a file's bytes. Raises UserError where it cannot be read."""
        name = str(path.absolute())
        try:
            # The status comes first: a change during the reading leaves a memo that no longer fits.
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise UserError(f"{path}: not a file but a folder, a pipe or a device")
            seen = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            if (entry := self.known.get(name)) and entry[:3] == seen:
                return entry[3]
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        self.known[name], self.changed = [*seen, digest], True
        return digest

    def save(self) -> None:
        """Write what was learned, whole or not at all; a disk that refuses it costs time at the next start."""
        if self.changed:
            temporary = self.memo.with_name(f"{self.memo.name}.{os.getpid()}")
            with suppress(OSError):
                try:
                    temporary.write_text(json.dumps(self.known))
                    temporary.replace(self.memo)
                finally:
                    temporary.unlink(missing_ok=True)
