"""The model that `init_from` names: the sizes and the weights that a run starts from.

Options of the `model` section may repeat the folder's. They may differ only if the model still computes the same at the
start: a shorter context, more rows for the vocabulary, packing of documents, balancing of experts, parts that begin as
zeros (`bigram_rows`, `short_conv`), and experts in place of a dense layer (`upcycle.py`). A run that has started no
longer needs the folder.
"""

import hashlib
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from training.batch import Batch
from training.config import Config, ModelConfig
from training.data import Dataset
from training.data.loader import build_samples
from training.data.tokenizer import Tokenizer
from training.data.tokenizer_config import read_fields
from training.distributed.sharded_model import ShardedModel
from training.distributed.world import World
from training.errors import UserError, library_error
from training.model import GPT, initial_value, model_stats
from training.options import cli
from training.terminal import print_note
from training.weights import hf, upcycle
from training.weights.hf.architecture import BALANCING, pattern

# Limits for checking an upcycled model: samples, tokens in all, tokens of a sample (float64 scores need memory).
MAX_SAMPLES, MAX_TOKENS, MAX_LENGTH = 16, 4096, 2048
BEGIN_AS_ZEROS = {"bigram_rows", "short_conv"}  # options of parts that a run may add, as they change nothing at first
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_init_from(config: Config, *, fresh: bool = False, branch: str | None = None) -> Config:
    """Return the options with the `model` section of `init_from`; unchanged without `init_from`.

    Reads config.json of the folder and, unless it is on the hub, the names and shapes of its tensors; if the run has
    started and is not `fresh` (start over), its own config.yaml, and for a `branch` (path of a run or checkpoint) that
    run's. Raises UserError for a folder that cannot be read and for options that contradict it.
    """
    if config.init_from is None:
        return config
    if (saved := _saved_config(config, fresh=fresh, branch=branch)) is not None:
        model = _merge(config.model, saved.model, str(saved.run_dir))
    else:
        folder = _folder(config, ["*.json"])
        architecture, theirs = hf.read_config(folder)
        if Path(config.init_from).is_dir() and any(folder.glob("*.safetensors")):
            hf.open_weights(folder, architecture, theirs)  # config.json may be wrong about sizes
        model = _merge(config.model, theirs, config.init_from)
        if config.upcycle_noise is not None and not upcycle.upcycled_layers(theirs, model):
            raise UserError(f"upcycle_noise: no layer that is dense in {config.init_from} becomes experts")
    try:
        return Config.model_validate(config.model_dump() | {"model": model.model_dump()})
    except ValidationError as error:
        raise UserError(f"init_from {config.init_from}: {hf.one_line(error)}") from None


def _saved_config(config: Config, *, fresh: bool, branch: str | None) -> Config | None:
    """Return the options of the started run, or of the one it branches off from, if their `init_from` is the same."""
    folders = [] if fresh else [config.run_dir]
    folders += [] if branch is None else [Path(branch), Path(branch).parent.parent]
    for file in (folder / "config.yaml" for folder in folders):
        if file.is_file():
            with suppress(UserError):  # damaged: the folder of init_from has the same options
                saved = cli.load_config(file)
                return saved if saved.init_from == config.init_from else None
    return None


def check_pretrained(config: Config) -> ModelConfig:
    """Return the model of `init_from`. Raises UserError if its config.json does not describe the stored tensors."""
    folder = _folder(config, ["*.json", "*.safetensors"])
    architecture, theirs = hf.read_config(folder)
    hf.open_weights(folder, architecture, theirs)
    return theirs


