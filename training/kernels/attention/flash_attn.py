"""The flash-attn packages: FlashAttention 2, 3 and 4 (arXiv:2307.08691, arXiv:2407.08608, arXiv:2603.05451).

One call, three packages. They have the batch as (B, T, H, D), or documents one behind the other as (B x T, H, D) with
the places where they end; scores of all else are not computed. Read from their sources: flash-attn 2.7.4 and 2.8.3,
flash-attn-3 3.0.0, flash-attn-4 4.0.0b27 and b36.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from training.kernels.attention.masks import Visibility
from training.kernels.attention.sdpa import pad_to_one_width


class VarlenMask(NamedTuple):
    """Who sees whom, for kernels that take documents packed one behind the other."""

    window: int | None  # keys that a query sees, its own included; None: all before
    cu_seqlens_D: Tensor | None  # int32 (D + 1,): where documents end in the flattened (B x T); None: with their sample


def varlen_mask(visibility: Visibility) -> VarlenMask:
    """Of the whole context: there is no cache before it."""
    assert visibility.n_queries == visibility.n_keys
    cu_seqlens_D = None if visibility.documents is None else visibility.documents.cu_seqlens_D
    if cu_seqlens_D is not None:
        torch._dynamo.maybe_mark_dynamic(
            cu_seqlens_D, 0
        )  # else what was compiled for one number of documents is done again
    return VarlenMask(visibility.effective_window, cu_seqlens_D)


def flash2_attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    mask: VarlenMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The package flash-attn: Ampere and later. It knows one width only."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    width = v_BGSE.shape[-1]
    q, k, v, scale = pad_to_one_width(q_BHTD, k_BGSD, v_BGSE, scale)
    return _attend(flash_attn_func, flash_attn_varlen_func, -1, q, k, v, mask, scale, softcap)[..., :width]


def flash3_attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    mask: VarlenMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The package flash-attn-3: Hopper. Of two widths it knows a few pairs only, so they are made one."""
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    width = v_BGSE.shape[-1]
    q, k, v, scale = pad_to_one_width(q_BHTD, k_BGSD, v_BGSE, scale)
    return _attend(flash_attn_func, flash_attn_varlen_func, -1, q, k, v, mask, scale, softcap)[..., :width]


@torch.compiler.disable  # its kernels are compiled by a compiler of its own, which PyTorch's cannot trace
def flash4_attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    mask: VarlenMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The package flash-attn-4: Hopper and Blackwell."""
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    return _attend(flash_attn_func, flash_attn_varlen_func, None, q_BHTD, k_BGSD, v_BGSE, mask, scale, softcap)


def _attend(
    whole: Callable[..., Tensor | tuple],
    varlen: Callable[..., Tensor | tuple],
    all_before: int | None,
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSE: Tensor,
    mask: VarlenMask,
    scale: float | None,
    softcap: float | None,
) -> Tensor:
    """`whole` for samples, `varlen` for documents. `all_before` is the package's word for no window."""
    q, k, v = (x.transpose(1, 2) for x in (q_BHTD, k_BGSD, v_BGSE))
    n_samples, n_tokens = q.shape[:2]
    options = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (all_before if mask.window is None else mask.window - 1, 0),  # not counting a query's own key
        "softcap": 0.0 if softcap is None else softcap,  # 0: none
        "deterministic": True,
    }
    if mask.cu_seqlens_D is None:
        y = whole(q, k, v, **options)
    else:
        ends = {"cu_seqlens_q": mask.cu_seqlens_D, "cu_seqlens_k": mask.cu_seqlens_D}
        longest = {"max_seqlen_q": n_tokens, "max_seqlen_k": n_tokens}  # a bound: the longest is not known here
        y = varlen(*(x.flatten(0, 1) for x in (q, k, v)), **ends, **longest, **options)
    y = y[0] if isinstance(y, tuple) else y  # the second is the scores' log-sum-exp
    return y.view(n_samples, n_tokens, *y.shape[-2:]).transpose(1, 2)
