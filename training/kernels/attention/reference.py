"""Attention, written as its formula."""

import math

from torch import Tensor


def reference_attention(q_BHTD, k_BGSD, v_BGSE, mask, *, scale=None, softcap=None) -> Tensor:
    """Compute softmax(q k / sqrt(D)) v (arXiv:1706.03762 eq. 1), with scores in float32.

    `mask` comes from `masks.boolean_mask`. Scores are scaled, soft-capped, then masked.
    """
    n_per_group = q_BHTD.shape[1] // k_BGSD.shape[1]
    k_BHSD, v_BHSE = k_BGSD.repeat_interleave(n_per_group, 1), v_BGSE.repeat_interleave(n_per_group, 1)
    scale = 1 / math.sqrt(q_BHTD.shape[-1]) if scale is None else scale
    scores_BHTS = (q_BHTD @ k_BHSD.transpose(-2, -1)).float() * scale
    if softcap is not None:
        scores_BHTS = softcap * (scores_BHTS / softcap).tanh()
    weights_BHTS = scores_BHTS.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return weights_BHTS.to(v_BHSE.dtype) @ v_BHSE
