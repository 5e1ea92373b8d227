"""PyTorch's scaled_dot_product_attention: its choice of kernel, or one of its kernels and no other."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.kernels.attention.deterministic import deterministic_flash
from training.kernels.attention.masks import Visibility, boolean_mask

# On a CPU the flash kernel's backward of 16-bit numbers takes for so few keys two to three times as long as that of
# float32, which is more exact as well (docs/log.md).
FP32_MAX_KEYS = 192


def sdpa_mask(visibility: Visibility) -> Tensor | None:
    """None where the plain causal kernel, or no mask at all, says it; else what is added to scores: 0, or -inf.

    As numbers in the queries' type: of a mask of bool, PyTorch would keep such a copy for each layer's backward.
    """
    if (
        visibility.n_queries in (1, visibility.n_keys)
        and visibility.effective_window is None
        and visibility.documents is None
    ):
        return None
    mask = boolean_mask(visibility)
    return torch.zeros(mask.shape, dtype=visibility.dtype, device=visibility.device).masked_fill_(~mask, float("-inf"))


def flash_mask(visibility: Visibility) -> Tensor | None:
    """The same, in the type that `flash_attention` computes in."""
    return sdpa_mask(visibility._replace(dtype=_computed_in(visibility.dtype, visibility.device, visibility.n_keys)))


def _computed_in(dtype: torch.dtype, device: torch.device, n_keys: int) -> torch.dtype:
    """The type in which `flash_attention` attends to so many keys."""
    return torch.float32 if device.type == "cpu" and dtype.itemsize == 2 and n_keys <= FP32_MAX_KEYS else dtype


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
    mask = None if mask is None else mask.to(q_BHTD.dtype)
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
    """PyTorch's flash kernel (arXiv:2307.08691); on a CPU it takes masks as well, on CUDA its backward is repeatable.

    It knows one width only.
    """
    dtype = q_BHTD.dtype
    q_BHTD, k_BGSD, v_BGSE = (x.to(_computed_in(dtype, x.device, k_BGSD.shape[2])) for x in (q_BHTD, k_BGSD, v_BGSE))
    q_BHTD, k_BGSD, v_BGSD, scale = pad_to_one_width(q_BHTD, k_BGSD, v_BGSE, scale)
    if q_BHTD.is_cuda:
        assert mask is None and softcap is None
        y_BHTD = deterministic_flash(q_BHTD, k_BGSD, v_BGSD, scale)
    else:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            y_BHTD = sdpa_attention(q_BHTD, k_BGSD, v_BGSD, mask, scale=scale, softcap=softcap)
    return y_BHTD[..., : v_BGSE.shape[-1]].to(dtype)


def cudnn_attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """cuDNN's kernel. PyTorch does not ask it for its deterministic backward."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa_attention(q_BHTD, k_BGSD, v_BGSE, mask, scale=scale, softcap=softcap)


def efficient_attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """PyTorch's memory-efficient kernel (arXiv:2112.05682), which takes masks, and runs in float32 and on old GPUs."""
    n_shared = q_BHTD.shape[1] // k_BGSD.shape[1]  # that heads share keys, it knows of late
    k_BHSD, v_BHSE = (x if n_shared == 1 else x.repeat_interleave(n_shared, 1) for x in (k_BGSD, v_BGSE))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return sdpa_attention(q_BHTD, k_BHSD, v_BHSE, mask, scale=scale, softcap=softcap)


def pad_to_one_width(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """The narrower ones, queries and keys or values, filled up with zeros; and the scale, which is that of before."""
    width, value_width = q_BHTD.shape[-1], v_BGSE.shape[-1]
    if width == value_width:
        return q_BHTD, k_BGSD, v_BGSE, scale
    wide = max(width, value_width)
    q, k = (F.pad(x, (0, wide - width)) for x in (q_BHTD, k_BGSD))
    return q, k, F.pad(v_BGSE, (0, wide - value_width)), 1 / math.sqrt(width) if scale is None else scale
