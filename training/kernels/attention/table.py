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

from training.kernels.attention.deterministic import repeatable
from training.kernels.attention.flash_attn import flash2_attention, flash3_attention, flash4_attention, packed
from training.kernels.attention.flex import flex_attention, flex_mask
from training.kernels.attention.limits import HALF, Limits, lacks
from training.kernels.attention.masks import Documents, Seen, dense, documents, padded
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
    "ATTENTION",
    "Backend",
    "Call",
    "Documents",
    "Limits",
    "Machine",
    "Seen",
    "automatic",
    "documents",
    "limits",
    "machine",
    "padded",
    "why_not",
]


class Backend(NamedTuple):
    """One way to compute attention, and what it cannot do."""

    mask: Callable[[Seen], Any]
    attend: Callable[..., Tensor]
    on: dict[str, Any] | None = None  # Limits by type of device; None: everything, on all of them


class Call(NamedTuple):
    """What a layer asks of a back-end."""

    n_head: int
    n_kv_head: int
    head_dim: int
    value_dim: int
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None


class Machine(NamedTuple):
    """A type of device, and what it is known by."""

    type: str  # cuda, cpu, mps
    capability: int | None = None  # major number of CUDA's compute capability


AMPERE = range(8, 20)  # and later
SOFTLESS = Limits(softcap=False)
PLAIN = Limits(HALF, head_dim=256, window=False, softcap=False, documents=False, capability=AMPERE)
CUDNN = PLAIN._replace(head_dim_multiple=8, deterministic=False)  # PyTorch has no switch for it
VARLEN = Limits(HALF, head_dim=256, softcap=False, capability=AMPERE, package=("torch", "2.11"))
FLEX = Limits(HALF, capability=AMPERE, package=("torch", "2.7"))
FLASH2 = Limits(HALF, head_dim=256, capability=AMPERE, package=("flash-attn", "2.7.4"))
# Its deterministic backward was none before 3.0.0 (flash-attention #1596), and is none for heads over 192 wide.
FLASH3 = Limits(HALF, head_dim=192, head_dim_multiple=8, capability=range(9, 10), package=("flash-attn-3", "3.0.0"))
# A backward that hangs cannot be found out by trying: soft-capped it was seen to on Blackwell (#2466), and any
# with the libraries that earlier versions ask for (#2797).
FLASH4 = FLASH3._replace(softcap=False, capability=range(9, 12), package=("flash-attn-4", "4.0.0b27"))

# In the order in which `auto` tries them, the fastest first as published: flash3 on Hopper (arXiv:2407.08608), flash4
# on Blackwell (arXiv:2603.05451), flash2 on the others; then what PyTorch brings: its copy of flash2, the same for
# documents and windows, a kernel that it writes for what is asked, and those that read a mask.
ATTENTION = {
    "flash3": Backend(packed, flash3_attention, {"cuda": FLASH3}),
    "flash4": Backend(packed, flash4_attention, {"cuda": FLASH4}),
    "flash2": Backend(packed, flash2_attention, {"cuda": FLASH2}),
    "cudnn": Backend(sdpa_mask, cudnn_attention, {"cuda": CUDNN}),
    "flash": Backend(flash_mask, flash_attention, {"cuda": PLAIN, "cpu": SOFTLESS}),
    "varlen": Backend(packed, repeatable(varlen_attention), {"cuda": VARLEN}),
    "flex": Backend(flex_mask, flex_attention, {"cuda": FLEX}),
    "efficient": Backend(sdpa_mask, repeatable(efficient_attention), {"cuda": SOFTLESS._replace(head_dim_multiple=8)}),
    "sdpa": Backend(
        sdpa_mask,
        sdpa_attention,
        {"cuda": SOFTLESS._replace(deterministic=False), "cpu": SOFTLESS, "mps": SOFTLESS},
    ),
    "reference": Backend(dense, reference_attention),
}


def machine(device: torch.device) -> Machine:
    """What the device is, as far as back-ends care."""
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None
    return Machine(device.type, capability)


def limits(name: str, machine: Machine) -> Limits | None:
    """What the back-end can do on such a machine; None where it cannot be on it."""
    on = ATTENTION[name].on
    found = Limits() if on is None else on.get(machine.type)
    return found if found is None or found.capability is None or machine.capability in found.capability else None


def automatic(machine: Machine) -> list[str]:
    """What `auto` tries on such a machine, in order: a restart has to go on in the same bits."""
    return [name for name in ATTENTION if (found := limits(name, machine)) is not None and found.deterministic]


def why_not(name: str, call: Call, documents: bool, machine: Machine, dtype: torch.dtype) -> str | None:
    """What the back-end is known to be unable to do of this; None where nothing is known."""
    found = limits(name, machine)
    if found is None:
        where = (
            machine.type if machine.capability is None else f"CUDA devices of compute capability {machine.capability}"
        )
        return f"it does not run on {where}"
    widths = {call.head_dim, call.value_dim}
    cannot = {
        f"do {str(dtype).removeprefix('torch.')}": dtype not in found.dtypes,
        f"do heads {max(widths)} wide": found.head_dim is not None and max(widths) > found.head_dim,
        f"do heads whose width is no multiple of {found.head_dim_multiple}": any(
            width % found.head_dim_multiple for width in widths
        ),
        "do a window": call.window is not None and not found.window,
        "do a soft-cap": call.softcap is not None and not found.softcap,
        "keep documents apart": documents and not found.documents,
    }
    refused = next((f"it does not {what}" for what, lacking in cannot.items() if lacking), None)
    return refused or (lacks(*found.package) if found.package is not None else None)
