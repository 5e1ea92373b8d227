"""The Python files of an export: this package's own source of the network, without this package.

An export so computes what was trained, and a mechanism that is added to the network is exported without a line more.
The files hold the definitions that `modeling.py` needs, directly or through others. `from training.x.y import` becomes
`from .x_y import`: Transformers copies a folder's files with relative imports into one package.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from training.config import ModelConfig
from training.weights.hf.custom import MODELING

ENTRY = "training.weights.hf.modeling"

FUTURE = "from __future__ import annotations"
HEADER = f'''"""A GPT-2, dense or Mixture-of-Experts, for Transformers 4.57 and later.

Open the folder that this file is in with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.
The Python files here are the source that trained the model; they need torch and transformers only.
"""

{FUTURE}

import sys

# Transformers 4.57 would use these files of a folder with the same name that was opened before. And it copies only the
# files that this one imports.
for _name in (FILES):
    sys.modules.pop(f"{{__package__}}.{{_name}}", None)

'''

# `option`, `Section` and `one_of` without pydantic: config.py's classes become dataclasses.
SECTION = '''"""Options as frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Union


def option(default: Any, doc: str, **limits: Any) -> Any:  # noqa: ARG001
    """Return the default of an option."""
    return default


class Section:
    """Options of one component."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True)(cls)


def one_of(*variants: type) -> Any:
    """Return the type of an option that is one of these."""
    return Union[variants]
'''

OPTIONS = '''"""A network's options from the dictionary of a config.json."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from training.config import BlockConfig, ModelConfig
from training.model.gpt import FEED_FORWARDS, MIXERS

# Every option of the network and its default.
OPTIONS = asdict(ModelConfig())
KINDS = {kind.type: kind for kind in (*MIXERS, *FEED_FORWARDS)}


def model_config(options: dict[str, Any]) -> ModelConfig:
    """Return the configuration of the network."""

    def block(values: dict[str, Any]) -> BlockConfig:
        parts = {name: KINDS[values[name]["type"]](**values[name]) for name in ("mixer", "ffn")}
        return BlockConfig(**(values | parts))

    return ModelConfig(**(options | {"blocks": tuple(block(values) for values in options["blocks"])}))
'''

REPLACED = {ModelConfig.__base__.__module__: SECTION, "training.weights.hf.options": OPTIONS}
ATTENTION = """ATTENTION_BACKENDS = {
    "sdpa": AttentionBackend(sdpa_mask, sdpa_attention),
    "reference": AttentionBackend(boolean_mask, reference_attention),
}"""
REWRITES = (
    (r"Annotated\[(.+), Field\(.*?\)\]", r"\1"),  # pydantic's part of a type
    # Only kernels that run on every machine: the others need packages or GPUs.
    (r"(?ms)^ATTENTION_BACKENDS = \{.*?^\}", ATTENTION),
)


def modeling_files() -> dict[str, str]:
    """Return the text of each file by its name."""
    needed: dict[str, set[str]] = {}  # names by module
    queue = [(ENTRY, name) for name in _module(ENTRY).statements]
    while queue:
        module, name = queue.pop()
        if name not in needed.setdefault(module, set()):
            needed[module].add(name)
            queue += _module(module).uses(name)
    files = {f"{_file_name(module)}.py": _module(module).render(names) for module, names in needed.items()}
    others = sorted(needed.keys() - {ENTRY})
    header = HEADER.replace("FILES", "".join(f'\n    "{_file_name(module)}",' for module in others) + "\n")
    for module in others:
        name = min(needed[module] & _module(module).statements.keys() or needed[module])
        header += f"from .{_file_name(module)} import {name} as _{_file_name(module)}\n"
    return files | {f"{MODELING}.py": header + files[f"{MODELING}.py"].partition(FUTURE)[2]}


def _file_name(module: str) -> str:
    return MODELING if module == ENTRY else module.removeprefix("training.").replace(".", "_")


class _Module:
    """A source file: its imports and its statements, by the names that they define."""

    def __init__(self, name: str):
        self.name, self.text = name, REPLACED.get(name) or Path(find_spec(name).origin).read_text(encoding="utf-8")
        for pattern, replacement in REWRITES:
            self.text = re.sub(pattern, replacement, self.text)
        self.docstring, *self.body = ast.parse(self.text).body
        self.imports: dict[str, tuple[str, str]] = {}  # (module, name there); module "" for `import x`
        self.statements: dict[str, ast.stmt] = {}
        for node in self.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                self.imports |= {_bound(alias): (getattr(node, "module", ""), alias.name) for alias in node.names}
            else:  # a statement that defines nothing goes by its line
                self.statements |= dict.fromkeys(_defined(node) or [f"~{node.lineno}"], node)

    def uses(self, name: str) -> list[tuple[str, str]]:
        """Return (module, name) of all that a name brings along."""
        if name in self.imports:
            return [self.imports[name]] if _is_ours(self.imports[name][0]) else []
        node = self.statements[name]
        used = [(self.name, other) for other in _names(node) if other in self.statements or other in self.imports]
        for inner in ast.walk(node):
            if isinstance(inner, ast.ImportFrom) and _is_ours(inner.module):
                used += [(inner.module, alias.name) for alias in inner.names]
        for other, statement in self.statements.items():  # such as `@name.register_fake`, or `name[...] = ...`
            parts = getattr(statement, "decorator_list", [statement] if other.startswith("~") else [])
            used += [(self.name, other)] * any(name in _names(part) for part in parts)
        return used

    def render(self, names: set[str]) -> str:
        """Return the file with these names."""
        lines = []
        for node in self.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module, aliases = getattr(node, "module", ""), [alias for alias in node.names if _bound(alias) in names]
                if _is_ours(module):
                    node = ast.ImportFrom(_file_name(module), level=1)
                node.names = aliases
                lines += [ast.unparse(node)] * bool(aliases)
        kept = dict.fromkeys(node for name, node in self.statements.items() if name in names)
        imports = "\n".join([_text(self.text, self.docstring), "", FUTURE, "", *lines])
        return "\n\n\n".join([imports, *(_text(self.text, node) for node in kept)]) + "\n"


_module = cache(_Module)


def _is_ours(module: str) -> bool:
    return module.startswith("training.")


def _bound(alias: ast.alias) -> str:
    """Return the name that an import defines."""
    return alias.asname or alias.name.split(".")[0]


def _names(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _defined(node: ast.stmt) -> list[str]:
    """Return the names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    return [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)]


def _text(text: str, node: ast.stmt) -> str:
    """Return the statement as it is written, with its decorators and the comment above it."""
    lines = text.splitlines()
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    statement = "\n".join(lines[first : node.end_lineno])
    return re.sub(r"from (training\.[\w.]+) import", lambda match: f"from .{_file_name(match[1])} import", statement)
