"""Reading and writing of a model's folder. No code of the folder runs; every error names the file."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from training.config import ModelConfig
from training.errors import UserError
from training.files import read_bytes
from training.model import GPT
from training.weights.hf import custom
from training.weights.hf.architecture import Architecture
from training.weights.hf.deepseek import DEEPSEEK_V3, DOTS1, GLM4_MOE
from training.weights.hf.ernie import ERNIE4_5_MOE
from training.weights.hf.gpt2 import GPT2
from training.weights.hf.llama import LLAMA, MIXTRAL
from training.weights.hf.qwen3 import QWEN3, QWEN3_MOE
from training.weights.hf.tables import copy_to_ours, one_line, to_theirs

# By `model_type`; a model is written as the first that expresses it.
ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "qwen3": QWEN3,
    "qwen3_moe": QWEN3_MOE,
    "mixtral": MIXTRAL,
    "ernie4_5_moe": ERNIE4_5_MOE,
    "dots1": DOTS1,
    "glm4_moe": GLM4_MOE,
    "deepseek_v3": DEEPSEEK_V3,
}
READABLE = ARCHITECTURES | {custom.MODEL_TYPE: custom.CustomArchitecture()}

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
SHARD_BYTES = 5_000_000_000  # the largest file that Transformers writes


def read_config(folder: Path) -> tuple[Architecture, ModelConfig]:
    """Return the architecture and the model of config.json. Raises UserError that names the file and the field."""
    path = folder / CONFIG
    hf = _read_json(path)
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in READABLE:
        problem = "no model_type" if model_type is None else f"model_type {model_type!r} is not supported"
        raise UserError(f"{path}: {problem}; supported: {', '.join(READABLE)}")
    architecture = READABLE[model_type]
    try:
        return architecture, ModelConfig.model_validate(architecture.from_hf(hf))
    except (UserError, ValidationError) as error:
        raise UserError(f"{path}: {one_line(error)}") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"{path}: not there") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content


def read_weights(folder: Path, architecture: Architecture, config: ModelConfig) -> dict[str, Tensor]:
    """Return our tensors, float32. Raises UserError if one is missing, unknown, of another shape or not finite."""
    stored, names, meta = open_weights(folder, architecture, config), architecture.names(config), _meta(config)
    ours = {part: torch.empty(meta[part].shape) for name in names for part in name.ours}
    for name in names:
        copy_to_ours(name, ours, stored[name.theirs].read())
    if config.tie_head and HEAD in stored and not torch.equal(stored[HEAD].read(), ours["wte.weight"]):
        raise UserError(f"{folder}: {HEAD} is not the embedding, though tie_word_embeddings says so")
    return ours


def open_weights(folder: Path, architecture: Architecture, config: ModelConfig) -> "dict[str, _StoredTensor]":
    """Return the stored tensors by name, unread. Raises UserError unless names and shapes are those of the model.

    config.json may be wrong about sizes, so the work is bounded by what the files hold.
    """
    stored = {name: tensor for path in weight_files(folder) for name, tensor in _open(path).items()}
    if not any(name.startswith(architecture.prefix) for name in stored):
        stored = {name if name == HEAD else architecture.prefix + name: tensor for name, tensor in stored.items()}
    stored = {name: tensor for name, tensor in stored.items() if not architecture.harmless.fullmatch(name)}
    if (n_tensors := architecture.min_tensors(config)) > len(stored):
        problem = f"{len(stored)} tensors, but {CONFIG} needs {n_tensors} or more"
        raise UserError(f"{folder}: {problem}; does it belong to these weights?")
    try:
        meta = _meta(config)
    except RuntimeError:  # sizes beyond the address space
        raise UserError(f"{folder / CONFIG}: its sizes are too large") from None
    shapes = {name.theirs: name.shape(meta) for name in architecture.names(config)}
    tied = {HEAD: tuple(meta["wte.weight"].shape)} if config.tie_head and HEAD in stored else {}
    for tensors, problem in (
        (shapes.keys() - stored.keys(), "missing"),
        (stored.keys() - shapes.keys() - tied.keys(), "unknown"),
    ):
        if tensors:
            first, *others = sorted(tensors)
            more = f" and {len(others)} more" if others else ""
            raise UserError(f"{folder}: {problem} tensors: {first}{more}; does {CONFIG} belong to these weights?")
    for name, shape in (shapes | tied).items():
        stored[name].check_shape(shape)
    return stored


def _meta(config: ModelConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        return GPT(config).state_dict()


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder, sorted. Raises UserError if there are none or one is missing."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        shard_of = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
            raise UserError(f"{folder / INDEX}: no weight_map from tensors to files")
        shards = [folder / shard for shard in sorted(set(shard_of.values()))]
        for shard in shards:
            if shard.parent != folder or not shard.is_file():
                raise UserError(f"{shard}: not there, though {INDEX} names it")
        return shards
    problem = f"{folder}: no {SINGLE} and no {INDEX}"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        convert = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained('elsewhere')"
        problem += f"; pickled weights are not read; convert them to safetensors with Transformers: {convert}"
    raise UserError(problem)


class _StoredTensor(NamedTuple):
    """A tensor in an open file, read only when needed."""

    folder: Path
    file: Any  # closes with the last reference to it
    name: str

    def check_shape(self, shape: tuple[int, ...]) -> None:
        stored = tuple(self.file.get_slice(self.name).get_shape())
        if stored != shape:
            raise UserError(f"{self.folder}: {self.name} has shape {stored}; {CONFIG} needs {shape}")

    def read(self) -> Tensor:
        values = self.file.get_tensor(self.name)
        if values.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise UserError(f"{self.folder}: {self.name} is {values.dtype}; quantized weights are not supported")
        values = values.float()
        if not values.isfinite().all():
            raise UserError(f"{self.folder}: {self.name} is not finite")
        return values


def _open(path: Path) -> dict[str, _StoredTensor]:
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged, or not safetensors: {' '.join(str(error).split())}") from None
    folder = path.parent
    return {name: _StoredTensor(folder, file, name) for name in file.keys()}  # noqa: SIM118 (not a dict)


def write_model(
    folder: Path,
    weights: dict[str, Tensor],
    config: ModelConfig,
    end_of_text: int,
    *,
    n_vocab: int | None = None,
    dtype: torch.dtype = torch.float32,
    end_tokens: Sequence[int] = (),
) -> str:
    """Write a model that opens with `AutoModelForCausalLM`; return the `model_type` that it is written as.

    Its generation ends at `end_of_text` and at `end_tokens`, such as the end of a turn.

    Rows of the embedding from `n_vocab` on are padding, and are cut off; None: there are none. Raises OSError or
    SafetensorError if a file cannot be written.
    """
    from huggingface_hub import save_torch_state_dict

    if n_vocab is not None:
        rows = {name: weights[name][:n_vocab] for name in ("wte.weight", "head.weight") if name in weights}
        weights, config = weights | rows, config.model_copy(update={"vocab_size": n_vocab})
    candidates = (name for name, a in ARCHITECTURES.items() if a.reason_unsupported(config, weights) is None)
    model_type = next(candidates, custom.MODEL_TYPE)
    architecture = READABLE[model_type]
    ids = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    # Without a `max_length`, pipelines generate 256 tokens. The model does not read the last token, hence + 1.
    generation = ids | {"eos_token_id": sorted({end_of_text, *end_tokens}) if end_tokens else end_of_text}
    generation |= {"pad_token_id": end_of_text, "max_length": config.n_positions + 1}
    hf = {"model_type": model_type, **architecture.to_hf(config), **ids, "dtype": str(dtype).removeprefix("torch.")}
    files = {CONFIG: hf, "generation_config.json": generation}
    texts = {name: json.dumps(fields, indent=2) + "\n" for name, fields in files.items()}
    if model_type == custom.MODEL_TYPE:
        texts |= custom.modeling_files()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    # Copies: the writer treats tensors that share memory as one, and the experts are views of one tensor.
    tensors = to_theirs(architecture.names(config), to_saved_dtype(weights, dtype))
    copies = {name: t.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in tensors}
    save_torch_state_dict(copies, folder, max_shard_size=SHARD_BYTES, metadata={"format": "pt"})
    return model_type


def to_saved_dtype(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights in `dtype`, but selection biases in float32: their steps are too small for other types."""
    return {name: w.float() if name.endswith("selection_bias") else w.to(dtype) for name, w in weights.items()}
