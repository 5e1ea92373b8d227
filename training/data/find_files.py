"""Find text files by path, folder, glob or URL."""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from training.data.remote_files import RemoteFile, find_remote, hidden_part
from training.data.text_files import EXTENSIONS, FORMATS, format_of
from training.errors import UserError
from training.remote import is_url

BYTECODE = "__pycache__"  # compiled code, which nobody expects to be read
SKIPPED_FOLDERS = frozenset({BYTECODE, "site-packages", "dist-packages"})
ONLY_BY_NAME = ".json"  # folders of code have .json files that hold no text; packed ones are data sets
TABLES = (".csv", ".tsv")  # folders of code have those that hold no text as well
ENTERED = "folder searched already"  # by a link: a loop, or a second way to it
MAX_KINDS = 6  # of files, named in a line about what was left out

LeftOut = dict[Path, str]  # files and folders that a search did not use, and their kind


def walk(folder: Path, skip: frozenset[str] = SKIPPED_FOLDERS, left_out: LeftOut | None = None) -> Iterator[Path]:
    """Yield every file below a folder in a fixed order, without hidden ones and folders named in `skip`.

    Follows links, and enters each folder once. Raises UserError for a folder that cannot be read.
    """
    left_out = {} if left_out is None else left_out
    for parent, names in walk_folders(folder, skip, left_out):
        for name in names:
            if name.startswith("."):
                left_out[parent / name] = "hidden file"
            else:
                yield parent / name


def walk_folders(folder: Path, skip: frozenset[str], left_out: LeftOut) -> Iterator[tuple[Path, list[str]]]:
    """Yield (folder, names of its files) for a folder and all below it, as `walk` enters them."""
    entered = set()
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        status = Path(parent).stat()
        if (inode := (status.st_dev, status.st_ino)) in entered:
            left_out[Path(parent)] = ENTERED
            folders.clear()
            continue
        entered.add(inode)
        skipped = {name for name in folders if name in skip or name.startswith(".")}
        left_out |= {Path(parent, name): f"{name} folder" for name in skipped - {BYTECODE}}
        folders[:] = sorted(set(folders) - skipped)
        yield Path(parent), sorted(names)


