"""The modeling file of an export: this package's own source of the network, in one file without this package.

An export so computes what was trained, and a mechanism that is added to the network is exported without a line
more. Of `config.py`, which needs pydantic, the sections become dataclasses.
"""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from pprint import pformat

import training
from training.config import BlockConfig, ModelConfig
from training.model.gpt import FEED_FORWARDS, MIXERS
from training.section import Section
from training.weights.hf.options import OPTIONS

ROOT = Path(training.__file__).parent
CONFIG, BACKENDS = "config", "back-ends"  # parts that are written below

HEADER = '''"""A GPT-2, dense or Mixture-of-Experts, for Transformers 4.57 and later.

Open the folder that this file is in with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.
It is the source that trained the model, gathered into one file; it needs torch and transformers only.
"""
'''

FUTURE = "from __future__ import annotations"

MODEL_CONFIG = '''
def model_config(options: dict) -> ModelConfig:
    """The sections of a config.json's options."""

    def section(found: dict):
        return next(kind for kind in (KINDS) if kind.type == found["type"])(**found)

    def block(found: dict) -> BlockConfig:
        return BlockConfig(**(found | {name: section(found[name]) for name in ("mixer", "ffn")}))

    return ModelConfig(**(options | {"blocks": tuple(block(found) for found in options["blocks"])}))
'''

ANY_BACKEND = """
ATTENTION_BACKENDS = {
    "sdpa": AttentionBackend(sdpa_mask, sdpa_attention),
    "reference": AttentionBackend(boolean_mask, reference_attention),
}
"""


def parts() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Files below the package and what is taken of them (nothing named: all), in order of use."""
    yield "config.py", ("Activation",)
    yield CONFIG, ()
    yield "kernels/attention/masks.py", ()
    yield "kernels/attention/reference.py", ()
    yield "kernels/attention/sdpa.py", ("sdpa_mask", "sdpa_attention")
    yield "kernels/experts.py", ()
    yield "kernels/loss.py", ()
    yield "kernels/interface.py", ()
    yield BACKENDS, ()
    yield "model/cache.py", ()
    yield "model/layers.py", ()
    mechanisms = [*MIXERS.values(), *FEED_FORWARDS.values()]
    for module in dict.fromkeys(mechanism.__module__ for mechanism in mechanisms):
        yield module.removeprefix("training.").replace(".", "/") + ".py", ()
    yield "model/gpt.py", ()
    yield "weights/hf/modeling.py", ()


def source() -> str:
    """The modeling file. An assertion fails where two parts use a name, or one a name that no part defines."""
    imports: dict[str, set[str]] = {}  # names by module; none for the module itself
    wanted: set[str] = set()
    defined: list[str] = []
    texts = []
    for name, taken in parts():
        text = {CONFIG: _sections, BACKENDS: lambda: ANY_BACKEND}.get(name, (ROOT / name).read_text)()
        tree = ast.parse(text)
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "training":
                wanted |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not taken:
                imports.setdefault(node.module, set()).update(alias.name for alias in node.names)
            elif isinstance(node, ast.Import) and not taken:
                imports.setdefault(ast.unparse(node), set())
        kept = [node for node in tree.body if _is_code(node) and (not taken or set(_names(node)) & set(taken))]
        defined += [found for node in kept for found in _names(node)]
        title = "# " + f" {name} ".center(98, "-")
        texts.append("\n\n\n".join([title, *(_with_comments(text, node) for node in kept)]))
    twice = {name for name in defined if defined.count(name) > 1}
    assert not twice, f"two parts of the modeling file define {twice}"
    missing = {name for name in wanted - set(defined) if any(name in text for text in texts)}
    del imports["__future__"]
    lines = [
        f"from {module} import {', '.join(sorted(names))}" if names else module for module, names in imports.items()
    ]
    bundled = "\n\n\n".join([HEADER + "\n".join(["", FUTURE, "", *sorted(lines)]), *texts]) + "\n"
    missing &= {node.id for node in ast.walk(ast.parse(bundled)) if isinstance(node, ast.Name)}
    assert not missing, f"no part of the modeling file defines {missing}"
    return bundled


def _is_code(node: ast.stmt) -> bool:
    """Neither an import nor a docstring."""
    return not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)


def _names(node: ast.stmt) -> Iterable[str]:
    """What a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets]


def _with_comments(text: str, node: ast.stmt) -> str:
    """The statement as it is written, with its decorators and the comment above it."""
    lines = text.splitlines()
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
    while first and lines[first - 1].startswith("#"):
        first -= 1
    return "\n".join(lines[first : node.end_lineno])


def _sections() -> str:
    """config.py's sections of the network as dataclasses, and the function that makes them of a dictionary."""
    kinds = [*MIXERS, *FEED_FORWARDS]
    classes = [_dataclass(kind) for kind in kinds] + [_dataclass(BlockConfig), _dataclass(ModelConfig)]
    layers = textwrap.indent(textwrap.dedent(inspect.getsource(ModelConfig.layers)), "    ")
    made = MODEL_CONFIG.replace("KINDS", ", ".join(kind.__name__ for kind in kinds))
    options = (
        f"# Every option of the network and its default.\nOPTIONS = {pformat(OPTIONS, sort_dicts=False, width=100)}"
    )
    return "\n\n".join(["from dataclasses import dataclass", *classes, layers, options, made])


def _dataclass(section: type[Section]) -> str:
    lines = ["@dataclass(frozen=True)", f"class {section.__name__}:", f'    """{section.__doc__}"""', ""]
    for name, field in section.model_fields.items():
        default = field.default if isinstance(field.default, str | int | float | bool | None) else None
        if field.description:
            lines.append(f"    # {field.description}")
        kind = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
        kind = kind.replace("typing.", "") if "Section" not in kind and "config." not in kind else "object"
        lines.append(f"    {name}: {kind} = {json.dumps(default) if isinstance(default, str) else default}")
    return "\n".join(lines)
