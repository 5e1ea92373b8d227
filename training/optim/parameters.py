"""Types that describe parameters to the optimizers: kinds, full shapes."""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

# A matrix may be a stack of matrices: experts are (E, out, in). Vectors are biases, weights of normalizations, and what
# learns as they do. `model.stats.parameter_kinds` decides.
ParameterKind = Literal["matrix", "embedding", "router", "vector"]
PARAMETER_KINDS: tuple[ParameterKind, ...] = get_args(ParameterKind)

# The parameters of each kind, or this rank's rows of them; a list may be empty.
ParametersByKind = dict[ParameterKind, list[nn.Parameter]]

# (parameters, tensors of the same shapes, function on full matrices (X, M, N)) -> results, shaped like the tensors
ApplyToMatrices = Callable[[list[Tensor], list[Tensor], Callable[[Tensor], Tensor]], list[Tensor]]


class FullShapes(NamedTuple):
    """Unsharded parameter shapes, and a function that gathers row-sharded matrices (for Muon)."""

    shapes: dict[nn.Parameter, torch.Size]
    apply_to_matrices: ApplyToMatrices
