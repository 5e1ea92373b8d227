"""PyTorch's FlexAttention (arXiv:2412.05496): skips blocks of masked scores, and supports a soft-cap.

It imports PyTorch's compiler, so its imports are inside the functions.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from training.kernels.attention.masks import Visibility, is_visible

_compile = cache(torch.compile)


def flex_mask(visibility: Visibility) -> Any:
    """Return a `BlockMask`: the blocks of 128 x 128 scores that are not fully masked. Evaluates the full mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    assert visibility.n_queries == visibility.n_keys
    window, n_tokens = visibility.window, visibility.n_queries
    index_BS = visibility.documents and visibility.documents.index_BS

    def mask(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 (one signature)
        return is_visible(window, index_BS, sample, query, key)

    n_samples = None if index_BS is None else len(index_BS)
    return create_block_mask(mask, n_samples, None, n_tokens, n_tokens, device=visibility.device)


def flex_attention(q_BHTD, k_BGSD, v_BGSE, mask, *, scale=None, softcap=None) -> Tensor:
    """Run FlexAttention, compiled at the first call. It has no backward on a CPU."""
    from torch.nn.attention import flex_attention as flex

    def soft_cap(score: Tensor, sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return softcap * torch.tanh(score / softcap)

    # uncompiled it stores all scores
    attend = flex.flex_attention if torch.compiler.is_compiling() else _compile(flex.flex_attention)
    options = {"score_mod": None if softcap is None else soft_cap, "block_mask": mask, "scale": scale}
    return attend(q_BHTD, k_BGSD, v_BGSE, **options, enable_gqa=q_BHTD.shape[1] != k_BGSD.shape[1])