def _raise_unreadable(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: this folder cannot be read: {error.strerror}") from None


def find_files(
    patterns: Iterable[str], reason_unwanted: Callable[[Path], str | None] = lambda _: None
) -> tuple[dict[Path, bool], LeftOut]:
    """Return the files of paths, folders and globs, each once (True: by its own path), and what a search left out.

    A search of a folder leaves out what has a `reason_unwanted`, such as ".csv file without the text_column". Raises
    UserError for a path, folder or glob without a usable file.
    """
    files: dict[Path, bool] = {}
    left_out: LeftOut = {}
    for pattern in patterns:
        path = Path(pattern)
        if is_url(pattern):
            files |= _find_remote(pattern, left_out, reason_unwanted)
        elif path.is_file():
            if format_of(path) not in FORMATS:
                raise UserError(f"{path}: no usable file: its name does not end in {EXTENSIONS}")
            files[path] = True
        elif matches := sorted(search(path, left_out, reason_unwanted)):
            files |= {match: False for match in matches if match not in files}
        elif path.is_dir():
            kinds = f" (there are {counts})" if (counts := count_kinds(left_out.values())) else ""
            raise UserError(f"{pattern}: no usable file in this folder{kinds}: no name ends in {EXTENSIONS}")
        elif path.exists():
            raise UserError(f"{pattern}: not a file but a pipe or a device; write its text to a file first")
        elif glob.has_magic(str(path)):
            raise UserError(f"{pattern}: the glob matches no usable file (names that end in {EXTENSIONS})")
        else:
            raise UserError(f"{pattern}: no such file or folder")
    return files, drop_other_ways({path: kind for path, kind in left_out.items() if path not in files})


def drop_other_ways(left_out: LeftOut) -> LeftOut:
    """Return what was left out with one path to each file, also if several searches or links have met it."""
    files: dict[str, tuple[Path, str]] = {}
    for path, kind in left_out.items():
        where = f"{path}" if isinstance(path, RemoteFile) or kind == ENTERED else os.path.realpath(path)
        files.setdefault(where, (path, kind))
    return dict(files.values())


def name_of_path(path: str) -> str:
    """Return a name for text at this path: its last part that is no pattern, in letters, digits, `.`, `_` and `-`."""
    parts = [part for part in Path(path).parts if not set(part) & set("*?[")]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", parts[-1] if parts else "")[:64].strip("-._") or "files"


def _find_remote(url: str, left_out: LeftOut, reason_unwanted: Callable[[Path], str | None]) -> dict[Path, bool]:
    """Return the files at a URL, as `find_files` returns them."""
    remote, is_one = find_remote(url)
    is_folder = not (is_one or glob.has_magic(url))
    kinds = {
        file: (hidden_part(file.url, url, SKIPPED_FOLDERS) if is_folder else None)
        or reason_left_out(file, is_folder, reason_unwanted)
        for file in remote
    }
    if all(kinds.values()):
        counts = count_kinds(kinds.values())
        raise UserError(f"{url}: no usable file{f' (there are {counts})' * bool(kinds)}: no name ends in {EXTENSIONS}")
    left_out |= {file: kind for file, kind in kinds.items() if kind}
    return {file: is_one for file, kind in kinds.items() if not kind}


def count_kinds(kinds: Iterable[str]) -> str:
    """Return "2 .pdf files, 1 hidden file" for the kinds of what is left out."""
    counts = Counter(kinds).most_common()
    plurals = {kind: re.sub(r"(^| )(file|folder)", r"\1\2s", kind, count=1) for kind, _ in counts}
    parts = [f"{n} {plurals[kind] if n > 1 else kind}" for kind, n in counts]
    if n := sum(n for _, n in counts[MAX_KINDS:]):
        parts[MAX_KINDS:] = [f"{n} of other kinds"]
    return ", ".join(parts)


def search(path: Path, left_out: LeftOut, reason_unwanted: Callable[[Path], str | None]) -> Iterator[Path]:
    """Yield the usable files below a folder, or those that a glob matches, also below folders that it matches."""
    if not path.is_dir():
        _check_listable(path)
    for match in [path] if path.is_dir() else expand_glob(path):
        is_folder = match.is_dir()
        for file in walk(match, left_out=left_out) if is_folder else [match]:
            if kind := reason_left_out(file, is_folder, reason_unwanted):
                left_out[file] = kind
            else:
                yield file


def reason_left_out(file: Path, is_folder: bool, reason_unwanted: Callable[[Path], str | None]) -> str | None:
    """Return the kind of a file that is not read; None if it is. `is_folder`: a search of its folder found it."""
    name = format_of(file)
    if name in FORMATS and not (is_folder and file.suffix.lower() == ONLY_BY_NAME):
        return reason_unwanted(file) if is_folder else None
    return f"{name} file" if name else "file without an extension"


def expand_glob(pattern: Path) -> Iterator[Path]:
    """Yield what a glob matches. `**` enters each folder once, where `glob.glob` follows links in circles."""
    parts = pattern.parts
    if "**" not in parts:
        yield from map(Path, glob.glob(str(pattern)))  # noqa: PTH207 (it may be absolute)
        return
    first = parts.index("**")
    rest = parts[first + 1 :]
    for root in filter(Path.is_dir, expand_glob(Path(*parts[:first]))):
        for folder, names in walk_folders(root, skip=frozenset(), left_out={}):
            if rest:
                yield from expand_glob(Path(glob.escape(str(folder)), *rest))
            else:
                yield from (folder / name for name in names if not name.startswith("."))


def _check_listable(pattern: Path) -> None:
    """Raise UserError if a folder that a glob searches cannot be read: `glob` takes it for an empty one."""
    for path in (pattern, *pattern.parents):
        if glob.has_magic(str(path)):
            for folder in filter(Path.is_dir, expand_glob(path.parent)):
                try:
                    os.scandir(folder).close()
                except OSError as error:
                    _raise_unreadable(error)
