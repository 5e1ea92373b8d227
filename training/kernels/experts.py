"""Linear maps of many experts over rows sorted by expert, in functions of one signature.

Shapes: R rows, E experts, I inputs, O outputs. Each takes x_RI, w_EOI (like `nn.Linear`'s weight,
one an expert) and count_E (int64: rows of each expert, in order) and returns y_RO.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_experts(x_RI: Tensor, w_EOI: Tensor, count_E: Tensor) -> Tensor:
    """Every row times the matrix of its expert, one row at a time in spirit: R copies of a matrix."""
    expert_R = torch.arange(len(count_E), device=count_E.device).repeat_interleave(count_E)
    return torch.einsum("ri,roi->ro", x_RI, w_EOI[expert_R])


@torch.compiler.disable  # row counts differ from step to step, each a new program
def loop_experts(x_RI: Tensor, w_EOI: Tensor, count_E: Tensor) -> Tensor:
    """One matrix product an expert. Reads the counts on the host, which on a GPU waits for the device."""
    # unbind, not w_EOI[e]: the backward of E index operations writes E x E matrices.
    parts = zip(x_RI.split(count_E.tolist()), w_EOI.unbind(0), strict=True)
    return torch.cat([F.linear(x, w) for x, w in parts])


def grouped_experts(x_RI: Tensor, w_EOI: Tensor, count_E: Tensor) -> Tensor:
    """One grouped matrix product (torch >= 2.8); counts stay on the device."""
    return F.grouped_mm(x_RI, w_EOI.transpose(-2, -1), offs=count_E.cumsum(0).to(torch.int32))


def any_experts(x_RI: Tensor, w_EOI: Tensor, count_E: Tensor) -> Tensor:
    """The grouped product where this torch has it for these tensors, else the loop."""
    aligned = x_RI.shape[1] * x_RI.element_size() % 16 == 0 and w_EOI.shape[1] * x_RI.element_size() % 16 == 0
    typed = x_RI.device.type == "cpu" or x_RI.dtype == torch.bfloat16
    return (grouped_experts if hasattr(F, "grouped_mm") and aligned and typed else loop_experts)(x_RI, w_EOI, count_E)


EXPERTS = {"grouped": grouped_experts, "loop": loop_experts, "reference": reference_experts}
