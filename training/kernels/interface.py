"""The interface of models and kernels: requirements of a model, signatures, limits, and `Kernels`.

Shapes: B samples, T queries, S keys (the queries are the last T keys), H query heads, G heads of keys and values,
D width of queries and keys, E width of values.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.kernels.attention.masks import Visibility
from training.kernels.experts import TORCH_EXPERTS, ExpertKernel
from training.kernels.loss import TORCH_LOSS

HALF_DTYPES = (torch.bfloat16, torch.float16)


class AttentionSpec(NamedTuple):
    """The sizes and features of a layer that an attention back-end must support."""

    n_head: int
    n_kv_head: int
    head_dim: int  # of queries and keys
    value_dim: int
    window: int | None = None  # in tokens, including the query's own
    softcap: float | None = None
    scale: float | None = None


class ExpertsSpec(NamedTuple):
    """The sizes of a Mixture-of-Experts layer that its kernel must support."""

    width: int
    hidden: int
    n_experts: int = 4
    top_k: int = 2
    gated: bool = True


class LossSpec(NamedTuple):
    """The sizes of the output projection that the loss kernel must support."""

    width: int
    n_rows: int
    softcap: float | None = None


class KernelRequirements(NamedTuple):
    """The requirements of all layers of a model."""

    attention: frozenset[AttentionSpec]
    experts: frozenset[ExpertsSpec]
    isolate_documents: bool
    loss: frozenset[LossSpec] = frozenset()


class Limits(NamedTuple):
    """Limits of an attention back-end on one type of device. The defaults allow everything."""

    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALF_DTYPES)
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    window: bool = True
    softcap: bool = True
    documents: bool = True
    capability: range | None = None  # major version of the CUDA compute capability; None: any
    package: tuple[str, str] | None = None  # required distribution and its oldest version that works
    deterministic: bool = True  # gradients are bit-identical from run to run


class AttentionBackend(NamedTuple):
    """One implementation of attention."""

    build_mask: Callable[[Visibility], Any]  # called once per forward for all layers that share the mask
    # (q_BHTD, k_BGSD, v_BGSE, mask, *, scale=None, softcap=None) -> y_BHTE = softmax(scale x q k) v. Query head h uses
    # the keys of head h // (H / G). `scale` multiplies the scores (None: 1/sqrt(D)). `softcap` bounds them to
    # softcap x tanh(score / softcap) (arXiv:2408.00118; None: no bound).
    attend: Callable[..., Tensor]
    limits: Mapping[str, Limits] | None = None  # by device type; None: no limits, on any device
    saved_operators: tuple[str, ...] = ()  # as `ExpertKernel.saved_operators`


class Kernels(NamedTuple):
    """The kernels that a model computes with. The defaults run everywhere."""

    attention: AttentionBackend | None = None  # None: PyTorch's choice, or the reference if scores are soft-capped
    experts: ExpertKernel = TORCH_EXPERTS["loop"]
    loss: Callable[..., Tensor] = TORCH_LOSS["chunked"]
