"""A model that no architecture of Transformers expresses: our options, our tensor names, and the code that runs it.

Its folder holds this package's own source: `modeling.py` and all that it imports, directly or through others. So an
export runs the code that was trained, and a new mechanism needs no code for exports. `from training.x.y import` becomes
`from .x_y import`: Transformers copies a folder's files into one package, which has no folders.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from training.config import ModelConfig
from training.errors import UserError
from training.model import model_stats
from training.weights.hf.architecture import Architecture
from training.weights.hf.tables import Name, read

MODEL_TYPE = "training_gpt"
MODELING = f"modeling_{MODEL_TYPE}"
CLASSES = {"AutoConfig": "TrainingGPTConfig", "AutoModelForCausalLM": "TrainingGPTForCausalLM"}
# Options that exports of older versions lack; their defaults are what those computed.
NEWER = {"dropout", "bigram_rows"}
ENTRY = "training.weights.hf.modeling"
IMPORT = r"(?m)^( *)from (training\.[\w.]+) import"

# The modeling file imports all other files itself, because Transformers 4.57 copies only what that file imports. It
# first drops them from sys.modules, where a folder of the same name, opened earlier, may have left its own.
ALL_FILES = """
import sys

for _name in ({names}):
    sys.modules.pop(f"{{__package__}}.{{_name}}", None)
{imports}
"""

# `section.py` without pydantic: the classes of config.py become dataclasses.
SECTION = '''"""Options as frozen dataclasses."""

from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar, Union

T = TypeVar("T")
ListOf = tuple[T, ...]
PathText = str


def option(default: Any, doc: str, **limits: Any) -> Any:  # noqa: ARG001
    return default


class Section:
    """Options of one component."""

    def __init_subclass__(cls) -> None:
        dataclass(frozen=True)(cls)

    def model_copy(self, *, update: dict[str, Any]) -> "Section":
        return replace(self, **update)

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return asdict(self)


def one_of(*variants: type) -> Any:
    return Union[variants]
'''

BACKENDS = '''"""The attention back-ends that run on every machine; the others need packages or GPUs."""

from training.kernels.attention.masks import boolean_mask
from training.kernels.attention.reference import reference_attention
from training.kernels.attention.sdpa import sdpa_attention, sdpa_mask
from training.kernels.interface import AttentionBackend

ATTENTION_BACKENDS = {
    "sdpa": AttentionBackend(sdpa_mask, sdpa_attention),
    "reference": AttentionBackend(boolean_mask, reference_attention),
}
'''

REPLACED = {
    ModelConfig.__base__.__module__: SECTION,
    "training.kernels.attention.table": BACKENDS,
    "training.kernels.attention.deterministic": '"""Not used here."""\n\ndeterministic_flash = None\n',
}


class CustomArchitecture(Architecture):
    """Our own options, and the classes of the modeling file that open them."""

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "architectures": [CLASSES["AutoModelForCausalLM"]],
            "auto_map": {auto: f"{MODELING}.{name}" for auto, name in CLASSES.items()},
            **config.model_dump(mode="json"),
        }

    def from_hf(self, hf: dict[str, Any]) -> dict[str, Any]:
        if missing := [name for name in ModelConfig.model_fields if name not in hf and name not in NEWER]:
            raise UserError(f"{missing[0]} is missing")
        read(hf, "n_layer", int)  # limits it
        return {name: hf[name] for name in ModelConfig.model_fields if name in hf}

    def names(self, config: ModelConfig) -> list[Name]:
        return [Name(f"gpt.{name}", (name,)) for name in model_stats(config).shapes]


def modeling_files() -> dict[str, str]:
    """Return the text of each Python file by its name."""
    texts, modules = {}, [ENTRY]
    for module in modules:  # the loop appends to it
        text = texts[module] = _source(module)
        modules += dict.fromkeys(name for _, name in re.findall(IMPORT, text) if name not in modules)
    others = sorted(map(_file_name, texts.keys() - {ENTRY}))
    names = "".join(f'\n    "{name}",' for name in others) + "\n"
    imports = "".join(f"\nfrom .{name} import __name__ as _{name}" for name in others)
    docstring, end, code = texts[ENTRY].partition('\n"""\n')
    texts[ENTRY] = docstring + end + ALL_FILES.format(names=names, imports=imports) + code
    return {
        f"{_file_name(module)}.py": re.sub(IMPORT, lambda match: f"{match[1]}from .{_file_name(match[2])} import", text)
        for module, text in texts.items()
    }


def _file_name(module: str) -> str:
    return MODELING if module == ENTRY else module.removeprefix("training.").replace(".", "_")


def _source(module: str) -> str:
    """Return the source of a module; of config.py, only the network's options, without pydantic's types."""
    if module in REPLACED:
        return REPLACED[module]
    text = Path(find_spec(module).origin).read_text(encoding="utf-8")
    if module == "training.config":
        text = re.sub(r"(?m)^from pydantic .*\n", "", text.partition("\n# --- data ---")[0])
        text = text.replace("-> Self:", '-> "Section":')  # Python 3.10 has no Self
        return without_unused_imports(text)
    return text


def without_unused_imports(text: str) -> str:
    """Return a module's source without the imported names that it does not use; each import is on one line."""

    def used(line: re.Match[str]) -> str:
        names = [name for name in line[2].split(", ") if len(re.findall(rf"\b{name}\b", text)) > 1]
        return f"{line[1]}{', '.join(names)}\n" if names else ""

    return re.sub(r"(?m)^(from [\w.]+ import )([\w, ]+)\n", used, text)
