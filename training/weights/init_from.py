"""What `init_from` names: the sizes and the weights that a run begins with.

The folder's own model is taken whole. Options that are given may repeat it; they may differ only in what leaves it
the same model to begin with: a shorter context, more rows for the vocabulary, how documents are packed, how experts
are balanced, and experts in place of a dense layer (`upcycle.py`). Once a run has begun, its own folder says all that
is asked here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from training.config import Config, ModelConfig
from training.errors import UserError, library_error
from training.kernels.attention.masks import find_documents
from training.model import GPT
from training.options import cli
from training.weights import hf, upcycle
from training.weights.hf.layers import pattern, with_explicit_sizes

if TYPE_CHECKING:
    from training.engine.build import Run

# Of training; no part of the model.
BALANCING = {"balance", "bias_rate", "switch_weight", "z_loss_weight", "jitter", "capacity_factor"}
# What upcycling is checked on, at most: samples, tokens of them all, and of one, for scores in float64 take memory.
SAMPLES, TOKENS, LONGEST = 16, 4096, 2048
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def resolve_init_from(config: Config, *, fresh: bool = False) -> Config:
    """The options with the model's section as `init_from` has it; where there is no `init_from`, as they are.

    Of the folder only config.json is read, and not even that where the run has begun already, unless it is to
    start over (`fresh`). Raises UserError for what cannot be read, and for options that say something else.
    """
    if config.init_from is None:
        return config
    begun = None if fresh else _begun(config)
    if begun is None:
        _, theirs = hf.read_config(_folder(config, ["*.json"]), hf.READABLE)
        model = _fitted(config.model, theirs, config.init_from)
        if config.upcycle_noise is not None and not upcycle.upcycled_layers(theirs, model):
            raise UserError(f"upcycle_noise: no layer that is dense in {config.init_from} is to become experts")
    else:
        model = _fitted(config.model, begun, f"{config.run_dir}")
    try:
        return Config.model_validate(config.model_dump() | {"model": model.model_dump()})
    except ValidationError as error:
        raise UserError(f"init_from {config.init_from}: {hf.one_line(error)}") from None


def initialize(run: Run) -> None:
    """Give a run's model the weights of `init_from`; where layers are upcycled, see that this changed nothing.

    Raises UserError where it did.
    """
    config = run.config
    theirs, found = load_pretrained(config)
    if upcycle.upcycled_layers(theirs, config.model):
        found = _upcycled(run, theirs, found)
    found = _initial(run) | found
    run.layout.load_full(lambda name, _shape: found[name])


def _upcycled(run: Run, theirs: ModelConfig, dense: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the run's model, made of a dense one's; what this changed is said on standard error."""
    config = run.config
    cut = upcycle.upcycled_layers(theirs, config.model)
    found = upcycle.upcycle_weights(dense, theirs, config.model, _initial(run))
    # float64: in float32, rounding alone changes the logits of a model like GPT-2 by 1e-3.
    before, after = (GPT(model, dtype=torch.float64).to(_device(run)) for model in (theirs, config.model))
    before.load_state_dict(before.state_dict() | dense)
    after.load_state_dict(after.state_dict() | found)
    samples = list(_samples(run))
    change = upcycle.compare(before, after, samples)
    lines = [f"upcycled {config.init_from}: {upcycle.describe(cut)}; {change}"]
    if not change.is_exact:
        raise UserError(f"{lines[0]}: more than rounding explains ({upcycle.MAX_LOGIT_CHANGE:g}), so nothing is begun")
    if config.upcycle_noise is not None:
        found = upcycle.with_noise(found, cut, config.upcycle_noise, config.seed)
        after.load_state_dict(after.state_dict() | found)
        lines.append(
            f"with noise {config.upcycle_noise:g}: loss {upcycle.compare(before, after, samples).loss_after:.4f}"
        )
    if run.world.is_main:
        print(*lines, sep="\n", file=sys.stderr)
    return found


def _initial(run: Run) -> dict[str, Tensor]:
    """The run's weights, all of them, where there is nothing to begin with."""
    tensors = run.whole.state_dict().items()
    return {name: run.whole.initial_value(name, tensor.shape, run.config.seed) for name, tensor in tensors}


def _device(run: Run) -> torch.device:
    """The run's, where that has float64."""
    return torch.device("cpu") if run.world.device.type == "mps" else run.world.device


