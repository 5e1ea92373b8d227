"""Causal attention, in functions of one signature.

Shapes: B batch, H heads, T queries, S keys (the queries are the last T of them), D head width.
Each takes q_BHTD, k_BHSD, v_BHSD and returns y_BHTD; query t sees keys 0 .. S - T + t.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def causal_mask(n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """(T, S) of bool: True where query t may see key s."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)


def reference(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
    """Attention as it is written down (arXiv:1706.03762 eq. 1), with scores in float32."""
    scores_BHTS = (q_BHTD @ k_BHSD.transpose(-2, -1)).float() / math.sqrt(q_BHTD.shape[-1])
    mask_TS = causal_mask(q_BHTD.shape[-2], k_BHSD.shape[-2], q_BHTD.device)
    weights_BHTS = scores_BHTS.masked_fill(~mask_TS, float("-inf")).softmax(dim=-1)
    return weights_BHTS.to(v_BHSD.dtype) @ v_BHSD


def sdpa(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
    """PyTorch's scaled_dot_product_attention, which picks among its own kernels."""
    n_queries, n_keys = q_BHTD.shape[-2], k_BHSD.shape[-2]
    if n_queries == n_keys:
        return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, is_causal=True)
    mask_TS = None if n_queries == 1 else causal_mask(n_queries, n_keys, q_BHTD.device)
    return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, attn_mask=mask_TS)


def flash(q_BHTD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> Tensor:
    """PyTorch's flash kernel (arXiv:2307.08691) and no other; `sdpa` where a cache makes T < S."""
    if q_BHTD.shape[-2] != k_BHSD.shape[-2]:
        return sdpa(q_BHTD, k_BHSD, v_BHSD)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q_BHTD, k_BHSD, v_BHSD, is_causal=True)


ATTENTION = {"flash": flash, "sdpa": sdpa, "reference": reference}
