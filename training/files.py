"""Files that are there whole or not at all, and folders that one process has."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.errors import UserError


@contextmanager
def write_errors_as_user_errors(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write `path` into one line for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_atomically(path: Path, text: str) -> None:
    """Replace the file by `text`, durably: a reader, or a crash, sees the old or the new, never a part."""
    partial = path.with_name(f".{path.name}.tmp")
    with write_errors_as_user_errors(path):
        try:
            with partial.open("w", encoding="utf-8", newline="") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which gets the name `target` once all in it is durable; removed where that fails."""
    partial = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for path in [*sorted(partial.iterdir()), partial]:
            path.chmod(path.stat().st_mode | 0o444)  # safetensors writes for the owner alone
            fsync_path(path)
        before = target.with_name(f".{target.name}.old")
        remove(before)
        if target.exists():
            target.rename(before)
        partial.rename(target)
        fsync_path(target.parent)
        remove(before)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def run_lock(folder: Path) -> Iterator[RunLock]:
    """Hold a run's folder; it is free again when the process ends, however. Raises UserError where another has it."""
    from filelock import FileLock, Timeout

    real = folder.resolve()  # by whichever name another goes to it
    lock = FileLock(real.with_name(f".{real.name}.lock"))
    try:
        mkdir_durable(real.parent)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder}: another process is training this run; choose another --name") from None
    except OSError as error:
        option = "--name" if error.errno == errno.ENAMETOOLONG else "--out_dir"
        raise UserError(f"{folder.parent}: {error.strerror or error}; choose another {option}") from error
    try:
        yield RunLock(folder, Path(lock.lock_file))
    finally:
        lock.release()


class RunLock:
    """A folder that is held, as long as the lock's file is the one that was locked."""

    def __init__(self, folder: Path, lock: Path):
        self.folder, self.lock, self.inode = folder, lock, lock.stat().st_ino

    def check(self) -> None:
        """Raise UserError where the lock's file was removed: another process may have the folder now."""
        if not self.lock.exists() or self.lock.stat().st_ino != self.inode:
            raise UserError(f"{self.lock}: was removed, so another process may be training {self.folder}; start again")


def mkdir_durable(path: Path) -> None:
    """Make a folder, and those that it is in, durably."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        fsync_path(folder.parent)


def remove(path: Path) -> None:
    """Remove a folder, a file or a link, if it is there; never what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Make a file's content, or the names in a folder, durable. Windows cannot open a folder: nothing there."""
    if path.is_file() or os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
