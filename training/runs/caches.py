"""The cached datasets, and which runs were trained on them."""

import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from training.config import DataConfig
from training.data.dataset import fingerprints
from training.data.shards import MANIFEST_FILE, read_manifest
from training.errors import UserError
from training.files import rename_durable
from training.runs.listing import RunEntry, disk_bytes
from training.terminal import print_note


@dataclass(frozen=True)
class CachedData:
    """A dataset in a cache."""

    folder: Path
    n_tokens: int
    bytes: int
    runs: list[str]  # names of those that were trained on it
    unused_s: float  # since a command opened it

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self) | {"folder": str(self.folder)}


def find_caches(runs: Iterable[RunEntry]) -> list[CachedData]:
    """Return the datasets in the caches of these runs and in the default one."""
    runs = list(runs)
    default = DataConfig.model_fields["cache_dir"].default
    folders = dict.fromkeys(Path(run.cache_dir) for run in runs if run.cache_dir is not None) | {Path(default): None}
    return [
        cache
        for folder in folders
        for path in sorted(folder.glob(f"*/{MANIFEST_FILE}"))
        if (cache := _read_cache(path.parent, runs)) is not None
    ]


def _read_cache(folder: Path, runs: list[RunEntry]) -> CachedData | None:
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        print_note(f"{error}; left alone")
        return None
    known = fingerprints(manifest)
    users = [run.name for run in runs if run.data in known]
    unused_s = max(0.0, time.time() - folder.stat().st_mtime)
    n_tokens = sum(record.n_tokens for record in manifest.streams)
    return CachedData(folder, n_tokens, disk_bytes(folder), users, unused_s)


def remove_cache(cache: CachedData) -> bool:
    """Remove a dataset, unless a process is building it; return True if it is gone."""
    try:
        with FileLock(f"{cache.folder}.lock", timeout=0):
            gone = cache.folder.with_suffix(".partial")  # the next build removes it if this process is killed
            shutil.rmtree(gone, ignore_errors=True)
            rename_durable(cache.folder, gone)
            shutil.rmtree(gone)
    except Timeout:
        print_note(f"{cache.folder}: in use; left alone")
        return False
    return True
