"""The copy of a run at a URL: `checkpoint.copy_to`.

It has the same names as the run's folder. A checkpoint's files are put there first and its manifest last: without a
manifest a checkpoint is incomplete and does not count. Nothing relies on a listing to show what was just written.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from training.checkpoint.read import MALFORMED, MANIFEST, corruption, is_kept_for_good, step_path
from training.config import CheckpointConfig
from training.errors import RestartNeeded, UserError
from training.files import fsync_path, mkdir_durable, remove, rename_durable, rename_to_free_name
from training.remote import RemoteFolder

FOLDER = "checkpoints"
LATE = ("model/", "summary.json")  # of a finished run: put last, and not fetched with a checkpoint
ENTRY = re.compile(rf"{FOLDER}/step-([0-9]+)/")


class RemoteRun:
    """The checkpoints and other files of a run at a URL. Methods raise UserError, each with a line for the user.

    `complete` has the steps of checkpoints with a manifest, `verified` those whose bytes were read back.
    """

    def __init__(self, url: str):
        self.folder = RemoteFolder(url)
        self.url = self.folder.url
        names = self.folder.names(FOLDER)
        self.steps = {int(match[1]) for name in names if (match := ENTRY.match(name))}  # incomplete ones too
        self.complete = {step for step in self.steps if self.read_manifest(step) is not None}
        self.verified: set[int] = set()
        self._names = names

    def name_of(self, step: int, file: str = "") -> str:
        """Return the name of a checkpoint's file at the URL."""
        return f"{step_path(Path(FOLDER), step).as_posix()}{f'/{file}' if file else ''}"

    def read_manifest(self, step: int) -> dict | None:
        """Return a checkpoint's manifest; None if it has none, or one that no run writes."""
        try:
            manifest = json.loads(self.folder.read(self.name_of(step, MANIFEST)) or b"")
            has_files = all(Path(name).name == name and type(manifest[name]["bytes"]) is int for name in manifest)
            return manifest if has_files and "state.json" in manifest else None
        except MALFORMED:
            return None

    def corruption(self, step: int) -> str | None:
        """Read every byte of a checkpoint back; return one line that names the damaged file, None if all are intact."""
        manifest = self.read_manifest(step)
        if manifest is None:
            return f"{self.folder.url_of(self.name_of(step, MANIFEST))}: damaged: not a checkpoint's manifest"
        for file, entry in manifest.items():
            name = self.name_of(step, file)
            if self.folder.sha256(name, entry["bytes"]) != entry.get("sha256"):
                return f"{self.folder.url_of(name)}: damaged: its size and SHA-256 are not those in {MANIFEST}"
        return None

    def put(self, path: Path, check: Callable[[], None]) -> None:
        """Copy the checkpoint at `path` there, unless it is there, and verify it by reading it back.

        Calls `check`, which may raise an exception, before each file.
        """
        step = int(path.name.removeprefix("step-"))
        if step in self.complete and self.corruption(step) is not None:
            self.remove(step)
        if step not in self.complete:
            self.steps.add(step)
            for file in json.loads((path / MANIFEST).read_bytes()):
                check()
                self.folder.put(path / file, self.name_of(step, file))
            self.folder.put(path / MANIFEST, self.name_of(step, MANIFEST))
            self.complete.add(step)
            if problem := self.corruption(step):
                self.remove(step)
                raise RestartNeeded(problem)
        self.verified.add(step)

    def prune(self, keep: int, best_step: int | None, keep_every: int | None) -> None:
        """Remove what `checkpoint.prune` would remove on a disk, and what is incomplete before the newest."""
        complete = sorted(self.complete)
        kept = {*complete[-keep:], best_step}
        kept |= {step for step in complete if is_kept_for_good(step, best_step, keep_every)}
        for step in sorted(self.steps - kept):
            if complete and step < complete[-1]:
                self.remove(step)

    def remove(self, step: int) -> None:
        """Remove a checkpoint, its manifest first."""
        files = self.read_manifest(step) or {}
        self.folder.remove(self.name_of(step, MANIFEST))
        self.complete.discard(step)
        self.verified.discard(step)
        for name in {*(self.name_of(step, file) for file in files), *self.folder.names(self.name_of(step))}:
            self.folder.remove(name)
        self.steps.discard(step)

    def set_aside(self, after: int, reason: str) -> None:
        """Rename the complete checkpoints after step `after`, newest first, to `reason`-n-step-N."""
        for step in sorted((step for step in self.complete if step > after), reverse=True):
            name = self.name_of(step)
            taken = {other.split("/")[1] for other in self._names}
            aside = next(free for n in count() if (free := f"{reason}-{n}-{name.rpartition('/')[2]}") not in taken)
            for file in (*self.read_manifest(step), MANIFEST):
                self.folder.copy(f"{name}/{file}", f"{FOLDER}/{aside}/{file}")
            self.remove(step)

    def read_state(self, step: int) -> bytes:
        """Return the bytes of a checkpoint's state.json."""
        return self.folder.read(self.name_of(step, "state.json")) or b""

    def fetch(self, step: int, run_dir: Path) -> str | None:
        """Copy a checkpoint, and before it the run's other files, to the run's folder.

        Returns one line if the checkpoint is damaged, and then removes what it has copied of it.
        """
        folder = run_dir / FOLDER
        mkdir_durable(folder)
        target = step_path(folder, step)
        partial = folder / f".{target.name}.tmp"
        remove(partial)
        for name in self.folder.names():
            if not name.startswith((f"{FOLDER}/", *LATE)) and not is_hidden(name):
                self._fetch_file(name, run_dir / name)
        partial.mkdir()
        for file in (*(self.read_manifest(step) or {}), MANIFEST):
            self.folder.fetch(self.name_of(step, file), partial / file)
        fsync_path(partial)
        if problem := corruption(partial):
            remove(partial)
            return problem.replace(str(partial), self.folder.url_of(self.name_of(step)))
        if target.exists():  # damaged
            rename_to_free_name(target, lambda n: f"damaged-{n}-{target.name}", first=0)
        rename_durable(partial, target)
        self.verified.add(step)
        return None

    def _fetch_file(self, name: str, target: Path) -> None:
        mkdir_durable(target.parent)
        partial = target.with_name(f".{target.name}.tmp")
        self.folder.fetch(name, partial)
        partial.replace(target)
        fsync_path(target.parent)


def is_hidden(name: str) -> bool:
    """Return True for the name of a file that is being written, or of one in such a folder."""
    return any(part.startswith(".") for part in name.split("/"))


@contextmanager
def copy_to_errors() -> Iterator[None]:
    """Begin the errors of the block with the option's name."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"checkpoint.copy_to: {error}") from error


def check_copy_to(config: CheckpointConfig) -> None:
    """Raise UserError if `copy_to` cannot be written: with a wrong URL or credentials, or without a package."""
    if config.copy_to is not None:
        with copy_to_errors():
            RemoteFolder(config.copy_to).check_writable()