def load_weights(sharded: ShardedModel, config: Config, dataset: Dataset, world: World) -> None:
    """Load the weights of `init_from` into a run's model; the main rank reports on layers that become experts.

    Raises UserError if the weights cannot be read, or if upcycling changed the model's logits.
    """
    shapes = model_stats(config.model).shapes
    weights = {name: initial_value(name, shape, config.model, config.seed) for name, shape in shapes.items()}
    theirs, pretrained = load_pretrained(config)
    if layers := upcycle.upcycled_layers(theirs, config.model):
        device = torch.device("cpu") if world.device.type == "mps" else world.device  # MPS has no float64
        samples = list(_samples(config, dataset, device))
        # float64: in float32, rounding alone changes the logits of a model like GPT-2 by 1e-3.
        before, after = (
            GPT(model, dtype=torch.float64, n_vocab=sharded.model.n_vocab).to(device)
            for model in (theirs, config.model)
        )
        before.load_state_dict(before.state_dict() | pretrained)
        pretrained = upcycle.upcycle_weights(pretrained, layers, weights)
        after.load_state_dict(after.state_dict() | pretrained)
        change = upcycle.compare(before, after, samples)
        lines = [f"upcycled {config.init_from}: {upcycle.describe(layers)}; {change}"]
        if not change.is_exact:
            problem = f"more than rounding explains ({upcycle.MAX_LOGIT_CHANGE:g}); the run does not start"
            raise UserError(f"{lines[0]}: {problem}")
        if config.upcycle_noise is not None:
            pretrained = upcycle.with_noise(pretrained, layers, config.upcycle_noise, config.seed)
            after.load_state_dict(after.state_dict() | pretrained)
            loss = upcycle.compare(before, after, samples).loss_after
            lines.append(f"with noise {config.upcycle_noise:g}: loss {loss:.4f}")
        del before, after, samples  # 8 bytes per parameter
        if world.is_main:
            for line in lines:
                print_note(line)
    if world.is_main and (warning := other_separator(config, dataset.tokenizer)):
        print_note(warning)
    weights |= pretrained
    sharded.load_full(lambda name, _shape: weights[name])


def load_pretrained(config: Config) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the model of `init_from` with the sizes of `config.model`: its configuration and its float32 weights.

    Rows beyond the folder's vocabulary are the mean of its rows: new tokens start with the mean logit.
    """
    folder = _folder(config, ["*.json", "*.safetensors"])
    architecture, theirs = hf.read_config(folder)
    _merge(config.model, theirs, config.init_from)
    weights = hf.read_weights(folder, architecture, theirs)
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: config.model.n_positions]
    for name in weights.keys() & {"wte.weight", "head.weight"}:
        mean_C = weights[name].mean(dim=0, dtype=torch.float64).float()  # float64: the same on any number of threads
        n_new = config.model.vocab_size - theirs.vocab_size
        weights[name] = torch.cat([weights[name], mean_C.expand(n_new, -1)])
    return config.model.model_copy(update={"blocks": theirs.blocks}), weights


def other_separator(config: Config, tokenizer: Tokenizer) -> str | None:
    """Return a warning if the model of `init_from` learned another end-of-text token than the run's."""
    folder = _folder(config, ["*.json"])
    ids = read_fields(folder / "config.json").get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids]
    if tokenizer.end_of_text in ids or ids in ([], [None]):
        return None
    ours = f"data.tokenizer has token {tokenizer.end_of_text}, {tokenizer.separator}"
    advice = f"to use its own tokenizer, set data.tokenizer to {{type: file, path: {folder}}}"
    return f"init_from {config.init_from}: its end-of-text token is {ids[0]}, but {ours}; {advice}"


def weights_sha256(config: Config) -> str:
    """Return a hash of the weights of `init_from`, wherever they are. Raises UserError if there are none."""
    sha256 = hashlib.sha256()
    for path in hf.weight_files(_folder(config, ["*.json", "*.safetensors"])):
        with path.open("rb") as file:
            sha256.update(hashlib.file_digest(file, "sha256").digest())
    return sha256.hexdigest()


