"""PyTorch's flash kernel for packed documents and for windows. The signature is `interface.Attend`."""

import inspect

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from training.kernels.attention.sdpa import pad_to_one_width


def varlen_attention(q_BHTD, k_BGSD, v_BGSE, mask, *, scale=None, softcap=None) -> Tensor:
    """Run `varlen_attn` of torch 2.11 and later. It requires D = E and supports no soft-cap."""
    from torch.nn.attention.varlen import varlen_attn

    assert softcap is None
    width = v_BGSE.shape[-1]
    q_BHTD, k_BGSD, v_BGSD, scale = pad_to_one_width(q_BHTD, k_BGSD, v_BGSE, scale)
    n_samples, _, n_tokens, _ = q_BHTD.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTD, k_BGSD, v_BGSD))
    cu_seqlens_D = mask.cu_seqlens_D
    if cu_seqlens_D is None:
        cu_seqlens_D = torch.arange(0, (n_samples + 1) * n_tokens, n_tokens, dtype=torch.int32, device=q.device)
    options = {"scale": scale, "window_size": (-1 if mask.window is None else mask.window - 1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # older versions always allow grouped queries
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # later versions prefer cuDNN, which is not deterministic
        y = varlen_attn(q, k, v, cu_seqlens_D, cu_seqlens_D, n_tokens, n_tokens, **options)
    return y.view(n_samples, n_tokens, *y.shape[-2:]).transpose(1, 2)[..., :width]
