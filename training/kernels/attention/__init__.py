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

from training.kernels.attention.masks import Documents, Seen, dense, documents, padded
from training.kernels.attention.reference import reference_attention
from training.kernels.attention.sdpa import flash_attention, sdpa_attention, sdpa_mask

__all__ = ["ATTENTION", "Backend", "Call", "Documents", "Seen", "documents", "padded", "why_not"]


class Backend(NamedTuple):
    """One way to compute attention, and what it cannot do."""

    mask: Callable[[Seen], Any]
    attend: Callable[..., Tensor]
    devices: tuple[str, ...] = ("cuda", "cpu", "mps")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    head_dim: int | None = None  # the largest
    head_dim_multiple: int = 1
    window: bool = True
    softcap: bool = True
    documents: bool = True
    value_dim: bool = True  # values may have another width than keys


class Call(NamedTuple):
    """What a layer asks of a back-end."""

    n_head: int
    n_kv_head: int
    head_dim: int
    value_dim: int
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None


ATTENTION = {
    "flash": Backend(sdpa_mask, flash_attention, softcap=False),
    "sdpa": Backend(sdpa_mask, sdpa_attention, softcap=False),
    "reference": Backend(dense, reference_attention),
}


def why_not(name: str, call: Call, documents: bool, device: torch.device, dtype: torch.dtype) -> str | None:
    """What the back-end is known to be unable to do of this; None where nothing is known."""
    backend = ATTENTION[name]
    limits = {
        f"on {device.type}": device.type not in backend.devices,
        f"in {str(dtype).removeprefix('torch.')}": dtype not in backend.dtypes,
        f"heads {call.head_dim} wide": bool(
            (backend.head_dim and call.head_dim > backend.head_dim) or call.head_dim % backend.head_dim_multiple
        ),
        "a window": call.window is not None and not backend.window,
        "a soft-cap": call.softcap is not None and not backend.softcap,
        "documents apart": documents and not backend.documents,
        "values of another width": call.value_dim != call.head_dim and not backend.value_dim,
    }
    return next((f"it does not do {what}" for what, lacks in limits.items() if lacks), None)
