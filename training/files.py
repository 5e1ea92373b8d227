"""Durable, atomic files and folders, and the lock of a run's folder."""

import errno
import fcntl
import itertools
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from training.errors import UserError
from training.terminal import print_note

LOCK_WAIT_S = 0.3  # `is_locked` holds the lock of a run that no process trains for a moment
VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")


def expand_path(text: str) -> str:
    """Return a path with `$NAME`, `${NAME}`, `~` and `~user` replaced: the rule of every path option and flag.

    A relative path stays relative to the current folder. Expanding the result again does not change it. Raises
    ValueError with the reason.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not (replacement := os.environ.get(name)):
            raise ValueError(f"{text!r}: the environment variable {name} is not set; set it, or write the path out")
        return replacement

    if not text:
        raise ValueError("'' is empty; give a path")
    if text != text.strip() or "\0" in text:
        raise ValueError(f"{text!r} begins or ends with white space, or has a NUL character; remove it")
    path = os.path.expanduser(VARIABLE.sub(value, text))  # noqa: PTH111 (Path drops a trailing slash, and raises RuntimeError)
    if path.startswith("~"):
        user = path.partition("/")[0]
        raise ValueError(
            f"{text!r}: {user} is no user's home folder; write the path out, or ./{user} for a folder here"
        )
    if path != path.strip() or VARIABLE.search(path):
        raise ValueError(f"{text!r}: becomes {path!r}, with a variable or outer white space; write the path out")
    return path


def open_file(path: Path) -> BinaryIO:
    """Open a file to read its bytes. Raises OSError for a pipe, which would let a command wait, and the like."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")  # noqa: PTH123 (a descriptor, which the caller closes)
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "not a file but a pipe or a device", str(path))


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes. Raises OSError, as `open_file`."""
    with open_file(path) as file:
        return file.read()


@contextmanager
def write_errors_as_user_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while `path` is written into a UserError that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_atomically(path: Path, content: str | Iterable[bytes]) -> None:
    """Replace the file durably. After a crash it holds the old content or the new, never a mixture.

    A folder in its place is set aside.
    """
    partial = path.with_name(f".{path.name}.tmp")
    with write_errors_as_user_errors(path):
        try:
            if os.path.lexists(partial) and not stat.S_ISREG(partial.lstat().st_mode):
                remove(partial)  # a link would lead elsewhere, and a pipe would wait for a reader
            with partial.open("wb") as file:
                file.writelines([content.encode()] if isinstance(content, str) else content)
            fsync_path(partial)
            if path.is_dir() and not path.is_symlink():
                set_aside(path)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder to fill. Rename it to `target` once its files are durable; remove it after an error.

    It replaces a folder; anything else in its place is set aside.

    Its files get the permissions of any new file; safetensors creates files that only the owner can read.
    """
    partial = target.with_name(f".{target.name}.tmp")
    old = target.with_name(f".{target.name}.old")
    try:
        remove(partial)
        partial.mkdir(parents=True)
        yield partial
        for path in sorted(partial.iterdir()):
            path.chmod(partial.stat().st_mode & 0o666)  # the folder's show the umask
            fsync_path(path)
        fsync_path(partial)
        remove(old)
        if target.is_dir():
            target.rename(old)
        elif os.path.lexists(target):
            set_aside(target)
        rename_durable(partial, target)
        remove(old)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def run_lock(folder: Path, flag: str = "--name") -> Iterator[Callable[[], None]]:
    """Lock a run's folder until the block or the process ends. Raises UserError if another process holds the lock.

    The error advises to choose another value of `flag`.

    Yields a function that raises UserError if the lock file was removed: another process may train the run now.
    """
    from filelock import FileLock, Timeout

    real = folder.resolve()  # a folder and links to it share one lock
    lock = FileLock(real.with_name(f".{real.name}.lock"))
    try:
        mkdir_durable(real.parent)
        lock.acquire(timeout=LOCK_WAIT_S)
    except Timeout:
        raise UserError(f"{folder}: another process is training this run; choose another {flag}") from None
    except OSError as error:
        option = flag if flag != "--name" or error.errno == errno.ENAMETOOLONG else "--out_dir"
        raise UserError(f"{folder.parent}: {error.strerror or error}; choose another {option}") from error
    file = Path(lock.lock_file)
    inode = file.stat().st_ino

    def check_lock() -> None:
        if not file.exists() or file.stat().st_ino != inode:
            raise UserError(f"{file}: was removed, so another process may be training {folder}; start again")

    try:
        yield check_lock
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Return True if a process trains the run in this folder."""
    real = folder.resolve()
    try:
        with real.with_name(f".{real.name}.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for a moment: `run_lock` waits longer
    except BlockingIOError:
        return True
    except OSError:  # there is no lock, or it is another user's
        pass
    return False


def mkdir_durable(path: Path) -> None:
    """Create a folder and its missing parents durably."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        fsync_path(folder.parent)


def ensure_folder(path: Path) -> None:
    """Create a folder durably, unless it exists. A file in its place is set aside."""
    if os.path.lexists(path) and not path.is_dir():
        set_aside(path)
    mkdir_durable(path)


def set_aside(path: Path) -> None:
    """Rename to NAME.unreadable-N what stands where a run writes a file or folder of another kind, and say so."""
    aside = rename_to_free_name(path, lambda n: f"{path.name}.unreadable-{n}")
    print_note(f"{path}: not what a run writes; moved to {aside.name}")


def rename_to_free_name(path: Path, name_of: Callable[[int], str], first: int = 1) -> Path:
    """Rename a file or folder durably to the first free name of number `first`, `first` + 1, ...; return its path."""
    names = (path.with_name(name_of(n)) for n in itertools.count(first))
    free = next(name for name in names if not os.path.lexists(name))
    rename_durable(path, free)
    return free


def rename_durable(source: Path, target: Path) -> None:
    """Rename a file or folder within its parent folder, durably."""
    source.rename(target)
    fsync_path(target.parent)


def remove(path: Path) -> None:
    """Remove a folder, a file or a link, if it exists; never the target of a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
