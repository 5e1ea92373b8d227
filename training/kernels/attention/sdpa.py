"""PyTorch's scaled_dot_product_attention: with the kernel that PyTorch picks, or with a fixed kernel."""

import math
from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.kernels.attention.deterministic import deterministic_flash
from training.kernels.attention.masks import Visibility, boolean_mask

# Up to this many keys, the CPU flash kernel's 16-bit backward takes 2 to 3 times as long as its float32 backward, which
# is also more exact (docs/log.md).
FP32_MAX_KEYS = 192


def sdpa_mask(visibility: Visibility) -> Tensor | None:
    """Return None if `is_causal` or no mask suffices, else a mask to add to the scores: 0 or -inf.

    It has the queries' dtype, because PyTorch would convert a bool mask to it, and keep the copy, in each layer.
    """
    is_full_or_single_query = visibility.n_queries in (1, visibility.n_keys)
    if is_full_or_single_query and visibility.effective_window is None and visibility.documents is None:
        return None
    mask = boolean_mask(visibility)
    return torch.zeros(mask.shape, dtype=visibility.dtype, device=visibility.device).masked_fill_(~mask, float("-inf"))


def flash_mask(visibility: Visibility) -> Tensor | None:
    """Return `sdpa_mask` in the dtype that `flash_attention` computes in."""
    return sdpa_mask(visibility._replace(dtype=_flash_dtype(visibility.dtype, visibility.device, visibility.n_keys)))


def _flash_dtype(dtype: torch.dtype, device: torch.device, n_keys: int) -> torch.dtype:
    return torch.float32 if device.type == "cpu" and dtype.itemsize == 2 and n_keys <= FP32_MAX_KEYS else dtype


def sdpa_attention(q_BHTD, k_BGSD, v_BGSE, mask, *, scale=None, softcap=None) -> Tensor:
    """Run the kernel that PyTorch picks. None supports a soft-cap."""
    assert softcap is None
    mask = None if mask is None else mask.to(q_BHTD.dtype)
    n_queries, n_per_group = q_BHTD.shape[2], q_BHTD.shape[1] // k_BGSD.shape[1]
    if n_queries == 1 and n_per_group > 1:  # heads that share keys become queries of one head: no copy
        q_BGHD = q_BHTD.squeeze(2).unflatten(1, (-1, n_per_group))
        y_BGHE = F.scaled_dot_product_attention(q_BGHD, k_BGSD, v_BGSE, attn_mask=mask, scale=scale)
        return y_BGHE.flatten(1, 2).unsqueeze(2)
    options = {"attn_mask": mask, "is_causal": mask is None and n_queries > 1, "scale": scale}
    return F.scaled_dot_product_attention(q_BHTD, k_BGSD, v_BGSE, **options, enable_gqa=n_per_group > 1)


def with_one_width(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a kernel that requires D = E: pad queries and keys, or values, with zeros."""

    @wraps(attend)
    def attend_padded(q_BHTD, k_BGSD, v_BGSE, mask, *, scale=None, softcap=None) -> Tensor:
        width, value_width = q_BHTD.shape[-1], v_BGSE.shape[-1]
        if width != value_width:
            scale = 1 / math.sqrt(width) if scale is None else scale
            q_BHTD, k_BGSD = (F.pad(x, (0, max(0, value_width - width))) for x in (q_BHTD, k_BGSD))
            v_BGSE = F.pad(v_BGSE, (0, max(0, width - value_width)))
        return attend(q_BHTD, k_BGSD, v_BGSE, mask, scale=scale, softcap=softcap)[..., :value_width]

    return attend_padded


@with_one_width
def flash_attention(q_BHTD, k_BGSD, v_BGSD, mask, *, scale=None, softcap=None) -> Tensor:
    """Run PyTorch's flash kernel (arXiv:2307.08691); on CUDA it supports no mask."""
    if q_BHTD.is_cuda:
        assert mask is None and softcap is None
        return deterministic_flash(q_BHTD, k_BGSD, v_BGSD, scale)
    dtype = q_BHTD.dtype
    qkv = (x.to(_flash_dtype(dtype, x.device, k_BGSD.shape[2])) for x in (q_BHTD, k_BGSD, v_BGSD))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return sdpa_attention(*qkv, mask, scale=scale, softcap=softcap).to(dtype)


def cudnn_attention(q_BHTD, k_BGSD, v_BGSE, mask, *, scale=None, softcap=None) -> Tensor:
    """Run cuDNN's kernel. PyTorch has no switch for its deterministic backward."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa_attention(q_BHTD, k_BGSD, v_BGSE, mask, scale=scale, softcap=softcap)


def efficient_attention(q_BHTD, k_BGSD, v_BGSE, mask, *, scale=None, softcap=None) -> Tensor:
    """Run PyTorch's memory-efficient kernel (arXiv:2112.05682), which supports masks, float32 and old GPUs."""
    n_per_group = q_BHTD.shape[1] // k_BGSD.shape[1]  # only recent versions support grouped queries
    k_BHSD, v_BHSE = (x if n_per_group == 1 else x.repeat_interleave(n_per_group, 1) for x in (k_BGSD, v_BGSE))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return sdpa_attention(q_BHTD, k_BHSD, v_BHSE, mask, scale=scale, softcap=softcap)
