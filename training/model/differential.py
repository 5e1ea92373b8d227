"""Differential attention (arXiv:2410.05258): two softmaxes are subtracted, which cancels common noise.

Shapes: B batch, T tokens, S keys (cached ones included), C channels, H heads, G heads of keys and values, D half
the width of a head, E = 2D its width. Queries and keys hold the heads of the first softmax, then those of the second.
"""

import torch
from torch import Tensor, nn

from training.config import DifferentialConfig, ModelConfig
from training.kernels.interface import AttentionSpec
from training.model.attention import Attention, AttentionContext
from training.model.layers import RMSNorm


class DifferentialAttention(Attention):
    """y_h = (1 - lambda_init) RMSNorm((softmax(q1 k1) - lambda softmax(q2 k2)) v), then the output projection.

    lambda = exp(a) - exp(b) + lambda_init, one per layer. The paper computes a and b as products of two learned
    vectors that start near zero; here a and b are the learned numbers themselves and start at zero.
    """

    def __init__(self, config: DifferentialConfig, model: ModelConfig):
        super().__init__(config, model)  # 2G values of width D have as many parameters as G values of width E
        self.lambda_init = config.lambda_init
        self.exponents = nn.Parameter(torch.zeros(2))
        self.head_norm = RMSNorm(self.spec.value_dim, model.norm_eps)

    @staticmethod
    def attention_spec(config: DifferentialConfig, model: ModelConfig) -> AttentionSpec:
        """Return the spec of both softmaxes together: one call with twice the heads."""
        plain = Attention.attention_spec(config, model)
        heads, width = (2 * plain.n_head, 2 * plain.n_kv_head), plain.head_dim
        return AttentionSpec(*heads, width // 2, width, config.window, config.softcap)

    def attend(self, x_BTC: Tensor, q: Tensor, k: Tensor, v_BGSE: Tensor, context: AttentionContext) -> Tensor:
        """Return the normalized difference of both softmaxes' results, (B, H, T, E)."""
        # Two calls: a single call would copy all values, at every generated token.
        (q_1, q_2), (k_1, k_2) = q.chunk(2, dim=1), k.chunk(2, dim=1)
        first_BHTE = context.attend(q_1, k_1, v_BGSE, self.spec)
        second_BHTE = context.attend(q_2, k_2, v_BGSE, self.spec)
        # Round to the compute dtype first: `cast_for_inference` does so too, and must give the same bits.
        a, b = self.exponents.to(x_BTC.dtype).float().exp()
        lambda_ = a - b + self.lambda_init
        return self.head_norm(first_BHTE - lambda_ * second_BHTE) * (1 - self.lambda_init)
