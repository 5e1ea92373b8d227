"""What a model asks of its kernels, the signatures of kernels, and the kernels that a model gets.

Shapes: B samples, T queries, S keys (the queries are the last T keys), H query heads, G heads of keys and values,
D width of queries and keys, E width of values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from training.kernels.attention.masks import Visibility
from training.kernels.experts import TORCH_EXPERTS, ExpertKernel
from training.kernels.loss import TORCH_LOSS

HALF_DTYPES = (torch.bfloat16, torch.float16)


class AttentionSpec(NamedTuple):
    """What a layer asks of an attention back-end."""

    n_head: int
    n_kv_head: int
    head_dim: int  # of queries and keys
    value_dim: int
    window: int | None = None  # in tokens, including the query's own
    softcap: float | None = None
    scale: float | None = None


class ExpertsSpec(NamedTuple):
    """What a Mixture-of-Experts layer asks of its kernel."""

    width: int
    hidden: int
    n_experts: int = 4
    top_k: int = 2
    gated: bool = True


class LossSpec(NamedTuple):
    """What the output projection asks of its kernel."""

    width: int
    n_vocab: int
    softcap: float | None = None


class KernelRequirements(NamedTuple):
    """What all layers of a model ask of its kernels."""

    attention: frozenset[AttentionSpec]
    experts: frozenset[ExpertsSpec]
    isolate_documents: bool
    loss: frozenset[LossSpec] = frozenset()


class Attend(Protocol):
    """The signature of every attention kernel: y_BHTE = softmax(scale x q k) v. Kernels leave the annotations out.

    `mask` is what `build_mask` of the same back-end returns. `scale` multiplies the scores (None: 1/sqrt(D));
    `softcap` bounds them to softcap x tanh(score / softcap) (arXiv:2408.00118; None: no bound). Query head h uses
    the keys of head h // (H / G).
    """

    def __call__(
        self,
        q_BHTD: Tensor,
        k_BGSD: Tensor,
        v_BGSE: Tensor,
        mask: Any,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Tensor: ...


class Limits(NamedTuple):
    """What an attention back-end supports on one type of device. The defaults allow everything."""

    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALF_DTYPES)
    max_head_dim: int | None = None
    head_dim_multiple: int = 1
    window: bool = True
    softcap: bool = True
    documents: bool = True
    capability: range | None = None  # major version of the CUDA compute capability; None: any
    package: tuple[str, str] | None = None  # distribution that has to be installed, and its oldest version that works
    deterministic: bool = True  # gradients are bit-identical from run to run


class AttentionBackend(NamedTuple):
    """One way to compute attention."""

    build_mask: Callable[[Visibility], Any]  # called once per forward for all layers that share the mask
    attend: Attend
    limits: Mapping[str, Limits] | None = None  # by device type; None: no limits, on any device
    saved_operators: tuple[str, ...] = ()  # as `ExpertKernel.saved_operators`


class Kernels(NamedTuple):
    """The kernels that a model computes with. The defaults run everywhere."""

    attention: AttentionBackend | None = None  # None: PyTorch's choice, or the reference if scores are soft-capped
    experts: ExpertKernel = TORCH_EXPERTS["loop"]
    loss: Callable[..., Tensor] = TORCH_LOSS["chunked"]
