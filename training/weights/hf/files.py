"""Reading of a model's JSON and safetensors files; every error names the file."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.errors import UserError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """Return an object of JSON. Raises UserError that names the file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: not there") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


class StoredTensor(NamedTuple):
    """A tensor in an open file."""

    file: Any
    name: str

    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """Open a folder's weights by their names, to be read one at a time.

    Raises UserError that names the missing or damaged file.
    """
    with ExitStack() as stack:
        stored: dict[str, StoredTensor] = {}
        for path in _shards(folder):
            try:
                shard = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: damaged, or not safetensors: {' '.join(str(error).split())}") from None
            stored |= {name: StoredTensor(shard, name) for name in shard.keys()}  # noqa: SIM118 (a file, not a dict)
        yield stored


def _shards(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        shard_of = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
            raise UserError(f"{folder / INDEX}: no weight_map from tensors to files")
        shards = [folder / shard for shard in sorted(set(shard_of.values()))]
        for shard in shards:
            if shard.parent != folder or not shard.is_file():
                raise UserError(f"{shard}: not there, though {INDEX} names it")
        return shards
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
    hint = (
        "; pickled weights are not read; convert them to safetensors with Transformers: "
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('elsewhere')"
    )
    raise UserError(f"{folder}: no {SINGLE} and no {INDEX}" + (hint if pickled else ""))
