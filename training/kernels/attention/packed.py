"""Kernels that read packed documents: the flash-attn packages, and PyTorch's copy of FlashAttention 2.

They read samples as (B, T, H, D), or packed documents as (B x T, H, D) with cumulative lengths, and compute no scores
across documents. FlashAttention 2, 3 and 4 are arXiv:2307.08691, arXiv:2407.08608 and arXiv:2603.05451. Written against
the sources of flash-attn 2.7.4 and 2.8.3, flash-attn-3 3.0.0, flash-attn-4 4.0.0b27 and b36.
"""

import inspect
from types import ModuleType

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.kernels.attention.masks import Visibility
from training.kernels.attention.sdpa import with_one_width


def varlen_mask(visibility: Visibility) -> tuple[int | None, Tensor | None]:
    """Return (window or None, `Documents.cu_seqlens_D`; None: each sample is one document). Not for a cache."""
    assert visibility.n_queries == visibility.n_keys
    cu_seqlens_D = visibility.documents and visibility.documents.cu_seqlens_D
    if cu_seqlens_D is not None:
        torch._dynamo.maybe_mark_dynamic(cu_seqlens_D, 0)  # otherwise every number of documents would recompile
    return visibility.effective_window, cu_seqlens_D


@with_one_width
def flash2_attention(q_BHTD, k_BGSD, v_BGSD, mask, *, scale=None, softcap=None) -> Tensor:
    """Run flash-attn, for Ampere and later."""
    import flash_attn

    return _attend(flash_attn, q_BHTD, k_BGSD, v_BGSD, mask, scale, softcap)


@with_one_width  # it supports few pairs of D and E
def flash3_attention(q_BHTD, k_BGSD, v_BGSD, mask, *, scale=None, softcap=None) -> Tensor:
    """Run flash-attn-3, for Hopper."""
    import flash_attn_interface

    return _attend(flash_attn_interface, q_BHTD, k_BGSD, v_BGSD, mask, scale, softcap)


@_disable_dynamo  # its own compiler cannot be traced; `torch.compiler.disable` would import PyTorch's: 1.3 s of CPU
def flash4_attention(q_BHTD, k_BGSD, v_BGSE, mask, *, scale=None, softcap=None) -> Tensor:
    """Run flash-attn-4, for Hopper and Blackwell."""
    from flash_attn import cute

    return _attend(cute, q_BHTD, k_BGSD, v_BGSE, mask, scale, softcap, no_window=None)


def _attend(package: ModuleType, q_BHTD, k_BGSD, v_BGSE, mask, scale, softcap, no_window: int | None = -1) -> Tensor:
    """Call one of a package's two functions. `no_window` is the package's value for an unlimited window."""
    window, cu_seqlens_D = mask
    q, k, v = (x.transpose(1, 2) for x in (q_BHTD, k_BGSD, v_BGSE))
    n_samples, n_tokens = q.shape[:2]
    options = {
        "softmax_scale": scale,
        "causal": True,
        "window_size": (no_window if window is None else window - 1, 0),  # not counting a query's own key
        "softcap": 0.0 if softcap is None else softcap,  # 0: none
        "deterministic": True,
    }
    if cu_seqlens_D is None:
        y = package.flash_attn_func(q, k, v, **options)
    else:
        lengths = {"cu_seqlens_q": cu_seqlens_D, "cu_seqlens_k": cu_seqlens_D}
        longest = {"max_seqlen_q": n_tokens, "max_seqlen_k": n_tokens}  # a bound: the true maximum is on the device
        y = package.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), **lengths, **longest, **options)
    y = y[0] if isinstance(y, tuple) else y  # some return the log-sum-exp of the scores as well
    return y.view(n_samples, n_tokens, *y.shape[-2:]).transpose(1, 2)


@with_one_width
def varlen_attention(q_BHTD, k_BGSD, v_BGSD, mask, *, scale=None, softcap=None) -> Tensor:
    """Run `varlen_attn` of torch 2.11 and later, also for windows. It supports no soft-cap."""
    from torch.nn.attention.varlen import varlen_attn

    assert softcap is None
    window, cu_seqlens_D = mask
    n_samples, _, n_tokens, _ = q_BHTD.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTD, k_BGSD, v_BGSD))
    if cu_seqlens_D is None:
        cu_seqlens_D = torch.arange(0, (n_samples + 1) * n_tokens, n_tokens, dtype=torch.int32, device=q.device)
    options = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # older versions always allow grouped queries
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # later versions prefer cuDNN, which is not deterministic
        y = varlen_attn(q, k, v, cu_seqlens_D, cu_seqlens_D, n_tokens, n_tokens, **options)
    return y.view(n_samples, n_tokens, *y.shape[-2:]).transpose(1, 2)
