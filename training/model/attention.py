"""Multi-head self-attention.

Shapes: B batch, T tokens, S keys (cached ones included), C channels, H heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import AttentionConfig, ModelConfig
from training.kernels import Kernels
from training.model.layers import Linear, RMSNorm, rotate


class Attention(nn.Module):
    """Causal multi-head attention. Query, key and value are parameters of their own and one product."""

    def __init__(self, section: AttentionConfig, model: ModelConfig, kernels: Kernels):
        super().__init__()
        self.n_head, self.head_dim = model.n_head, model.n_embd // model.n_head
        self.kernel = kernels.attention
        self.query, self.key, self.value, self.out = (
            Linear(model.n_embd, model.n_embd, bias=model.bias) for _ in range(4)
        )
        self.query_norm, self.key_norm = (
            RMSNorm(self.head_dim, model.norm_eps) if section.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x_BTC: Tensor, rotation_2TD: Tensor | None, cache: dict[str, Tensor] | None) -> Tensor:
        """x_BTC -> y_BTC. `cache` holds the keys and values of earlier tokens and takes this call's."""
        q, k, v = (
            x.unflatten(-1, (self.n_head, self.head_dim)).transpose(1, 2) for x in self._project(x_BTC).chunk(3, dim=-1)
        )
        q_BHTD, k_BHSD, v_BHSD = self.query_norm(q), self.key_norm(k), v
        if rotation_2TD is not None:
            q_BHTD, k_BHSD = rotate(q_BHTD, rotation_2TD), rotate(k_BHSD, rotation_2TD)
        if cache is not None:
            if cache:
                k_BHSD = torch.cat([cache["key"], k_BHSD], dim=2)
                v_BHSD = torch.cat([cache["value"], v_BHSD], dim=2)
            cache["key"], cache["value"] = k_BHSD, v_BHSD
        y_BHTD = self.kernel(q_BHTD, k_BHSD, v_BHSD)
        return self.out(y_BHTD.transpose(1, 2).flatten(2))

    def _project(self, x_BTC: Tensor) -> Tensor:
        """(B, T, 3C): query, key and value."""
        projections = (self.query, self.key, self.value)
        weight = torch.cat([p.weight for p in projections]).to(x_BTC.dtype)
        if self.query.bias is None:
            return F.linear(x_BTC, weight)
        return F.linear(x_BTC, weight, torch.cat([p.bias for p in projections]).to(x_BTC.dtype))
