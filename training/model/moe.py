"""Mixture of Experts: dropless top-k routing (arXiv:1701.06538, arXiv:2211.15841).

Shapes: B batch, T tokens, C channels, F hidden, N = B x T tokens, E experts, K experts a token,
R = N x K rows (a token once for each of its experts, sorted by expert).

What balances the experts is exact under any split of the global batch: counts are sums over it, the
selection bias moves once a step, and the Switch loss takes its fractions from the step before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.config import ModelConfig, MoEConfig
from training.kernels import Kernels
from training.model.layers import ACTIVATIONS, Linear


class Routing(NamedTuple):
    """What the router did with N tokens: sums, so that micro-batches and ranks add up."""

    count_E: Tensor  # float32: tokens sent to each expert
    z_loss: Tensor  # sum over tokens of logsumexp(router logits)^2 (arXiv:2202.08906 eq. 5)
    aux_loss: Tensor  # weighted z-loss and Switch loss, as added to the training loss


class _Reorder(torch.autograd.Function):
    """rows_R = x_N[index_R // K]; backward sums each token's K rows in order, so it is deterministic."""

    @staticmethod
    def forward(ctx, x_NC: Tensor, order_R: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.top_k = top_k
        return x_NC.index_select(0, order_R // top_k if top_k > 1 else order_R)

    @staticmethod
    def backward(ctx, grad_RC: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_R,) = ctx.saved_tensors
        grad_RC = grad_RC.index_select(0, inverse_R)
        if ctx.top_k > 1:
            grad_RC = grad_RC.unflatten(0, (-1, ctx.top_k)).sum(1)
        return grad_RC, None, None, None


class Experts(nn.Module):
    """E feed-forward layers in one set of tensors; `nn.Linear`'s layout, one matrix an expert."""

    def __init__(self, section: MoEConfig, model: ModelConfig, kernels: Kernels):
        super().__init__()
        n, width, hidden = section.n_experts, model.n_embd, section.hidden or 4 * model.n_embd
        self.activation = ACTIVATIONS[section.activation]
        self.kernel = kernels.experts
        self.up = nn.Parameter(torch.empty(n, hidden, width))
        self.gate = nn.Parameter(torch.empty(n, hidden, width)) if section.gated else None
        self.down = nn.Parameter(torch.empty(n, width, hidden))
        biased = model.bias
        self.up_bias = nn.Parameter(torch.zeros(n, hidden)) if biased else None
        self.gate_bias = nn.Parameter(torch.zeros(n, hidden)) if biased and section.gated else None
        self.down_bias = nn.Parameter(torch.zeros(n, width)) if biased else None

    def forward(self, x_RC: Tensor, expert_R: Tensor, count_E: Tensor) -> Tensor:
        """Rows sorted by expert (expert_R, count_E: int64) -> y_RC."""

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = self.kernel(x, weight.to(x.dtype), count_E)
            return y if bias is None else y + bias.to(x.dtype)[expert_R]

        up_RF = linear(x_RC, self.up, self.up_bias)
        if self.gate is None:
            return linear(self.activation(up_RF), self.down, self.down_bias)
        gate_RF = linear(x_RC, self.gate, self.gate_bias)
        return linear(self.activation(gate_RF) * up_RF, self.down, self.down_bias)


class MoE(nn.Module):
    """Each token through its top_k experts, weighted by a float32 softmax router."""

    def __init__(self, section: MoEConfig, model: ModelConfig, kernels: Kernels):
        super().__init__()
        self.section = section
        self.router = Linear(model.n_embd, section.n_experts, bias=False)
        self.experts = Experts(section, model, kernels)
        # Added to the scores when experts are chosen, never to their weights (arXiv:2408.15664).
        self.register_buffer("selection_bias", torch.zeros(section.n_experts, dtype=torch.float32))
        # The last step's share of tokens of each expert; the Switch loss's fractions.
        share = torch.full((section.n_experts,), 1 / section.n_experts, dtype=torch.float32)
        self.register_buffer("load", share)

    def forward(self, x_BTC: Tensor, n_targets: int) -> tuple[Tensor, Routing]:
        """x_BTC -> (y_BTC, Routing). `n_targets` is the global batch's count, by which losses are divided."""
        x_NC, top_k = x_BTC.flatten(0, 1), self.section.top_k
        logits_NE = self.router(x_NC.float())
        probability_NE = logits_NE.softmax(dim=-1)
        expert_NK = (probability_NE + self.selection_bias).topk(top_k, dim=-1).indices
        weight_NK = probability_NE.gather(1, expert_NK)
        if self.section.renormalize:
            weight_NK = weight_NK / weight_NK.sum(dim=-1, keepdim=True)

        expert_R, order_R = expert_NK.flatten().sort(stable=True)
        inverse_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))
        count_E = torch.zeros_like(self.load, dtype=torch.int64).scatter_add_(0, expert_R, torch.ones_like(expert_R))
        y_RC = self.experts(_Reorder.apply(x_NC, order_R, inverse_R, top_k), expert_R, count_E)
        y_NKC = _Reorder.apply(y_RC, inverse_R, order_R, 1).unflatten(0, (-1, top_k))
        y_NC = torch.einsum("nkc,nk->nc", y_NKC, weight_NK.to(y_NKC.dtype))

        z_loss, aux_loss = self._losses(logits_NE, probability_NE, n_targets)
        return y_NC.view_as(x_BTC), Routing(count_E.float(), z_loss, aux_loss)

    def _losses(self, logits_NE: Tensor, probability_NE: Tensor, n_targets: int) -> tuple[Tensor, Tensor]:
        """(z-loss as a sum over tokens, everything this layer adds to the training loss)."""
        z_loss = logits_NE.logsumexp(dim=-1).square().sum()
        aux_loss = self.section.z_loss_weight / n_targets * z_loss
        if self.section.balance in ("switch", "both"):
            # arXiv:2101.03961 eq. 4, with the fractions of the step before.
            switch = self.section.n_experts * (self.load * probability_NE.sum(dim=0)).sum()
            aux_loss = aux_loss + self.section.switch_weight / n_targets * switch
        return z_loss.detach(), aux_loss

    @torch.no_grad()
    def finish_step(self, count_E: Tensor) -> None:
        """Take the global batch's counts: move the selection bias, remember the load."""
        if self.section.balance in ("bias", "both"):
            self.selection_bias += self.section.bias_rate * (count_E.mean() - count_E).sign()
        self.load.copy_(count_E / count_E.sum())
