"""What `init_from` names: the sizes and the weights that a run begins with.

The folder's own model is taken whole. Options that are given may repeat it; they may differ only in what leaves it
the same model to begin with: a shorter context, more rows for the vocabulary, how documents are packed, and how
experts are balanced. Once a run has begun, its own folder says all that is asked here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from training import cli, restart
from training.config import Config, ModelConfig
from training.errors import UserError
from training.model import hf
from training.model.hf.layers import pattern, written_out

# Of training; no part of the model.
BALANCING = {"balance", "bias_rate", "switch_weight", "z_loss_weight", "jitter", "capacity_factor"}
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def options(config: Config, *, fresh: bool = False) -> Config:
    """The options with the model's section as `init_from` has it; where there is no `init_from`, as they are.

    Of the folder only config.json is read, and not even that where the run has begun already, unless it is to
    start over (`fresh`). Raises UserError for what cannot be read, and for options that say something else.
    """
    if config.init_from is None:
        return config
    begun = None if fresh else _begun(config)
    if begun is None:
        _, theirs = hf.read_config(_folder(config.init_from, ["*.json"]), hf.READABLE)
        model = _fitted(config.model, theirs, config.init_from)
    else:
        model = _fitted(config.model, begun, f"{restart.folder_of(config)}")
    try:
        return Config.model_validate(config.model_dump() | {"model": model.model_dump()})
    except ValidationError as error:
        raise UserError(f"init_from {config.init_from}: {hf.one_line(error)}") from None


def weights(config: Config) -> dict[str, Tensor]:
    """The weights of `init_from`, float32, in the sizes that `options` gave the model.

    Rows beyond the folder's vocabulary are the mean of its rows: tokens that are as likely as any, to begin with.
    """
    folder = _folder(config.init_from, ["*.json", "*.safetensors"])
    architecture, theirs = hf.read_config(folder, hf.READABLE)
    _fitted(config.model, theirs, config.init_from)
    found = hf.read_weights(folder, architecture, theirs)
    if "wpe.weight" in found:
        found["wpe.weight"] = found["wpe.weight"][: config.model.n_positions]
    for name in found.keys() & {"wte.weight", "head.weight"}:
        mean_C = found[name].mean(dim=0, dtype=torch.float64).float()  # float64: the same on any number of threads
        n_new = config.model.vocab_size - theirs.vocab_size
        found[name] = torch.cat([found[name], mean_C.expand(n_new, -1)])
    return found


def _begun(config: Config) -> ModelConfig | None:
    """The model of the run in this one's folder, where it began from the same `init_from`."""
    kept = restart.folder_of(config) / "config.yaml"
    if not kept.is_file():
        return None
    begun = cli.load(kept)
    return begun.model if begun.init_from == config.init_from else None


def _folder(name: str, patterns: list[str]) -> Path:
    """The local folder, or else the hub's files that match, downloaded. Raises UserError where there is neither."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or not HUB_NAME.fullmatch(name):
        raise UserError(f"init_from {name}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the network's and the hub's errors have no common class
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise UserError(
            f"init_from {name}: no such folder, and not loaded from the Hugging Face hub: "
            f"{type(error).__name__}: {reason}"
        ) from None


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
    layers = zip(given.layers(), written_out(given), theirs.layers(), written_out(theirs), strict=True)
    for i, (asked, mine, block, known) in enumerate(layers):
        for part in sorted(asked.model_fields_set & {"mixer", "ffn"}):
            for name in ("type", *sorted(getattr(asked, part).model_fields_set - BALANCING)):
                one, other = (getattr(getattr(layer, part), name) for layer in (mine, known))
                if one != other:
                    raise UserError(
                        f"model.blocks: {part}.{name} of layer {i} is {one}, and {where} has {other}; leave it out"
                    )
        balancing = {name: getattr(asked.ffn, name) for name in asked.ffn.model_fields_set & BALANCING}
        yield {"mixer": block.mixer.model_dump(), "ffn": block.ffn.model_dump() | balancing}
