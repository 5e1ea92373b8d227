"""Gated attention (arXiv:2505.06708): a sigmoid gate on each channel of the output, as in Qwen3-Next.

Shapes: B batch, T tokens, C channels, H query heads, E width of a value.
"""

from torch import Tensor

from training.config import GatedConfig, ModelConfig
from training.model.attention import Attention, AttentionContext
from training.model.layers import Linear


class GatedAttention(Attention):
    """y = out(sigmoid(gate(x)) * softmax(q k) v): every channel of every head has a gate computed from the input."""

    def __init__(self, config: GatedConfig, model: ModelConfig):
        super().__init__(config, model)
        self.gate = Linear(model.n_embd, self.spec.n_head * self.spec.value_dim, bias=model.bias)

    def attend(self, x_BTC: Tensor, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        """Return the gated attention output, (B, H, T, E)."""
        gate_BHTE = self.gate(x_BTC).unflatten(-1, (self.spec.n_head, -1)).transpose(1, 2)
        return super().attend(x_BTC, q, k, v, context) * gate_BHTE.sigmoid()
