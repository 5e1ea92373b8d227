"""Causal attention: back-ends of one signature, and what each cannot do.

Shapes: B batch, H query heads, G heads of keys and values, T queries, S keys (the queries are the last T
of them), D width of queries and keys, E width of values. A back-end first makes a mask, once for all layers
that see the same, then `attend(q_BHTD, k_BGSD, v_BGSE, mask, scale=, softcap=)` returns y_BHTE.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.kernels.attention.deterministic import with_deterministic_backward
from training.kernels.attention.flash_attn import flash2_attention, flash3_attention, flash4_attention, varlen_mask
from training.kernels.attention.flex import flex_attention, flex_mask
from training.kernels.attention.limits import HALF_DTYPES, Limits, reason_missing
from training.kernels.attention.masks import Documents, Visibility, boolean_mask, find_documents, left_padded
from training.kernels.attention.reference import reference_attention
from training.kernels.attention.sdpa import (
    cudnn_attention,
    efficient_attention,
    flash_attention,
    flash_mask,
    sdpa_attention,
    sdpa_mask,
)
from training.kernels.attention.varlen import varlen_attention

__all__ = [
    "ATTENTION_BACKENDS",
    "AttentionBackend",
    "AttentionSpec",
    "DeviceInfo",
    "Documents",
    "Limits",
    "Visibility",
    "auto_candidates",
    "device_info",
    "find_documents",
    "left_padded",
    "limits_on",
    "reason_unsupported",
]


class AttentionBackend(NamedTuple):
    """One way to compute attention, and what it cannot do."""

    build_mask: Callable[[Visibility], Any]
    attend: Callable[..., Tensor]
    limits: dict[str, Any] | None = None  # Limits by type of device; None: everything, on all of them


class AttentionSpec(NamedTuple):
    """What a layer asks of a back-end."""

    n_head: int
    n_kv_head: int
    head_dim: int
    value_dim: int
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None


class DeviceInfo(NamedTuple):
    """A type of device, and what it is known by."""

    type: str  # cuda, cpu, mps
    capability: int | None = None  # major number of CUDA's compute capability


AMPERE = range(8, 20)  # and later
SOFTLESS = Limits(softcap=False)
PLAIN = Limits(HALF_DTYPES, head_dim=256, window=False, softcap=False, documents=False, capability=AMPERE)
CUDNN = PLAIN._replace(head_dim_multiple=8, deterministic=False)  # PyTorch has no switch for it
VARLEN = Limits(HALF_DTYPES, head_dim=256, softcap=False, capability=AMPERE, package=("torch", "2.11"))
FLEX = Limits(HALF_DTYPES, capability=AMPERE, package=("torch", "2.7"))
FLASH2 = Limits(HALF_DTYPES, head_dim=256, capability=AMPERE, package=("flash-attn", "2.7.4"))
# Its deterministic backward was none before 3.0.0 (flash-attention #1596), and is none for heads over 192 wide.
FLASH3 = Limits(
    HALF_DTYPES, head_dim=192, head_dim_multiple=8, capability=range(9, 10), package=("flash-attn-3", "3.0.0")
)
# A backward that hangs cannot be found out by trying: soft-capped it was seen to on Blackwell (#2466), and any
# with the libraries that earlier versions ask for (#2797).
FLASH4 = FLASH3._replace(softcap=False, capability=range(9, 12), package=("flash-attn-4", "4.0.0b27"))

# In the order in which `auto` tries them, the fastest first as published: flash3 on Hopper (arXiv:2407.08608), flash4
# on Blackwell (arXiv:2603.05451), flash2 on the others; then what PyTorch brings: its copy of flash2, the same for
# documents and windows, a kernel that it writes for what is asked, and those that read a mask.
ATTENTION_BACKENDS = {
    "flash3": AttentionBackend(varlen_mask, flash3_attention, {"cuda": FLASH3}),
    "flash4": AttentionBackend(varlen_mask, flash4_attention, {"cuda": FLASH4}),
    "flash2": AttentionBackend(varlen_mask, flash2_attention, {"cuda": FLASH2}),
    "cudnn": AttentionBackend(sdpa_mask, cudnn_attention, {"cuda": CUDNN}),
    "flash": AttentionBackend(flash_mask, flash_attention, {"cuda": PLAIN, "cpu": SOFTLESS}),
    "varlen": AttentionBackend(varlen_mask, with_deterministic_backward(varlen_attention), {"cuda": VARLEN}),
    "flex": AttentionBackend(flex_mask, flex_attention, {"cuda": FLEX}),
    "efficient": AttentionBackend(
        sdpa_mask, with_deterministic_backward(efficient_attention), {"cuda": SOFTLESS._replace(head_dim_multiple=8)}
    ),
    "sdpa": AttentionBackend(
        sdpa_mask,
        sdpa_attention,
        {"cuda": SOFTLESS._replace(deterministic=False), "cpu": SOFTLESS, "mps": SOFTLESS},
    ),
    "reference": AttentionBackend(boolean_mask, reference_attention),
}


def device_info(device: torch.device) -> DeviceInfo:
    """What the device is, as far as back-ends care."""
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    return DeviceInfo(device.type, capability)


def limits_on(name: str, machine: DeviceInfo) -> Limits | None:
    """What the back-end can do on such a machine; None where it cannot be on it."""
    on = ATTENTION_BACKENDS[name].limits
    found = Limits() if on is None else on.get(machine.type)
    return found if found is None or found.capability is None or machine.capability in found.capability else None


def auto_candidates(machine: DeviceInfo) -> list[str]:
    """What `auto` tries on such a machine, in order: a restart has to go on in the same bits."""
    return [
        name for name in ATTENTION_BACKENDS if (found := limits_on(name, machine)) is not None and found.deterministic
    ]


def reason_unsupported(
    name: str, spec: AttentionSpec, documents: bool, machine: DeviceInfo, dtype: torch.dtype
) -> str | None:
    """What the back-end is known to be unable to do of this; None where nothing is known."""
    found = limits_on(name, machine)
    if found is None:
        where = (
            machine.type if machine.capability is None else f"CUDA devices of compute capability {machine.capability}"
        )
        return f"it does not run on {where}"
    widths = {spec.head_dim, spec.value_dim}
    cannot = {
        f"do {str(dtype).removeprefix('torch.')}": dtype not in found.dtypes,
        f"do heads {max(widths)} wide": found.head_dim is not None and max(widths) > found.head_dim,
        f"do heads whose width is no multiple of {found.head_dim_multiple}": any(
            width % found.head_dim_multiple for width in widths
        ),
        "do a window": spec.window is not None and not found.window,
        "do a soft-cap": spec.softcap is not None and not found.softcap,
        "keep documents apart": documents and not found.documents,
    }
    refused = next((f"it does not {what}" for what, lacking in cannot.items() if lacking), None)
    return refused or (reason_missing(*found.package) if found.package is not None else None)
