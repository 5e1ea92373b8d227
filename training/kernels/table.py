"""The tables of all kernels, by their name in `parallel.attention`, `parallel.experts` and `parallel.loss`.

Each table is in the order in which `auto` tries its kernels, and has a "reference", which is slow and easy to read.
The Triton kernels are imported at their first call, because Triton is not installed everywhere.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.kernels.attention.table import ATTENTION_BACKENDS, auto_candidates, device_info
from training.kernels.experts import TORCH_EXPERTS, Dispatch, ExpertKernel
from training.kernels.loss import TORCH_LOSS, chunked_cross_entropy


def _triton_up(x_NC: Tensor, w_EFC: tuple[Tensor, ...], dispatch: Dispatch) -> tuple[Tensor, ...]:
    from training.kernels.triton_experts import UpProjection

    return UpProjection.apply(*dispatch, x_NC, *w_EFC)


def _triton_down(h_RF: Tensor, w_ECF: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
    from training.kernels.triton_experts import DownProjection

    return DownProjection.apply(*dispatch, h_RF, w_ECF, weight_NK)


def _triton_loss(*args: Any, **kwargs: Any) -> Tensor:
    from training.kernels.triton_loss import triton_logits_backward

    return chunked_cross_entropy(triton_logits_backward, *args, **kwargs)


_TRITON_EXPERTS = ExpertKernel(_triton_up, _triton_down, ("training_kernels_triton_experts::matmul",))

EXPERT_KERNELS = {"triton": _TRITON_EXPERTS} | TORCH_EXPERTS
LOSS_KERNELS: dict[str, Callable[..., Tensor]] = {"triton": _triton_loss} | TORCH_LOSS
TABLES = {"attention": ATTENTION_BACKENDS, "experts": EXPERT_KERNELS, "loss": LOSS_KERNELS}
CUDA_ONLY = {"experts": ("triton",), "loss": ("triton",)}  # attention back-ends have `Limits` instead


def saved_operators() -> set[str]:
    """Return the operators of all kernels whose results selective activation checkpointing saves."""
    kernels = (*ATTENTION_BACKENDS.values(), *EXPERT_KERNELS.values())
    return {operator for kernel in kernels for operator in kernel.saved_operators}


def reason_needs_cuda(option: str, name: str, device: torch.device) -> str | None:
    """Return the problem if an expert or loss kernel needs CUDA and the device is another one, else None."""
    return "needs a CUDA device" if name in CUDA_ONLY[option] and device.type != "cuda" else None


def candidates(option: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the kernels that `auto` tries on this device, in order."""
    if option == "attention":
        return auto_candidates(device_info(device))
    names = [name for name in TABLES[option] if reason_needs_cuda(option, name, device) is None]
    # On a CPU only the loop rounds up the row counts of 16-bit matmuls, which makes experts twice as fast.
    loop_first = option == "experts" and device.type == "cpu" and dtype.itemsize == 2
    return sorted(names, key=lambda name: loop_first and name != "loop")
