"""A model's folder on disk: JSON and safetensors, written, and read with every flaw a line that names the file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.errors import UserError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # what Transformers takes for one file at most


def save(folder: Path, hf: dict, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Write config.json, where `dtype` is named, generation_config.json and the tensors, in one file or several.

    Raises OSError or SafetensorError where the disk refuses.
    """
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / CONFIG, hf | {"dtype": str(dtype).removeprefix("torch.")})
    _write_json(folder / "generation_config.json", {name: hf[name] for name in ("bos_token_id", "eos_token_id")})
    # Copies: tensors that share memory would count as one, such as the experts, which are views of one tensor.
    alone = {"copy": True, "memory_format": torch.contiguous_format}
    copies = {name: tensor.to("cpu", **alone) for name, tensor in tensors}
    save_torch_state_dict(copies, folder, max_shard_size=SHARD_BYTES, metadata={"format": "pt"})


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """An object of JSON. Raises UserError that names the file."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: not there") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object")
    return found


class Stored(NamedTuple):
    """A tensor in an open file."""

    file: Any
    name: str

    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def read(self) -> Tensor:
        return self.file.get_tensor(self.name)


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Stored]]:
    """The weights of a folder by their names, to be read one at a time.

    Raises UserError that names the file which is missing or damaged.
    """
    with ExitStack() as stack:
        found: dict[str, Stored] = {}
        for path in _shards(folder):
            try:
                shard = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: damaged, or not safetensors: {' '.join(str(error).split())}") from None
            found |= {name: Stored(shard, name) for name in shard.keys()}  # noqa: SIM118 (a file, not a dict)
        yield found


def _shards(folder: Path) -> list[Path]:
    """The files that hold a folder's weights."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        named = read_json(folder / INDEX).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()):
            raise UserError(f"{folder / INDEX}: no weight_map from tensors to files")
        shards = [folder / shard for shard in sorted(set(named.values()))]
        for shard in shards:
            if shard.parent != folder or not shard.is_file():
                raise UserError(f"{shard}: not there, though {INDEX} names it")
        return shards
    pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
    why = (
        "; pickled weights are not read; convert them to safetensors, with Transformers: "
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('elsewhere')"
    )
    raise UserError(f"{folder}: no {SINGLE} and no {INDEX} here" + (why if pickled else ""))