def _samples(run: Run) -> Iterator[upcycle.Sample]:
    """Samples of the validation set, spread evenly over it, of long ones the beginning."""
    batches, model, device = run.val_batches, run.config.model, _device(run)
    n_tokens = min(model.n_positions, LONGEST)
    n_samples = min(SAMPLES, TOKENS // n_tokens, batches.n_samples)
    for window in np.arange(n_samples) * batches.n_samples // n_samples:
        tokens_BT, targets_BT = (torch.from_numpy(array[:, :n_tokens]) for array in batches.at([window]))
        apart = None
        if model.isolate_documents:
            apart = find_documents(tokens_BT, run.dataset.tokenizer.end_of_text).to(device)
        yield tokens_BT.to(device), targets_BT.to(device), apart


def load_pretrained(config: Config) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model of `init_from` in the sizes of `resolve_init_from`: its configuration, and its weights, float32.

    Rows beyond the folder's vocabulary are the mean of its rows: tokens that are as likely as any, to begin with.
    """
    folder = _folder(config, ["*.json", "*.safetensors"])
    architecture, theirs = hf.read_config(folder, hf.READABLE)
    _fitted(config.model, theirs, config.init_from)
    found = hf.read_weights(folder, architecture, theirs)
    if "wpe.weight" in found:
        found["wpe.weight"] = found["wpe.weight"][: config.model.n_positions]
    for name in found.keys() & {"wte.weight", "head.weight"}:
        mean_C = found[name].mean(dim=0, dtype=torch.float64).float()  # float64: the same on any number of threads
        n_new = config.model.vocab_size - theirs.vocab_size
        found[name] = torch.cat([found[name], mean_C.expand(n_new, -1)])
    return config.model.model_copy(update={"blocks": theirs.blocks}), found


def _begun(config: Config) -> ModelConfig | None:
    """The model of the run in this one's folder, where it began from the same `init_from`."""
    kept = config.run_dir / "config.yaml"
    if not kept.is_file():
        return None
    begun = cli.load_config(kept)
    return begun.model if begun.init_from == config.init_from else None


def _folder(config: Config, patterns: list[str]) -> Path:
    """The local folder, of a run its model's, or else the hub's files that match, downloaded.

    Raises UserError where there is neither.
    """
    name = config.init_from
    folder = Path(name).expanduser()
    if folder.resolve().is_relative_to(config.run_dir.resolve()):
        raise UserError(f"init_from {name}: this run cannot begin with itself; choose another --name")
    if folder.is_dir() and ((folder / "config.json").exists() or not (folder / "config.yaml").exists()):
        return folder
    if folder.is_dir():
        if not (folder / "model").is_dir():
            raise UserError(
                f"init_from {name}: this run is not finished and has no model; let it finish, or name the folder that "
                f"`python -m training.export --run {name}` writes"
            )
        return folder / "model"
    if folder.exists() or not HUB_NAME.fullmatch(name):
        raise UserError(f"init_from {name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        where = f"init_from {name}: no such folder, and not loaded from the Hugging Face hub"
        raise UserError(f"{where}: {library_error(error)}") from None


def _fitted(given: ModelConfig, theirs: ModelConfig, where: str) -> ModelConfig:
    """Their model with what was given and may differ. Raises UserError for what may not."""
    changes: dict[str, Any] = {}
    for name in sorted(given.model_fields_set - {"blocks"}):
        mine, known = getattr(given, name), getattr(theirs, name)
        if mine == known or (name == "vocab_size" and mine is None):
            continue
        cropped, padded = name == "n_positions" and mine < known, name == "vocab_size" and mine > known
        if not (cropped or padded or name == "isolate_documents"):
            raise UserError(f"model.{name}: {mine} is given, and {where} has {known}; leave it out")
        changes[name] = mine
    if "blocks" in given.model_fields_set:
        changes["blocks"] = pattern(list(_fitted_blocks(given, theirs, where)))
    return ModelConfig.model_validate(theirs.model_dump() | changes)


def _fitted_blocks(given: ModelConfig, theirs: ModelConfig, where: str) -> Iterator[dict]:
    """Each layer of theirs, as options, with the balancing that was given."""
    sizes = {name: getattr(theirs, name) for name in ("n_layer", "n_head", "n_embd", "position")}
    given = given.model_copy(update=sizes)
    layers = zip(given.layers(), with_explicit_sizes(given), theirs.layers(), with_explicit_sizes(theirs), strict=True)
    for i, (asked, mine, block, known) in enumerate(layers):
        experts = (mine.ffn.type, known.ffn.type) == ("moe", "mlp")
        for part in sorted(asked.model_fields_set & ({"mixer"} if experts else {"mixer", "ffn"})):
            for name in ("type", *sorted(getattr(asked, part).model_fields_set - BALANCING)):
                one, other = (getattr(getattr(layer, part), name) for layer in (mine, known))
                if one != other:
                    raise UserError(
                        f"model.blocks: {part}.{name} of layer {i} is {one}, and {where} has {other}; leave it out"
                    )
        if experts:
            ffn = upcycle.resolve_experts(asked.ffn, known.ffn, theirs.n_embd, i, where).model_dump()
        else:
            ffn = block.ffn.model_dump() | {n: getattr(asked.ffn, n) for n in asked.ffn.model_fields_set & BALANCING}
        yield {"mixer": block.mixer.model_dump(), "ffn": ffn}
