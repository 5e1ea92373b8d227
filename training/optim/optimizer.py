"""Optimizers, one file each, over named parameters; and the learning rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.config import AdamWConfig, MuonConfig
from training.optim.muon import MatrixMap, Muon
from training.optim.schedule import SCHEDULES, lr_factor

__all__ = ["OPTIMIZERS", "SCHEDULES", "FullShapes", "Muon", "Optimizer", "lr_factor"]

STATE = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum",)}
Named = list[tuple[str, nn.Parameter, str]]  # name, parameter, kind


class FullShapes(NamedTuple):
    """What an optimizer of rows is told of the whole parameters: their shapes, and how matrices come together."""

    shapes: dict[nn.Parameter, torch.Size]
    map_matrices: MatrixMap


def _adamw(section: AdamWConfig, named: Named) -> torch.optim.Optimizer:
    """torch's fused AdamW; decay on matrices only, embeddings at their own rate."""

    def group(kinds: tuple[str, ...], lr: float, weight_decay: float) -> dict:
        return {"params": [p for _, p, kind in named if kind in kinds], "lr": lr, "weight_decay": weight_decay}

    groups = [
        group(("matrix", "router"), section.learning_rate, section.weight_decay),
        group(("embedding",), section.embedding_learning_rate or section.learning_rate, 0.0),
        group(("vector",), section.learning_rate, 0.0),
    ]
    betas = (section.beta1, section.beta2)
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=betas, eps=section.eps, fused=True)


def adamw(
    section: AdamWConfig,
    named: Named,
    dtype: torch.dtype,  # noqa: ARG001 (one signature)
    whole: FullShapes | None,  # noqa: ARG001
) -> list[torch.optim.Optimizer]:
    """AdamW for everything."""
    return [_adamw(section, named)]


def muon(
    section: MuonConfig, named: Named, dtype: torch.dtype, whole: FullShapes | None
) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for embeddings, routers and vectors."""
    matrices = [p for _, p, kind in named if kind == "matrix"]
    orthogonal = Muon(
        matrices,
        lr=section.muon_learning_rate,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
        ns_steps=section.ns_steps,
        dtype=dtype,
        **({} if whole is None else whole._asdict()),
    )
    return [orthogonal, _adamw(section, [entry for entry in named if entry[2] != "matrix"])]


OPTIMIZERS: dict[type, Callable[..., list[torch.optim.Optimizer]]] = {AdamWConfig: adamw, MuonConfig: muon}


class Optimizer:
    """The section's optimizers as one, its state as named tensors.

    `kinds` says for every name whether it is a "matrix", an "embedding", a "router" or a "vector";
    `dtype` is the type of Muon's products. Parameters may be rows of `whole` ones; their state then is too.
    """

    def __init__(
        self,
        section: AdamWConfig | MuonConfig,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        kinds: dict[str, str],
        dtype: torch.dtype = torch.float32,
        whole: FullShapes | None = None,
    ):
        named = [(name, p, kinds[name]) for name, p in named_parameters]
        self.optimizers = OPTIMIZERS[type(section)](section, named, dtype, whole)
        self._names = {p: name for name, p, _ in named}
        self._peaks = [(group, group["lr"]) for part in self.optimizers for group in part.param_groups]

    def step(self, lr_factor: float) -> None:
        """Update every parameter at `lr_factor` times its peak learning rate."""
        for group, peak in self._peaks:
            group["lr"] = peak * lr_factor
        for part in self.optimizers:
            part.step()

    def allocate_missing_state(self) -> list[Tensor]:
        """Memory of the size that the state will take, where no step was taken yet."""
        return [
            torch.empty_like(p)
            for part in self.optimizers
            for group in part.param_groups
            for p in group["params"]
            for what in STATE[type(part)]
            if what != "step" and not part.state.get(p)
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Every state tensor by "<parameter>/<what>"."""
        return {
            f"{self._names[p]}/{what}": tensor
            for part in self.optimizers
            for p, state in part.state.items()
            for what, tensor in state.items()
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state_dict`. Raises KeyError where it is not the state of these parameters and optimizers."""
        owners = {self._names[p]: (part, p) for part in self.optimizers for g in part.param_groups for p in g["params"]}
        expected = {f"{name}/{what}" for name, (part, _) in owners.items() for what in STATE[type(part)]}
        # Empty: no step was taken yet, every one overflowed in fp16.
        if tensors and (strange := sorted(expected ^ tensors.keys())):
            raise KeyError(f"optimizer state {strange[0]}")
        for key, tensor in tensors.items():
            name, _, what = key.rpartition("/")
            part, p = owners[name]
            # AdamW counts its steps on the device of the parameter where it is fused.
            part.state[p][what] = tensor.to(p.device)