def _samples(config: Config, dataset: Dataset, device: torch.device) -> Iterator[Batch]:
    """Yield samples spread evenly over the validation set, cut to MAX_LENGTH tokens."""
    n_positions = config.model.n_positions
    samples = build_samples(dataset.val, config.model, dataset.tokenizer, too_long=config.data.too_long)
    n_tokens = min(n_positions, MAX_LENGTH)
    n_samples = min(MAX_SAMPLES, MAX_TOKENS // n_tokens)
    for index in np.concatenate(samples.evenly_spaced(n_samples * n_positions))[:n_samples]:
        yield samples.batch([index]).cropped(n_tokens).to(device)


def _folder(config: Config, patterns: list[str]) -> Path:
    """Return the folder of `init_from`, as `local_folder`."""
    if Path(config.init_from).resolve().is_relative_to(config.run_dir.resolve()):
        raise UserError(f"init_from {config.init_from}: a run cannot start from itself; choose another --name")
    return local_folder(config.init_from, patterns, "init_from")


def local_folder(name: str, patterns: list[str], option: str) -> Path:
    """Return the local folder, or a run's `model` folder, or the hub's files that match `patterns`, downloaded.

    Raises UserError that names the option if there is none.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / "config.json").exists() or not (folder / "config.yaml").exists():
            return folder
        if (folder / "model").is_dir():
            return folder / "model"
        raise UserError(
            f"{option} {name}: this run is not finished and has no model; let it finish, or name the folder that "
            f"`python -m training.export --run {name}` writes"
        )
    if folder.exists() or not HUB_NAME.fullmatch(name):
        raise UserError(f"{option} {name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        where = f"{option} {name}: no such folder, and not loaded from the Hugging Face hub"
        raise UserError(f"{where}: {library_error(error)}") from None


def _merge(ours: ModelConfig, theirs: ModelConfig, where: str) -> ModelConfig:
    """Return their model with our options where they may differ. Raises UserError for other differences."""
    # Dropout is of this training, and never inherited. Weights do not depend on the isolation of documents, so a
    # folder's `false` does not decide for rows with answers, which need it.
    changes: dict[str, Any] = {"dropout": ours.dropout, "isolate_documents": theirs.isolate_documents or None}
    for name in sorted(ours.model_fields_set - {"blocks", "dropout"}):
        value, known = getattr(ours, name), getattr(theirs, name)
        if value == known or (name == "vocab_size" and value is None):
            continue
        is_cropped, is_padded = name == "n_positions" and value < known, name == "vocab_size" and value > known
        is_new = name in BEGIN_AS_ZEROS and known is None
        if not (is_cropped or is_padded or is_new or name == "isolate_documents"):
            raise UserError(f"model.{name}: {value} is given, but {where} has {known}; leave it out")
        changes[name] = value
    if "blocks" in ours.model_fields_set:
        changes["blocks"] = pattern(list(_merge_blocks(ours, theirs, where)))
    return ModelConfig.model_validate(theirs.model_dump() | changes)


def _merge_blocks(ours: ModelConfig, theirs: ModelConfig, where: str) -> Iterator[dict]:
    """Yield each of their layers as options, with our balancing and our experts in place of dense layers."""
    ours = ours.model_copy(update={name: getattr(theirs, name) for name in ("n_layer", "n_head", "n_embd", "position")})
    configs = (ours, ours.with_explicit_sizes(), theirs, theirs.with_explicit_sizes())
    layers = zip(*(config.layers() for config in configs), strict=True)
    free = BALANCING | (set() if theirs.position == "rope" else {"rope"})
    for i, (block, explicit, known_block, known) in enumerate(layers):
        is_upcycled = (explicit.ffn.type, known.ffn.type) == ("moe", "mlp")
        for part in sorted(block.model_fields_set & ({"mixer"} if is_upcycled else {"mixer", "ffn"})):
            for name in ("type", *sorted(getattr(block, part).model_fields_set - free)):
                value, other = (getattr(getattr(layer, part), name) for layer in (explicit, known))
                if value != other:
                    raise UserError(
                        f"model.blocks: {part}.{name} of layer {i} is {value}, but {where} has {other}; leave it out"
                    )
        own = known.model_dump(exclude={"repeat", "mixer", "ffn"})
        for name in sorted(block.model_fields_set & own.keys()):
            value, other = getattr(block, name), own[name]
            if value != other and not (name in BEGIN_AS_ZEROS and other is None):
                raise UserError(f"model.blocks: {name} of layer {i} is {value}, but {where} has {other}; leave it out")
            own[name] = value
        if is_upcycled:
            ffn = upcycle.resolve_experts(block.ffn, known.ffn, theirs.n_embd, i, where).model_dump()
        else:
            balancing = {name: getattr(block.ffn, name) for name in block.ffn.model_fields_set & BALANCING}
            ffn = known_block.ffn.model_dump() | balancing
        yield own | {"mixer": known_block.mixer.model_dump(), "ffn": ffn}
