"""The dense feed-forward layer. Shapes: B batch, T tokens, C channels."""

from __future__ import annotations

from torch import Tensor, nn

from training.config import MLPConfig, ModelConfig
from training.kernels.choose import Kernels
from training.model.layers import ACTIVATIONS, Batch, Linear


class MLP(nn.Module):
    """Up, nonlinearity, down; gated (arXiv:2002.05202) if asked for."""

    def __init__(self, section: MLPConfig, model: ModelConfig, kernels: Kernels):  # noqa: ARG002 (one signature)
        super().__init__()
        hidden = section.hidden or 4 * model.n_embd
        self.activation = ACTIVATIONS[section.activation]
        self.up = Linear(model.n_embd, hidden, bias=model.bias)
        self.gate = Linear(model.n_embd, hidden, bias=model.bias) if section.gated else None
        self.down = Linear(hidden, model.n_embd, bias=model.bias)

    def forward(self, x_BTC: Tensor, batch: Batch | None) -> tuple[Tensor, None]:  # noqa: ARG002 (one signature)
        """x_BTC -> (y_BTC, None: nothing was routed)."""
        if self.gate is None:
            return self.down(self.activation(self.up(x_BTC))), None
        return self.down(self.activation(self.gate(x_BTC)) * self.up(x_BTC)), None
