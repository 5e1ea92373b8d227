"""The attention back-ends by their name in `parallel.attention`, in the order in which `auto` tries them.

A back-end builds a mask once per forward, for all layers that share it, and then attends:

>>> import torch
>>> from training.kernels.attention.masks import Visibility, find_documents
>>> tokens_BT = torch.tensor([[5, 6, 0, 7]])  # token 0 starts a document
>>> visibility = Visibility(n_queries=4, n_keys=4, device=tokens_BT.device, documents=find_documents(tokens_BT, 0))
>>> backend = ATTENTION_BACKENDS["flash"]
>>> q_BHTD, k_BGSD, v_BGSE = torch.randn(1, 4, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
>>> backend.attend(q_BHTD, k_BGSD, v_BGSE, backend.build_mask(visibility), scale=0.3).shape
torch.Size([1, 4, 4, 8])
"""

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch.torch_version import TorchVersion

from training.kernels.attention import flex, packed, sdpa
from training.kernels.attention.deterministic import with_deterministic_backward
from training.kernels.attention.masks import boolean_mask
from training.kernels.attention.reference import reference_attention
from training.kernels.interface import HALF_DTYPES, AttentionBackend, AttentionSpec, Limits

AMPERE_OR_LATER = range(8, 20)
NO_SOFTCAP = Limits(softcap=False)
CAUSAL_ONLY = Limits(
    HALF_DTYPES, max_head_dim=256, window=False, softcap=False, documents=False, capability=AMPERE_OR_LATER
)
CUDNN = CAUSAL_ONLY._replace(head_dim_multiple=8, deterministic=False)  # PyTorch has no switch for it
VARLEN = Limits(HALF_DTYPES, max_head_dim=256, softcap=False, capability=AMPERE_OR_LATER, package=("torch", "2.11"))
FLEX = Limits(HALF_DTYPES, capability=AMPERE_OR_LATER, package=("torch", "2.7"))
FLASH2 = Limits(HALF_DTYPES, max_head_dim=256, capability=AMPERE_OR_LATER, package=("flash-attn", "2.7.4"))
# Not deterministic before 3.0.0 (flash-attention #1596), and still not for heads wider than 192.
FLASH3 = Limits(
    HALF_DTYPES, max_head_dim=192, head_dim_multiple=8, capability=range(9, 10), package=("flash-attn-3", "3.0.0")
)
# A trial cannot detect a hanging backward. It hung with a soft-cap on Blackwell (#2466), and always with the libraries
# that earlier versions require (#2797).
FLASH4 = FLASH3._replace(softcap=False, capability=range(9, 12), package=("flash-attn-4", "4.0.0b27"))

# Fastest first, as published: flash3 on Hopper (arXiv:2407.08608), flash4 on Blackwell (arXiv:2603.05451), flash2
# elsewhere. Then PyTorch's: its copies of flash2 (flash; varlen for documents and windows), flex, and the kernels that
# read a mask.
ATTENTION_BACKENDS = {
    "flash3": AttentionBackend(packed.varlen_mask, packed.flash3_attention, {"cuda": FLASH3}, ("flash_attn_3::fwd",)),
    "flash4": AttentionBackend(packed.varlen_mask, packed.flash4_attention, {"cuda": FLASH4}),
    "flash2": AttentionBackend(
        packed.varlen_mask, packed.flash2_attention, {"cuda": FLASH2}, ("flash_attn::_flash_attn_forward",)
    ),
    "cudnn": AttentionBackend(
        sdpa.sdpa_mask, sdpa.cudnn_attention, {"cuda": CUDNN}, ("aten::_scaled_dot_product_cudnn_attention",)
    ),
    "flash": AttentionBackend(
        sdpa.flash_mask,
        sdpa.flash_attention,
        {"cuda": CAUSAL_ONLY, "cpu": NO_SOFTCAP},
        ("training_kernels_attention_deterministic::flash", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    ),
    "varlen": AttentionBackend(
        packed.varlen_mask, with_deterministic_backward(packed.varlen_attention), {"cuda": VARLEN}
    ),
    "flex": AttentionBackend(flex.flex_mask, flex.flex_attention, {"cuda": FLEX}),
    "efficient": AttentionBackend(
        sdpa.sdpa_mask,
        with_deterministic_backward(sdpa.efficient_attention),
        {"cuda": NO_SOFTCAP._replace(head_dim_multiple=8)},
        ("aten::_scaled_dot_product_efficient_attention",),
    ),
    "sdpa": AttentionBackend(
        sdpa.sdpa_mask,
        sdpa.sdpa_attention,
        {"cuda": NO_SOFTCAP._replace(deterministic=False), "cpu": NO_SOFTCAP, "mps": NO_SOFTCAP},
        ("aten::_scaled_dot_product_flash_attention",),
    ),
    "reference": AttentionBackend(boolean_mask, reference_attention),
}


class DeviceInfo(NamedTuple):
    """A type of device, as far as limits depend on it."""

    type: str  # cuda, cpu, mps
    capability: int | None = None  # major version of the CUDA compute capability


def device_info(device: torch.device) -> DeviceInfo:
    """Return the `DeviceInfo` of a device of this machine."""
    return DeviceInfo(device.type, torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else None)


def limits_on(name: str, device: DeviceInfo) -> Limits | None:
    """Return the limits of a back-end on such a device; None if it does not run there."""
    by_type = ATTENTION_BACKENDS[name].limits
    limits = Limits() if by_type is None else by_type.get(device.type)
    has_capability = limits is None or limits.capability is None or device.capability in limits.capability
    return limits if has_capability else None


def auto_candidates(device: DeviceInfo) -> list[str]:
    """Return the back-ends that `auto` tries, in order: only deterministic ones, so that a resume repeats its bits."""
    return [name for name in ATTENTION_BACKENDS if (limits := limits_on(name, device)) and limits.deterministic]


def reason_unsupported(
    name: str, spec: AttentionSpec, documents: bool, device: DeviceInfo, dtype: torch.dtype
) -> str | None:
    """Return why the limits rule out the back-end for this layer; None if they do not."""
    limits = limits_on(name, device)
    if limits is None:
        capability = f" of compute capability {device.capability}" if device.capability is not None else ""
        return f"does not run on {device.type}{capability}"
    widths = {spec.head_dim, spec.value_dim}
    unsupported = {
        f"{str(dtype).removeprefix('torch.')}": dtype not in limits.dtypes,
        f"heads {max(widths)} wide": limits.max_head_dim is not None and max(widths) > limits.max_head_dim,
        f"head widths that are no multiple of {limits.head_dim_multiple}": any(
            width % limits.head_dim_multiple for width in widths
        ),
        "a window": spec.window is not None and not limits.window,
        "a soft-cap": spec.softcap is not None and not limits.softcap,
        "isolated documents": documents and not limits.documents,
    }
    if feature := next((feature for feature, is_unsupported in unsupported.items() if is_unsupported), None):
        return f"does not support {feature}"
    if limits.package is None:
        return None
    package, oldest = limits.package
    try:
        installed = TorchVersion(version(package))
    except PackageNotFoundError:
        return f"{package} is not installed"
    return None if installed >= oldest else f"{package} {installed} is too old: {oldest} or later is needed"
