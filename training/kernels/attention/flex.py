"""PyTorch's FlexAttention (arXiv:2412.05496): blocks of scores that nobody sees are skipped, the rest may be capped."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from training.kernels.attention.masks import Visibility


def flex_mask(visibility: Visibility) -> flex.BlockMask:
    """Which blocks of 128 x 128 scores somebody sees. Found from the mask written out, once for all layers."""
    assert visibility.n_queries == visibility.n_keys
    window, index_BS = visibility.window, None if visibility.documents is None else visibility.documents.index_BS

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001 (one signature)
        visible = key <= query
        if window is not None:
            visible = visible & (key > query - window)
        if index_BS is not None:
            visible = visible & (index_BS[b, query] == index_BS[b, key])
        return visible

    n_samples = None if index_BS is None else len(index_BS)
    return flex.create_block_mask(
        sees, n_samples, None, visibility.n_queries, visibility.n_keys, device=visibility.device
    )


def flex_attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    mask: flex.BlockMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """FlexAttention, compiled at its first call. On a CPU it has no backward."""

    def capped(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        return softcap * torch.tanh(score / softcap)

    attend = flex.flex_attention if torch.compiler.is_compiling() else _compiled()
    return attend(
        q_BHTD,
        k_BGSD,
        v_BGSE,
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=q_BHTD.shape[1] != k_BGSD.shape[1],
    )


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex.flex_attention)  # as it is, it writes out all scores
