"""Mixture of Experts: top-k routing; drops tokens only with `capacity_factor` (arXiv:1701.06538, arXiv:2211.15841).

Shapes: B batch, T tokens, C channels, F hidden, N = B x T tokens, E experts, K experts per token, L layers,
R = N x K rows (each token once for each of its experts, sorted by expert).

Balancing gives the same result for any split of the global batch: expert counts are summed over the batch, the
selection bias moves once per update, and the Switch loss uses the fractions of the previous update.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.config import MLPConfig, ModelConfig, MoEConfig
from training.kernels.experts import Dispatch, sort_by_expert
from training.kernels.interface import Kernels
from training.model.layers import ACTIVATIONS, FeedForwardContext, Linear, uniform_from_keys
from training.model.mlp import MLP


class Routing(NamedTuple):
    """Routing of N tokens. All but `topk_ids_NK` are sums over tokens, so they add over micro-batches and ranks."""

    topk_ids_NK: Tensor  # int64: the experts of each token
    count_E: Tensor  # float32: tokens routed to each expert
    n_dropped: Tensor  # assignments beyond the experts' capacity
    confidence: Tensor  # largest score of each token, as a share of its scores
    z_loss: Tensor  # logsumexp(router logits)^2 (arXiv:2202.08906 eq. 5)
    aux_loss: Tensor  # weighted z-loss and Switch loss, as added to the training loss


class Experts(nn.Module):
    """E feed-forward layers as stacked matrices, each laid out like the weight of an `nn.Linear`."""

    def __init__(self, config: MoEConfig, model: ModelConfig, kernels: Kernels):
        super().__init__()
        n, width, hidden = config.n_experts, model.n_embd, config.hidden or 4 * model.n_embd
        self.activation = ACTIVATIONS[config.activation]
        self.kernel = kernels.experts
        self.up = nn.Parameter(torch.empty(n, hidden, width))
        self.gate = nn.Parameter(torch.empty(n, hidden, width)) if config.gated else None
        self.down = nn.Parameter(torch.empty(n, width, hidden))
        self.up_bias = nn.Parameter(torch.zeros(n, hidden)) if model.bias else None
        self.gate_bias = nn.Parameter(torch.zeros(n, hidden)) if model.bias and config.gated else None
        self.down_bias = nn.Parameter(torch.zeros(n, width)) if model.bias else None

    def forward(self, x_NC: Tensor, topk_ids_NK: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
        """Return y_NC, the weighted sum of the outputs of each token's experts."""
        dtype = x_NC.dtype
        matrices = [(self.up, self.up_bias)] + [(self.gate, self.gate_bias)] * (self.gate is not None)
        projected = self.kernel.up(x_NC, tuple(matrix.to(dtype) for matrix, _ in matrices), dispatch)
        up_RF, *gate_RF = (
            row_RF if bias is None else row_RF + bias.to(dtype)[dispatch.expert_R]
            for row_RF, (_, bias) in zip(projected, matrices, strict=True)
        )
        h_RF = self.activation(gate_RF[0]) * up_RF if gate_RF else self.activation(up_RF)
        y_NC = self.kernel.down(h_RF, self.down.to(dtype), weight_NK, dispatch)
        if self.down_bias is None:
            return y_NC
        weight_NE = weight_NK.new_zeros(len(weight_NK), len(self.down)).scatter(1, topk_ids_NK, weight_NK)
        return y_NC + weight_NE.to(dtype) @ self.down_bias.to(dtype)


