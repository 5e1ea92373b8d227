"""Mixture of Experts: top-k routing that drops nothing (arXiv:1701.06538, arXiv:2211.15841).

Shapes: B batch, T tokens, C channels, F hidden, N = B x T tokens, E experts, K experts a token,
R = N x K rows (a token once for each of its experts, sorted by expert).

What balances the experts is exact under any split of the global batch: counts are sums over it, the
selection bias moves once a step, and the Switch loss takes its fractions from the step before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.config import MLPConfig, ModelConfig, MoEConfig
from training.kernels.choose import Kernels
from training.kernels.experts import Dispatch, sort_by_expert
from training.model.layers import ACTIVATIONS, Batch, Linear, uniform_from_keys
from training.model.mlp import MLP


class Routing(NamedTuple):
    """What the router did with N tokens; all but `topk_ids_NK` sums, so that micro-batches and ranks add up."""

    topk_ids_NK: Tensor  # int64: where each token was sent
    count_E: Tensor  # float32: tokens sent to each expert
    n_dropped: Tensor  # of what was sent, beyond the experts' capacity
    confidence: Tensor  # each token's largest share of the scores
    z_loss: Tensor  # logsumexp(router logits)^2 (arXiv:2202.08906 eq. 5)
    aux_loss: Tensor  # weighted z-loss and Switch loss, as added to the training loss


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

    def forward(self, x_NC: Tensor, topk_ids_NK: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
        """The sum over each token's experts by their weights, y_NC."""
        dtype = x_NC.dtype
        matrices = [(self.up, self.up_bias)] + [(self.gate, self.gate_bias)] * (self.gate is not None)
        rows = self.kernel.up(x_NC, tuple(matrix.to(dtype) for matrix, _ in matrices), dispatch)
        up_RF, *gate_RF = (
            row_RF if bias is None else row_RF + bias.to(dtype)[dispatch.expert_R]
            for row_RF, (_, bias) in zip(rows, matrices, strict=True)
        )
        h_RF = self.activation(gate_RF[0]) * up_RF if gate_RF else self.activation(up_RF)
        y_NC = self.kernel.down(h_RF, self.down.to(dtype), weight_NK, dispatch)
        if self.down_bias is None:
            return y_NC
        weight_NE = weight_NK.new_zeros(len(weight_NK), len(self.down)).scatter(1, topk_ids_NK, weight_NK)
        return y_NC + weight_NE.to(dtype) @ self.down_bias.to(dtype)


