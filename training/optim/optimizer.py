"""The optimizer of a run: one `torch.optim.Optimizer` or several, each for some kinds of parameters; loss scaling.

An optimizer class takes `(config, parameters, dtype=, full_shapes=)` and declares the tensors in
`optimizer.state[parameter]`: `state_names` have the parameter's shape, `scalar_state_names` are scalars.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.config import AVERAGE, AdamWConfig, LionConfig, MuonConfig, OptimConfig
from training.optim.adamw import AdamW
from training.optim.groups import Groups, frozen_names, match_groups, split_param_groups
from training.optim.lion import Lion
from training.optim.muon import Muon
from training.optim.parameters import PARAMETER_KINDS, FullShapes, ParameterKind

# By config class: the optimizer class for each kind of parameter. They step in this order.
OPTIMIZERS: dict[type[OptimConfig], dict[ParameterKind, type]] = {
    AdamWConfig: dict.fromkeys(PARAMETER_KINDS, AdamW),
    LionConfig: dict.fromkeys(PARAMETER_KINDS, Lion),
    MuonConfig: {"matrix": Muon} | dict.fromkeys(("embedding", "router", "vector"), AdamW),
}


class Optimizer:
    """All optimizers of a run behind one interface; their state is a dict of named tensors.

    `kinds` maps parameter names to kinds; `dtype` is for Muon's matmuls. If parameters are this rank's rows,
    `full_shapes` describes the full parameters, and the optimizer state is sharded in the same way. `groups` has the
    group of each parameter in one (`match_groups`); frozen parameters have no state.
    """

    def __init__(
        self,
        config: OptimConfig,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        kinds: Mapping[str, ParameterKind],
        dtype: torch.dtype = torch.float32,
        full_shapes: FullShapes | None = None,
        groups: Groups | None = None,
    ):
        class_of_kind, self.average_config = OPTIMIZERS[type(config)], config.average
        self.averages: dict[str, Tensor] = {}  # of each parameter's weights, in its shape; {} before it begins
        groups = groups or {}
        frozen = frozen_names(groups)
        names = {p: name for name, p in named_parameters if name not in frozen}
        by_kind = {kind: [p for p, name in names.items() if kinds[name] == kind] for kind in PARAMETER_KINDS}
        self.optimizers = []
        for optimizer_class in dict.fromkeys(class_of_kind.values()):
            own = {kind: ps if class_of_kind[kind] is optimizer_class else [] for kind, ps in by_kind.items()}
            if any(own.values()):
                self.optimizers.append(optimizer_class(config, own, dtype=dtype, full_shapes=full_shapes))
        for optimizer in self.optimizers:
            split_param_groups(optimizer, {p: groups[name] for p, name in names.items() if name in groups})
        param_groups = [(optimizer, group) for optimizer in self.optimizers for group in optimizer.param_groups]
        self._peaks = [(group, group["lr"]) for _, group in param_groups]
        # By the pattern that sets it, or by the kinds of its parameters, such as "matrix+router".
        self.peak_learning_rates = {
            group.get("match") or "+".join(dict.fromkeys(kinds[names[p]] for p in group["params"])): group["lr"]
            for _, group in param_groups
            if group["params"]
        }
        self._owners = {names[p]: (optimizer, p) for optimizer, group in param_groups for p in group["params"]}

    def step(self, lr_factor: float, *, is_averaged: bool = False) -> None:
        """Update every parameter at `lr_factor` times its peak learning rate.

        The average takes part in the updates that are `is_averaged`; it begins as a copy of the weights.
        """
        for group, peak in self._peaks:
            group["lr"] = peak * lr_factor
        for optimizer in self.optimizers:
            optimizer.step()
        if self.average_config is not None and is_averaged:
            self._update_averages(self.average_config.decay)

    @torch.no_grad()
    def _update_averages(self, decay: float) -> None:
        weights = {name: p.detach() for name, (_, p) in self._owners.items()}
        if self.averages:
            torch._foreach_lerp_([self.averages[name] for name in weights], list(weights.values()), 1 - decay)
        else:
            self.averages = {name: weight.clone() for name, weight in weights.items()}

    def allocate_missing_state(self) -> list[Tensor]:
        """Return empty tensors as large as the state that later steps create; [] if all of it is there."""
        missing = [(optimizer, p) for optimizer, p in self._owners.values() if not optimizer.state.get(p)]
        tensors = [torch.empty_like(p) for optimizer, p in missing for _ in optimizer.state_names]
        if self.average_config is not None and not self.averages:
            tensors += [torch.empty_like(p) for _, p in self._owners.values()]
        return tensors

    def state_dict(self) -> dict[str, Tensor]:
        """Return every state tensor by "<parameter>/<state name>"."""
        return {
            f"{name}/{state_name}": tensor
            for name, (optimizer, p) in self._owners.items()
            for state_name, tensor in optimizer.state.get(p, {}).items()
        } | {f"{name}/{AVERAGE}": tensor for name, tensor in self.averages.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Load the result of `state_dict`. Raises KeyError if its keys do not fit these parameters and optimizers.

        An empty dict is valid: fp16 may have skipped every update so far. Averages are left out if this run has none,
        and begin later if the tensors have none.
        """
        averages = averages_in(tensors)
        if averages and self.average_config is not None:
            if mismatched := sorted(averages.keys() ^ self._owners.keys()):
                raise KeyError(f"average of {mismatched[0]}")
            self.averages = {name: averages[name].to(p.device) for name, (_, p) in self._owners.items()}
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(f"/{AVERAGE}")}
        expected = {
            f"{name}/{state_name}"
            for name, (optimizer, _) in self._owners.items()
            for state_name in (*optimizer.scalar_state_names, *optimizer.state_names)
        }
        if tensors and (mismatched := sorted(expected ^ tensors.keys())):
            raise KeyError(f"optimizer state {mismatched[0]}")
        for key, tensor in tensors.items():
            name, _, state_name = key.rpartition("/")
            optimizer, p = self._owners[name]
            optimizer.state[p][state_name] = tensor.to(p.device)  # fused AdamW keeps its step count on the device


def averages_in(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the averaged weights by parameter's name in a state of `Optimizer.state_dict`; {} if there are none."""
    return {key.removesuffix(f"/{AVERAGE}"): tensor for key, tensor in state.items() if key.endswith(f"/{AVERAGE}")}


def state_bytes(config: OptimConfig, shapes: Mapping[str, torch.Size], kinds: Mapping[str, ParameterKind]) -> int:
    """Return the bytes of the unsharded float32 optimizer state, without scalars.

    `kinds` has all parameters. Raises UserError if `config.groups` does not fit them.
    """
    class_of_kind, n_averages = OPTIMIZERS[type(config)], int(config.average is not None)
    n_states = {kind: len(class_of_kind[kind].state_names) + n_averages for kind in set(kinds.values())}
    frozen = frozen_names(match_groups(config, kinds))
    return 4 * sum(shapes[name].numel() * n_states[kind] for name, kind in kinds.items() if name not in frozen)


@dataclass
class LossScale:
    """The factor of an fp16 loss (arXiv:1710.03740): halved on overflow, doubled after 2000 good steps."""

    scale: float
    good_steps: int  # since the last overflow

    def update(self, finite: bool) -> None:
        """Adapt the scale after a step; `finite`: loss and gradient have no NaN or Inf."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps % 2000 == 0:
            self.scale *= 2
