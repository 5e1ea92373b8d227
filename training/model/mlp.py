"""The dense feed-forward layer. Shapes: B batch, T tokens, C channels."""

from torch import Tensor, nn

from training.config import MLPConfig, ModelConfig
from training.kernels.interface import Kernels
from training.model.layers import ACTIVATIONS, FeedForwardContext, Linear


class MLP(nn.Module):
    """Up-projection, activation, down-projection; optionally gated (arXiv:2002.05202)."""

    def __init__(self, config: MLPConfig, model: ModelConfig, kernels: Kernels):  # noqa: ARG002 (one signature)
        super().__init__()
        hidden = config.hidden or 4 * model.n_embd
        self.activation = ACTIVATIONS[config.activation]
        self.up = Linear(model.n_embd, hidden, bias=model.bias)
        self.gate = Linear(model.n_embd, hidden, bias=model.bias) if config.gated else None
        self.down = Linear(hidden, model.n_embd, bias=model.bias)

    def forward(self, x_BTC: Tensor, context: FeedForwardContext) -> tuple[Tensor, None]:  # noqa: ARG002 (one signature)
        """Return (y_BTC, None): a dense layer routes nothing."""
        if self.gate is None:
            return self.down(self.activation(self.up(x_BTC))), None
        return self.down(self.activation(self.gate(x_BTC)) * self.up(x_BTC)), None