class MoE(nn.Module):
    """Each token through the top_k experts of a float32 router, by weight, and through those that are shared."""

    def __init__(self, section: MoEConfig, model: ModelConfig, kernels: Kernels):
        super().__init__()
        self.config = section
        self.router = Linear(model.n_embd, section.n_experts, bias=False)
        self.experts = Experts(section, model, kernels)
        self.shared = MLP(shared_expert_config(section, model), model, kernels) if section.n_shared else None
        # Added to the scores when experts are chosen, never to their weights (arXiv:2408.15664).
        self.register_buffer("selection_bias", torch.zeros(section.n_experts, dtype=torch.float32))
        # The last step's share of tokens of each expert; the Switch loss's fractions.
        share = torch.full((section.n_experts,), 1 / section.n_experts, dtype=torch.float32)
        self.register_buffer("load", share)

    def forward(self, x_BTC: Tensor, batch: Batch | None) -> tuple[Tensor, Routing | None]:
        """x_BTC -> (y_BTC, Routing, or None where there is no batch)."""
        section, x_NC = self.config, x_BTC.flatten(0, 1)
        logits_NE = self.router(self._jittered(x_BTC, batch).flatten(0, 1).float())
        score_NE = logits_NE.softmax(dim=-1) if section.scoring == "softmax" else logits_NE.sigmoid()
        topk_ids_NK = (score_NE + self.selection_bias).topk(section.top_k, dim=-1).indices
        weight_NK = score_NE.gather(1, topk_ids_NK)
        if section.renormalize:
            weight_NK = weight_NK / (weight_NK.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids may all be zero
        weight_NK = weight_NK * section.route_scale

        dispatch = sort_by_expert(topk_ids_NK, section.n_experts)
        n_dropped = logits_NE.new_zeros(())
        if section.capacity_factor is not None and batch is not None and batch.key_B is not None:
            kept_NK = self._within_capacity(dispatch)
            weight_NK, n_dropped = weight_NK * kept_NK, (~kept_NK).sum().float()
        y_NC = self.experts(x_NC, topk_ids_NK, weight_NK, dispatch)
        y_BTC = y_NC.view_as(x_BTC)
        if self.shared is not None:
            y_BTC = y_BTC + self.shared(x_BTC, batch)[0]
        if batch is None:
            return y_BTC, None

        share_NE = score_NE if section.scoring == "softmax" else score_NE / (score_NE.sum(-1, keepdim=True) + 1e-20)
        z_loss = logits_NE.logsumexp(dim=-1).square().sum()
        aux_loss = self._aux_loss(z_loss, share_NE, batch.n_targets)
        count_E = dispatch.offsets_E.diff(prepend=dispatch.offsets_E.new_zeros(1)).float()
        confidence = share_NE.detach().amax(dim=-1).sum()
        return y_BTC, Routing(topk_ids_NK, count_E, n_dropped, confidence, z_loss.detach(), aux_loss)

    def _jittered(self, x_BTC: Tensor, batch: Batch | None) -> Tensor:
        """The router's input: in training, times noise around 1 that every token of every step has of its own."""
        if not self.config.jitter or batch is None or batch.key_B is None:
            return x_BTC
        noise_BTC = uniform_from_keys(batch.key_B, *x_BTC.shape[1:])
        return x_BTC.float() * (1 + self.config.jitter * (2 * noise_BTC - 1))

    def _within_capacity(self, dispatch: Dispatch) -> Tensor:
        """bool (N, K): what an expert has room for, the first tokens first: of the future nothing is seen."""
        n_rows, n_experts = len(dispatch.order_R), self.config.n_experts
        capacity = math.ceil(self.config.capacity_factor * n_rows / n_experts)
        starts_E = dispatch.offsets_E.roll(1).index_fill(0, dispatch.offsets_E.new_zeros(1, dtype=torch.int64), 0)
        place_R = torch.arange(n_rows, device=dispatch.order_R.device) - starts_E[dispatch.expert_R]
        return (place_R < capacity)[dispatch.inverse_NK]

    def _aux_loss(self, z_loss: Tensor, share_NE: Tensor, n_targets: int) -> Tensor:
        """What this layer adds to the training loss."""
        aux_loss = self.config.z_loss_weight / n_targets * z_loss if self.config.z_loss_weight else z_loss.new_zeros(())
        if self.config.balance in ("switch", "both"):
            # arXiv:2101.03961 eq. 4, with the fractions of the step before.
            switch = self.config.n_experts * (self.load * share_NE.sum(dim=0)).sum()
            aux_loss = aux_loss + self.config.switch_weight / n_targets * switch
        return aux_loss


@torch.no_grad()
def finish_step(moes: Sequence[MoE], counts: list[Tensor], updated: bool = True) -> list[Tensor]:
    """Take the global batch's counts: move the selection biases, remember the loads. Returns each bias's range.

    Of a step that was not `updated` nothing is learned. The layers have one section, and are done together: of so small
    operations, a GPU would wait for each.
    """
    section, count_LE = moes[0].config, torch.stack(counts)
    if updated and section.balance in ("bias", "both"):
        moves_LE = section.bias_rate * (count_LE.mean(dim=1, keepdim=True) - count_LE).sign()
        torch._foreach_add_([moe.selection_bias for moe in moes], list(moves_LE))
    if updated:
        torch._foreach_copy_([moe.load for moe in moes], list(count_LE / count_LE.sum(dim=1, keepdim=True)))
    bias_LE = torch.stack([moe.selection_bias for moe in moes])
    return list(bias_LE.amax(dim=1) - bias_LE.amin(dim=1))


def shared_expert_config(section: MoEConfig, model: ModelConfig) -> MLPConfig:
    """The experts that every token goes to, as one dense layer."""
    hidden = section.n_shared * (section.hidden or 4 * model.n_embd)
    return MLPConfig(hidden=hidden, activation=section.activation, gated=section.gated)


def routing_metrics(layers: dict[str, list[Sequence[float]]], top_ks: list[int]) -> dict[str, object]:
    """What the routers of a step did, in words that a log can print. `layers` holds the metrics of every MoE layer.

    One number for all layers: "expert_load_max" (busiest expert over the mean, of the worst layer), "expert_entropy"
    (of the load; 1: even; the worst layer), "dead_experts" (those with less than `dead_expert_threshold`),
    "router_confidence" and "router_z_loss" (mean over tokens and layers), "router_bias_range" (the largest),
    "dropped_share" (of all that was sent). By layer: "expert_load", and a list of each in "router_layers".
    """
    counts_LE = layers["expert_count"]
    sent_L = [sum(count_E) for count_E in counts_LE]
    load_LE = [[round(count / sent, 8) for count in count_E] for count_E, sent in zip(counts_LE, sent_L, strict=True)]
    n_tokens_L = [sent / top_k for sent, top_k in zip(sent_L, top_ks, strict=True)]

    def per_token(name: str) -> list[float]:
        return [value / n for (value,), n in zip(layers[name], n_tokens_L, strict=True)]

    by_layer = {
        "entropy": [entropy(load_E) for load_E in load_LE],
        "confidence": per_token("confidence"),
        "z_loss": per_token("z_loss"),
        "bias_range": [value for (value,) in layers["bias_range"]],
        "dropped": [value / sent for (value,), sent in zip(layers["dropped"], sent_L, strict=True)],
    }
    return {
        "expert_load": load_LE,
        "expert_load_max": max(max(load_E) * len(load_E) for load_E in load_LE),
        "expert_entropy": min(by_layer["entropy"]),
        "dead_experts": sum(share < dead_expert_threshold(len(load_E)) for load_E in load_LE for share in load_E),
        "router_confidence": sum(by_layer["confidence"]) / len(load_LE),
        "router_z_loss": sum(by_layer["z_loss"]) / len(load_LE),
        "router_bias_range": max(by_layer["bias_range"]),
        "dropped_share": sum(value for (value,) in layers["dropped"]) / sum(sent_L),
        "router_layers": by_layer,
    }


def entropy(load_E: Sequence[float]) -> float:
    """Of the experts' load, over that of an even one: 1 for even, 0 for all tokens to one expert."""
    if len(load_E) == 1:
        return 1.0
    return -sum(share * math.log(share) for share in load_E if share) / math.log(len(load_E))


def dead_expert_threshold(n_experts: int) -> float:
    """The share of the load below which an expert learns next to nothing: 1 %, or a tenth of an even share."""
    return min(0.01, 0.1 / n_experts)
