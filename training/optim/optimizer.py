"""The optimizer of a run: one or several of PyTorch's kind, chosen by its options and the kinds of parameters.

An optimizer class has `build(config, parameters, dtype=, full_shapes=)`, and declares the tensors that it keeps in
`optimizer.state[parameter]`: `state_names` of the parameter's shape, `scalar_state_names` of one number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from training.config import AdamWConfig, LionConfig, MuonConfig, OptimConfig
from training.optim.adamw import AdamW
from training.optim.lion import Lion
from training.optim.muon import Muon
from training.optim.parameters import PARAMETER_KINDS, FullShapes, NamedParameter, ParameterKind

# For each optimizer's options: the class that updates each kind of parameter, in the order of their steps.
OPTIMIZERS: dict[type[OptimConfig], dict[ParameterKind, type]] = {
    AdamWConfig: dict.fromkeys(PARAMETER_KINDS, AdamW),
    LionConfig: dict.fromkeys(PARAMETER_KINDS, Lion),
    MuonConfig: {"matrix": Muon} | dict.fromkeys(("embedding", "router", "vector"), AdamW),
}


class Optimizer:
    """The configured optimizers as one, with their state as named tensors.

    `kinds` is the kind of each parameter by name, `dtype` that of Muon's matmuls. Parameters may be rows of sharded
    ones, described by `full_shapes`; their state is sharded alike.
    """

    def __init__(
        self,
        config: OptimConfig,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        kinds: Mapping[str, ParameterKind],
        dtype: torch.dtype = torch.float32,
        full_shapes: FullShapes | None = None,
    ):
        class_of_kind = OPTIMIZERS[type(config)]
        parameters = [NamedParameter(name, p, kinds[name]) for name, p in named_parameters]
        self.optimizers = []
        for optimizer_class in dict.fromkeys(class_of_kind.values()):
            if own := [each for each in parameters if class_of_kind[each.kind] is optimizer_class]:
                self.optimizers.append(optimizer_class.build(config, own, dtype=dtype, full_shapes=full_shapes))
        self._names = {each.parameter: each.name for each in parameters}
        self._peaks = [(group, group["lr"]) for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, lr_factor: float) -> None:
        """Update every parameter at `lr_factor` times its peak learning rate."""
        for group, peak in self._peaks:
            group["lr"] = peak * lr_factor
        for optimizer in self.optimizers:
            optimizer.step()

    def allocate_missing_state(self) -> list[Tensor]:
        """Return empty tensors as large as the state that the first step will create; none after it."""
        return [
            torch.empty_like(p)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            for _ in optimizer.state_names
            if not optimizer.state.get(p)
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """Return every state tensor by "<parameter>/<state name>"."""
        return {
            f"{self._names[p]}/{state_name}": tensor
            for optimizer in self.optimizers
            for p, state in optimizer.state.items()
            for state_name, tensor in state.items()
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Load the result of `state_dict`. Raises KeyError if it is not the state of these parameters and optimizers.

        No tensors at all is valid: fp16 may have skipped every update so far.
        """
        owners = {self._names[p]: (part, p) for part in self.optimizers for g in part.param_groups for p in g["params"]}
        expected = {
            f"{name}/{state_name}"
            for name, (optimizer, _) in owners.items()
            for state_name in (*optimizer.scalar_state_names, *optimizer.state_names)
        }
        if tensors and (mismatched := sorted(expected ^ tensors.keys())):
            raise KeyError(f"optimizer state {mismatched[0]}")
        for key, tensor in tensors.items():
            name, _, state_name = key.rpartition("/")
            optimizer, p = owners[name]
            optimizer.state[p][state_name] = tensor.to(p.device)  # fused AdamW counts its steps on that device


def state_bytes(config: OptimConfig, shapes: Mapping[str, torch.Size], kinds: Mapping[str, ParameterKind]) -> int:
    """Return the bytes of the whole float32 optimizer state, without its scalars."""
    class_of_kind = OPTIMIZERS[type(config)]
    return 4 * sum(shapes[name].numel() * len(class_of_kind[kind].state_names) for name, kind in kinds.items())
