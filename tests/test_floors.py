"""The package's structure: imports point down, no circle, few files at the root, functions that fit a screen."""

import ast
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "training"
# From the ground up. Rooms on one floor do not import one another, except on the ground floor.
FLOORS = [
    {"terminal", "errors", "files", "remote", "section", "config"},
    {"options", "device", "kernels", "optim"},
    {"batch"},
    {"model", "data", "distributed", "checkpoint"},
    {"weights", "planning", "logging"},
    {"engine", "session"},
    {"train", "prepare", "evaluate", "generate", "export", "plan", "twin", "checkpoints", "runs"},
    {"compare"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_ROOT_FILES = 16
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Return every module that a file imports, at any line; `from a import b` gives a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def test_a_room_imports_only_rooms_below_it():
    wrong = []
    for path in FILES:
        if (room := room_of(path)) == "__init__":
            continue
        if room not in FLOOR:
            wrong.append(f"{room} is on no floor: add it to FLOORS")
            continue
        others = {name.split(".")[1] for name in imports_of(path) if name.startswith("training.")} - {room}
        limit = FLOOR[room] if room in FLOORS[0] else FLOOR[room] - 1
        wrong += [f"{path.relative_to(ROOT)} imports {other}" for other in others if FLOOR.get(other, 0) > limit]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_one_another_in_a_circle():
    modules = {module_of(path): path for path in FILES}
    packages = {name for name, path in modules.items() if path.name == "__init__.py"}
    # A package's table of contents imports its modules, which may import one another by their full names.
    uses = {
        name: {other for other in imports_of(path) if other in modules and other not in packages | {name}}
        for name, path in modules.items()
        if name not in packages
    }
    done: set[str] = set()
    while ready := {name for name in uses.keys() - done if uses[name] <= done}:
        done |= ready
    assert done == uses.keys(), f"in a circle, or above one: {sorted(uses.keys() - done)}"


def test_only_one_room_imports_torch_distributed():
    users = {room_of(path) for path in FILES if any(name.startswith("torch.distributed") for name in imports_of(path))}
    assert users == {"distributed"}


def test_the_ground_floor_and_the_options_import_no_torch():
    paths = [path for path in FILES if room_of(path) in FLOORS[0] | {"options"}]
    allowed = {"filelock", "fsspec", "pydantic", "pydantic_core", "rich", "ruamel", "training"} | set(
        sys.stdlib_module_names
    )
    others = {name.split(".")[0] for path in paths for name in imports_of(path)} - allowed
    assert not others


def test_functions_fit_a_screen_and_files_a_reader():
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_ROOT_FILES
    too_long = []
    for path in FILES:
        text = path.read_text()
        if text.count("\n") > MAX_FILE_LINES and path != PACKAGE / "config.py":  # a reference list of options
            too_long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES:
                too_long.append(f"{path.relative_to(ROOT)}: {node.name}, {node.end_lineno - node.lineno + 1} lines")
    assert not too_long, "\n".join(too_long)
