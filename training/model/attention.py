"""Self-attention: multi-head, grouped-query, multi-query.

Shapes: B batch, T tokens, S keys (cached ones included), C channels, H query heads, G heads of keys and
values, D head width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import AttentionConfig, ModelConfig
from training.kernels.choose import AttentionBackend, AttentionSpec
from training.model.cache import LayerCache
from training.model.layers import Linear, RMSNorm, rotate


class AttentionContext(NamedTuple):
    """Where the tokens of a call are: what a mixer needs to know beside their vectors."""

    rotation_2TD: Tensor | None  # of the mixer's `rotary_dim`, if it has one
    mask: Any  # which keys a query sees, as the back-end wants it
    backend: AttentionBackend

    def attend(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, spec: AttentionSpec) -> Tensor:
        """y_BHTE: the mean of the values that each query sees, weighted by softmax."""
        return self.backend.attend(q_BHTD, k_BGSD, v_BGSE, self.mask, scale=spec.scale, softcap=spec.softcap)


class Attention(nn.Module):
    """Causal attention. Query, key and value are parameters of their own and, in training, one product."""

    def __init__(self, section: AttentionConfig, model: ModelConfig):
        super().__init__()
        self.spec = spec = self.attention_spec(section, model)
        self.rotary_dim = spec.head_dim if section.rope and model.position == "rope" else 0
        sizes = [(model.n_embd, n * spec.head_dim) for n in (spec.n_head, spec.n_kv_head, spec.n_kv_head)]
        sizes.append((spec.n_head * spec.head_dim, model.n_embd))
        self.query, self.key, self.value, self.out = (Linear(*size, bias=model.bias) for size in sizes)
        self.query_norm, self.key_norm = (
            RMSNorm(spec.head_dim, model.norm_eps) if section.qk_norm else nn.Identity() for _ in range(2)
        )

    @staticmethod
    def attention_spec(section: AttentionConfig, model: ModelConfig) -> AttentionSpec:
        """What this layer asks of an attention back-end."""
        width = section.head_dim or model.n_embd // model.n_head
        n_kv_head = section.n_kv_head or model.n_head
        return AttentionSpec(model.n_head, n_kv_head, width, width, section.window, section.softcap)

    def forward(self, x_BTC: Tensor, context: AttentionContext, cache: LayerCache | None) -> Tensor:
        """x_BTC -> y_BTC. `cache` holds the keys and values of earlier tokens and takes this call's."""
        q_BHTD, k_BGSD, v_BGSD = (
            x.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2) for x in self._project(x_BTC)
        )
        q_BHTD, k_BGSD = self.query_norm(q_BHTD), self.key_norm(k_BGSD)
        if context.rotation_2TD is not None:
            q_BHTD, k_BGSD = rotate(q_BHTD, context.rotation_2TD), rotate(k_BGSD, context.rotation_2TD)
        if cache is not None:
            k_BGSD, v_BGSD = cache.append("key", k_BGSD), cache.append("value", v_BGSD)
        y_BHTD = context.attend(q_BHTD, k_BGSD, v_BGSD, self.spec)
        return self.out(y_BHTD.transpose(1, 2).flatten(2))

    def _project(self, x_BTC: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, heads side by side."""
        projections = (self.query, self.key, self.value)
        if not torch.is_grad_enabled():  # a few tokens: joining the weights would cost more than three products
            return tuple(projection(x_BTC) for projection in projections)
        weight = torch.cat([p.weight for p in projections]).to(x_BTC.dtype)
        bias = None if self.query.bias is None else torch.cat([p.bias for p in projections]).to(x_BTC.dtype)
        return F.linear(x_BTC, weight, bias).split([p.out_features for p in projections], dim=-1)
