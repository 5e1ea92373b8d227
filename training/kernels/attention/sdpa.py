"""PyTorch's scaled_dot_product_attention: its choice of kernel, or its flash kernel and no other."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.kernels.attention.masks import Seen, dense


def sdpa_mask(seen: Seen) -> Tensor | None:
    """None where the plain causal kernel, or no mask at all, says it; else the mask written out."""
    every_key = seen.n_queries in (1, seen.n_keys) and (seen.window is None or seen.window >= seen.n_keys)
    return None if every_key and seen.documents is None else dense(seen)


def sdpa_attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """PyTorch picks among its own kernels. It has no soft-cap."""
    assert softcap is None
    n_queries, n_shared = q_BHTD.shape[2], q_BHTD.shape[1] // k_BGSD.shape[1]
    if n_queries == 1 and n_shared > 1:  # heads that share keys are then queries of one head: nothing is copied
        q_BGHD = q_BHTD.squeeze(2).unflatten(1, (-1, n_shared))
        y_BGHE = F.scaled_dot_product_attention(q_BGHD, k_BGSD, v_BGSE, attn_mask=mask, scale=scale)
        return y_BGHE.flatten(1, 2).unsqueeze(2)
    return F.scaled_dot_product_attention(
        q_BHTD,
        k_BGSD,
        v_BGSE,
        attn_mask=mask,
        is_causal=mask is None and n_queries > 1,
        scale=scale,
        enable_gqa=n_shared > 1,
    )


def flash_attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """PyTorch's flash kernel (arXiv:2307.08691); on a CPU it takes masks as well.

    It knows one width only: the narrower ones of queries and keys, or of values, are filled up with zeros.
    """
    width, value_width = q_BHTD.shape[-1], v_BGSE.shape[-1]
    if width != value_width:
        scale = 1 / math.sqrt(width) if scale is None else scale
        missing = max(width, value_width) - width, max(width, value_width) - value_width
        q_BHTD, k_BGSD = (F.pad(x, (0, missing[0])) for x in (q_BHTD, k_BGSD))
        v_BGSE = F.pad(v_BGSE, (0, missing[1]))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        y_BHTE = sdpa_attention(q_BHTD, k_BGSD, v_BGSE, mask, scale=scale, softcap=softcap)
    return y_BHTE[..., :value_width]
