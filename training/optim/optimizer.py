"""The optimizer of a run: one `torch.optim.Optimizer` or several, each for some kinds of parameters.

An optimizer class has `build(config, parameters, dtype=, full_shapes=)` and declares the tensors in
`optimizer.state[parameter]`: `state_names` have the parameter's shape, `scalar_state_names` are scalars.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from training.config import AdamWConfig, LionConfig, MuonConfig, OptimConfig
from training.optim.adamw import AdamW
from training.optim.lion import Lion
from training.optim.muon import Muon
from training.optim.parameters import PARAMETER_KINDS, FullShapes, NamedParameter, ParameterKind

# By config class: the optimizer class for each kind of parameter. They step in this order.
OPTIMIZERS: dict[type[OptimConfig], dict[ParameterKind, type]] = {
    AdamWConfig: dict.fromkeys(PARAMETER_KINDS, AdamW),
    LionConfig: dict.fromkeys(PARAMETER_KINDS, Lion),
    MuonConfig: {"matrix": Muon} | dict.fromkeys(("embedding", "router", "vector"), AdamW),
}


class Optimizer:
    """All optimizers of a run behind one interface; their state is a dict of named tensors.

    `kinds` maps parameter names to kinds; `dtype` is for Muon's matmuls. If parameters are this rank's rows,
    `full_shapes` describes the full parameters, and the optimizer state is sharded in the same way.
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
            if group := [each for each in parameters if class_of_kind[each.kind] is optimizer_class]:
                self.optimizers.append(optimizer_class.build(config, group, dtype=dtype, full_shapes=full_shapes))
        self._names = {each.parameter: each.name for each in parameters}
        self._peaks = [(group, group["lr"]) for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, lr_factor: float) -> None:
        """Update every parameter at `lr_factor` times its peak learning rate."""
        for group, peak in self._peaks:
            group["lr"] = peak * lr_factor
        for optimizer in self.optimizers:
            optimizer.step()

    def allocate_missing_state(self) -> list[Tensor]:
        """Return empty tensors as large as the state that the first step creates; [] after it."""
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
        """Load the result of `state_dict`. Raises KeyError if its keys do not fit these parameters and optimizers.

        An empty dict is valid: fp16 may have skipped every update so far.
        """
        owners = {self._names[p]: (opt, p) for opt in self.optimizers for g in opt.param_groups for p in g["params"]}
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
            optimizer.state[p][state_name] = tensor.to(p.device)  # fused AdamW keeps its step count on the device


def state_bytes(config: OptimConfig, shapes: Mapping[str, torch.Size], kinds: Mapping[str, ParameterKind]) -> int:
    """Return the bytes of the unsharded float32 optimizer state, without scalars."""
    class_of_kind = OPTIMIZERS[type(config)]
    return 4 * sum(shapes[name].numel() * len(class_of_kind[kind].state_names) for name, kind in kinds.items())
