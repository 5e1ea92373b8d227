"""Imports only point down, and only where they are allowed to."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "training"
FLOORS = [
    {"errors", "files", "section", "config"},
    {"options", "device", "kernels", "optim"},
    {"batch"},
    {"model", "data", "distributed", "checkpoint"},
    {"weights", "planning", "logging"},
    {"engine"},
    {"train", "prepare", "evaluate", "generate", "export", "plan", "twin", "checkpoints"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_rooms_below_it(path):
    room = room_of(path)
    if room == "__init__":
        return
    assert room in FLOOR, f"{room} is on no floor: add it to FLOORS"
    used = {name.split(".")[1] for name in imported(path) if name.startswith("training.")} - {room}
    wrong = {other for other in used if FLOOR.get(other, -1) > FLOOR[room]}
    if room not in FLOORS[0]:  # rooms that stand side by side do not know one another
        wrong |= {other for other in used if FLOOR.get(other) == FLOOR[room]}
    if str(path.relative_to(PACKAGE)) == "planning/memory.py":
        wrong -= {"engine"}  # until the engine's parts take values instead of a Run
    assert not wrong, f"{room} imports {wrong}"


def test_only_one_file_imports_torch_distributed():
    users = {room_of(path) for path in FILES if any(name.startswith("torch.distributed") for name in imported(path))}
    assert users == {"distributed"}


def test_the_ground_floor_imports_no_torch():
    ground = [path for path in FILES if room_of(path) in FLOORS[0] | {"options"}]
    allowed = {"filelock", "pydantic", "pydantic_core", "ruamel", "training"} | set(sys.stdlib_module_names)
    used = {name.split(".")[0] for path in ground for name in imported(path)}
    assert used <= allowed, used - allowed


def test_functions_fit_a_screen_and_files_a_reader():
    for path in FILES:
        text = path.read_text()
        # config.py is a list to look things up in, one entry an option: it grows with them.
        assert text.count("\n") <= (600 if path.name == "config.py" else 400), path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