class MoE(nn.Module):
    """A float32 router, the experts it chooses from, and shared experts that every token uses."""

    def __init__(self, config: MoEConfig, model: ModelConfig, kernels: Kernels):
        super().__init__()
        self.config = config
        self.is_renormalized = config.is_renormalized  # torch.compile in PyTorch 2.5 cannot trace a property
        self.router = Linear(model.n_embd, config.n_experts, bias=False)
        self.experts = Experts(config, model, kernels)
        self.shared = None
        if config.n_shared:  # one dense layer that computes all shared experts
            hidden = config.n_shared * (config.hidden or 4 * model.n_embd)
            shared = MLPConfig(hidden=hidden, activation=config.activation, gated=config.gated)
            self.shared = MLP(shared, model, kernels)
        # Added to the scores for top-k only, not to the experts' weights (arXiv:2408.15664).
        self.register_buffer("selection_bias", torch.zeros(config.n_experts, dtype=torch.float32))
        # Each expert's share of the previous update's tokens: the fractions of the Switch loss.
        self.register_buffer("load", torch.full((config.n_experts,), 1 / config.n_experts, dtype=torch.float32))

    def forward(self, x_BTC: Tensor, context: FeedForwardContext) -> tuple[Tensor, Routing | None]:
        """Return (y_BTC, Routing); Routing is None if `context.n_tokens` is."""
        # x_NC first: the order decides in which order autograd adds the gradients of x, and so their last bits.
        config, x_NC, router_input_BTC = self.config, x_BTC.flatten(0, 1), x_BTC.float()
        if config.jitter and context.is_training:  # noise in 1 +- jitter
            noise_BTC = uniform_from_keys(context.key_B, *x_BTC.shape[1:])
            router_input_BTC = router_input_BTC * (1 + config.jitter * (2 * noise_BTC - 1))
        logits_NE = self.router(router_input_BTC.flatten(0, 1))
        score_NE = logits_NE.softmax(dim=-1) if config.scoring == "softmax" else logits_NE.sigmoid()
        topk_ids_NK = (score_NE + self.selection_bias).topk(config.top_k, dim=-1).indices
        weight_NK = score_NE.gather(1, topk_ids_NK)
        if self.is_renormalized:
            weight_NK = weight_NK / (weight_NK.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids may all be zero
        weight_NK = weight_NK * config.route_scale

        dispatch = sort_by_expert(topk_ids_NK, config.n_experts)
        n_dropped = logits_NE.new_zeros(())
        if config.capacity_factor is not None and context.is_training:
            n_rows = topk_ids_NK.numel()
            capacity = min(n_rows, math.ceil(config.capacity_factor * n_rows / config.n_experts))
            first_row_E = dispatch.offsets_E - dispatch.count_E
            rank_in_expert_R = torch.arange(n_rows, device=x_NC.device) - first_row_E[dispatch.expert_R]
            kept_NK = (rank_in_expert_R < capacity)[dispatch.inverse_NK]  # earlier tokens first: routing stays causal
            weight_NK, n_dropped = weight_NK * kept_NK, (~kept_NK).sum().float()
        y_BTC = self.experts(x_NC, topk_ids_NK, weight_NK, dispatch).view_as(x_BTC)
        if self.shared is not None:
            y_BTC = y_BTC + self.shared(x_BTC, context)[0]
        if context.n_tokens is None:
            return y_BTC, None

        share_NE = score_NE if config.scoring == "softmax" else score_NE / (score_NE.sum(-1, keepdim=True) + 1e-20)
        z_loss = logits_NE.logsumexp(dim=-1).square().sum()
        aux_loss = config.z_loss_weight / context.n_tokens * z_loss if config.z_loss_weight else z_loss.new_zeros(())
        if config.balance in ("switch", "both"):
            # arXiv:2101.03961 eq. 4, with the fractions of the previous update: the same for every micro-batch.
            switch = config.n_experts * (self.load * share_NE.sum(dim=0)).sum()
            aux_loss = aux_loss + config.switch_weight / context.n_tokens * switch
        confidence = share_NE.detach().amax(dim=-1).sum()
        return y_BTC, Routing(topk_ids_NK, dispatch.count_E.float(), n_dropped, confidence, z_loss.detach(), aux_loss)


@torch.no_grad()
def finish_step(moes: Sequence[MoE], counts: list[Tensor], updated: bool = True) -> list[Tensor]:
    """Move biases and loads of layers with one config by the global batch's counts; return the range of each bias.

    No change if the update was skipped. The layers are batched, because a GPU would launch many tiny kernels.
    """
    config, count_LE = moes[0].config, torch.stack(counts)
    if updated and config.balance in ("bias", "both"):
        moves_LE = config.bias_rate * (count_LE.mean(dim=1, keepdim=True) - count_LE).sign()
        torch._foreach_add_([moe.selection_bias for moe in moes], list(moves_LE))
    if updated:
        torch._foreach_copy_([moe.load for moe in moes], list(count_LE / count_LE.sum(dim=1, keepdim=True)))
    bias_LE = torch.stack([moe.selection_bias for moe in moes])
    return list(bias_LE.amax(dim=1) - bias_LE.amin(dim=1))
