"""Differential attention (arXiv:2410.05258): what two softmaxes agree on is taken away.

Shapes: B batch, T tokens, S keys (cached ones included), C channels, H heads, G heads of keys and values, D half
the width of a head, E = 2D its width. Queries and keys are the first softmax's heads, then the second's: 2H, 2G.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from training.config import DifferentialConfig, ModelConfig
from training.kernels.choose import AttentionSpec
from training.model.attention import Attention, AttentionContext
from training.model.cache import LayerCache
from training.model.layers import RMSNorm, rotate


class DifferentialAttention(Attention):
    """y_h = (1 - lambda_init) RMSNorm((softmax(q1 k1) - lambda softmax(q2 k2)) v), heads then mixed as ever.

    lambda = exp(a) - exp(b) + lambda_init, one a layer. In the paper, a and b are products of two learned vectors
    that begin near zero; here they are the learned numbers themselves, zero at first.
    """

    def __init__(self, section: DifferentialConfig, model: ModelConfig):
        super().__init__(section, model)  # 2G values D wide are as many parameters as G values E wide
        self.lambda_init = section.lambda_init
        self.exponents = nn.Parameter(torch.zeros(2))
        self.head_norm = RMSNorm(self.spec.value_dim, model.norm_eps)

    @staticmethod
    def attention_spec(section: DifferentialConfig, model: ModelConfig) -> AttentionSpec:
        """What this layer asks of an attention back-end: both calls as one."""
        plain = Attention.attention_spec(section, model)
        heads, width = (2 * plain.n_head, 2 * plain.n_kv_head), plain.head_dim
        return AttentionSpec(*heads, width // 2, width, section.window, section.softcap)

    def forward(self, x_BTC: Tensor, context: AttentionContext, cache: LayerCache | None) -> Tensor:
        """x_BTC -> y_BTC. `cache` holds the keys and values of earlier tokens and takes this call's."""
        q, k, v = self._project(x_BTC)
        q, k = (x.unflatten(-1, (-1, self.spec.head_dim)).transpose(1, 2) for x in (q, k))
        v_BGSE = v.unflatten(-1, (-1, self.spec.value_dim)).transpose(1, 2)
        q, k = self.query_norm(q), self.key_norm(k)
        if context.rotation_2TD is not None:
            q, k = rotate(q, context.rotation_2TD), rotate(k, context.rotation_2TD)
        if cache is not None:
            k, v_BGSE = cache.append("key", k), cache.append("value", v_BGSE)
        # Two calls, for one would copy all the values, at every token that is generated.
        first_BHTE, second_BHTE = (
            context.attend(q_BHTD, k_BGSD, v_BGSE, self.spec)
            for q_BHTD, k_BGSD in zip(q.chunk(2, dim=1), k.chunk(2, dim=1), strict=True)
        )
        y_BHTE = self.head_norm(first_BHTE - self._lambda(x_BTC.dtype) * second_BHTE) * (1 - self.lambda_init)
        return self.out(y_BHTE.transpose(1, 2).flatten(2))

    def _lambda(self, dtype: torch.dtype) -> Tensor:
        """A number in float32, of exponents cast to the type of the input, as every parameter is."""
        a, b = self.exponents.to(dtype).float().exp()
        return a - b + self.lambda_init
