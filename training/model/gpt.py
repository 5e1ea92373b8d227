"""GPT-2, dense or Mixture-of-Experts: an embedding, a pattern of blocks, a head.

Shapes: B batch, T tokens, C channels, V vocabulary, N = B x T tokens.
The contract with the loop is a value: `loss, metrics = model(tokens_BT, targets_BT, n_targets)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import (
    AttentionConfig,
    BlockConfig,
    DifferentialConfig,
    LatentConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)
from training.kernels.attention.table import Documents, Visibility, left_padded
from training.kernels.choose import (
    ATTENTION_BACKENDS,
    AttentionBackend,
    ExpertsSpec,
    KernelRequirements,
    Kernels,
    LossSpec,
)
from training.kernels.loss import apply_softcap
from training.model.attention import Attention, AttentionContext
from training.model.cache import Cache, LayerCache
from training.model.differential import DifferentialAttention
from training.model.latent import LatentAttention
from training.model.layers import Batch, Linear, build_norm, normal_from_key, rotary_table
from training.model.mlp import MLP
from training.model.moe import MoE, Routing, finish_step, routing_metrics

MIXERS = {AttentionConfig: Attention, LatentConfig: LatentAttention, DifferentialConfig: DifferentialAttention}
FEED_FORWARDS = {MLPConfig: MLP, MoEConfig: MoE}

ParameterKind = Literal["matrix", "embedding", "router", "vector"]


class Block(nn.Module):
    """Pre-normalised mixer and feed-forward layer, each added to the residual stream."""

    def __init__(self, block: BlockConfig, model: ModelConfig, kernels: Kernels):
        super().__init__()
        self.norm_1 = build_norm(model)
        self.mixer = MIXERS[type(block.mixer)](block.mixer, model)
        self.norm_2 = build_norm(model)
        self.ffn = FEED_FORWARDS[type(block.ffn)](block.ffn, model, kernels)

    def forward(
        self, x_BTC: Tensor, context: AttentionContext, batch: Batch | None, cache: LayerCache | None
    ) -> tuple[Tensor, Routing | None]:
        x_BTC = x_BTC + self.mixer(self.norm_1(x_BTC), context, cache)
        y_BTC, routing = self.ffn(self.norm_2(x_BTC), batch)
        return x_BTC + y_BTC, routing


class Loss(nn.Module):
    """The head's product and cross-entropy: a module, so that the drawn graph has a box for it."""

    def __init__(self, kernels: Kernels, softcap: float | None):
        super().__init__()
        self.kernel, self.softcap = kernels.loss, softcap

    def forward(self, x_BTC: Tensor, w_VC: Tensor, targets_BT: Tensor) -> Tensor:
        """The sum of the tokens' losses, in nats."""
        return self.kernel(x_BTC.flatten(0, 1), w_VC, targets_BT.flatten(), self.softcap)


class AttentionContexts:
    """What mixers are told of where their tokens are: tables and masks, each made once for all layers that share it."""

    def __init__(self, visibility: Visibility, backend: AttentionBackend, rope_theta: float):
        self.visibility, self.backend, self.rope_theta = visibility, backend, rope_theta
        start, documents = visibility.n_keys - visibility.n_queries, visibility.documents
        self.position = torch.arange(
            start, visibility.n_keys, device=visibility.device
        )  # (T,), or (B, T) with documents
        if documents is not None:
            self.position = documents.position_BT
        self.rotations: dict[int, Tensor | None] = {0: None}
        self.masks: dict[int | None, Any] = {}

    def of(self, mixer: nn.Module) -> AttentionContext:
        """What this mixer is told."""
        width, window = mixer.rotary_dim, self.visibility._replace(window=mixer.spec.window).effective_window
        if width not in self.rotations:
            self.rotations[width] = rotary_table(self.position, width, self.rope_theta)
        if window not in self.masks:
            self.masks[window] = self.backend.build_mask(self.visibility._replace(window=window))
        return AttentionContext(self.rotations[width], self.masks[window], self.backend)


def kernel_requirements(config: ModelConfig) -> KernelRequirements:
    """What the model asks of its kernels."""
    experts = [block.ffn for block in config.blocks if block.ffn.type == "moe"]
    return KernelRequirements(
        frozenset(MIXERS[type(block.mixer)].attention_spec(block.mixer, config) for block in config.blocks),
        frozenset(
            ExpertsSpec(config.n_embd, ffn.hidden or 4 * config.n_embd, ffn.n_experts, ffn.top_k, ffn.gated)
            for ffn in experts
        ),
        config.isolate_documents,
        frozenset({LossSpec(config.n_embd, config.vocab_size, config.logit_softcap)}),
    )


class GPT(nn.Module):
    """The network. `config.vocab_size` is a number by now; parameters are float32, `dtype` is what it computes in."""

    def __init__(self, config: ModelConfig, kernels: Kernels | None = None, dtype: torch.dtype = torch.float32):
        super().__init__()
        kernels = kernels or Kernels()
        self.config, self.dtype = config, dtype
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd) if config.position == "learned" else None
        self.blocks = nn.ModuleList(Block(block, config, kernels) for block in config.layers())
        self.norm_f = build_norm(config)
        self.head = None if config.tie_head else Linear(config.n_embd, config.vocab_size, bias=False)
        self.cast_head: Tensor | None = None  # `_head_weight`, where `cast_for_inference` keeps it
        self.loss = Loss(kernels, config.logit_softcap)
        self.top_ks = [block.ffn.config.top_k for block in self.blocks if isinstance(block.ffn, MoE)]
        soft_capped_scores = any(block.mixer.spec.softcap for block in self.blocks)
        self.portable_attention = ATTENTION_BACKENDS[
            "reference" if soft_capped_scores else "sdpa"
        ]  # does all this model asks for
        self.attention = kernels.attention or self.portable_attention

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        n_targets: int,
        documents: Documents | None = None,
        key_B: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(training loss, metrics) of one micro-batch; of `documents`, none sees another.

        The loss is this micro-batch's part of the global batch's mean: sums divided by `n_targets`, the
        number of targets (those that are not -1) in the global batch. The metrics are sums, so they add
        over micro-batches and ranks: "loss_sum" (nats, cross-entropy alone) and for every MoE layer i
        "expert_count.i" (E,), "dropped.i", "confidence.i" and "z_loss.i". `key_B`, the samples' keys, is where
        random numbers come from; without it nothing is random, as in an evaluation.
        """
        x_BTC, routings = self._hidden(tokens_BT, Batch(n_targets, key_B), None, documents)
        loss_sum = self.loss(x_BTC, self._head_weight(), targets_BT)
        loss, metrics = loss_sum / n_targets, {"loss_sum": loss_sum.detach()}
        for i, routing in routings.items():
            loss = loss + routing.aux_loss
            metrics |= {
                f"expert_count.{i}": routing.count_E,
                f"dropped.{i}": routing.n_dropped,
                f"confidence.{i}": routing.confidence,
                f"z_loss.{i}": routing.z_loss,
            }
        return loss, metrics

    def logits(
        self,
        tokens_BT: Tensor,
        cache: Cache | None = None,
        documents: Documents | None = None,
        n_last: int | None = None,
    ) -> Tensor:
        """float32 logits (B, T, V), or of the `n_last` tokens only.

        `cache`, from `new_cache`, holds the tokens before these and takes these.
        """
        x_BTC, _ = self._hidden(tokens_BT, None, cache, documents)
        if n_last is not None:
            x_BTC = x_BTC[:, -n_last:]
        return apply_softcap(F.linear(x_BTC, self._head_weight().to(self.dtype)).float(), self.config.logit_softcap)

    @torch.no_grad()
    def routed_experts(self, tokens_BT: Tensor, documents: Documents | None = None) -> dict[int, Tensor]:
        """The experts that each token is sent to, int64 (B, T, K), by the index of the MoE layer."""
        _, routings = self._hidden(tokens_BT, Batch(1), None, documents)
        return {i: routing.topk_ids_NK.view(*tokens_BT.shape, -1) for i, routing in routings.items()}

    def new_cache(self, n_padding_B: Tensor | None = None) -> Cache:
        """An empty cache, for `logits`; samples may begin with tokens that are no text."""
        return Cache(len(self.blocks), n_padding_B)

    def _hidden(
        self, tokens_BT: Tensor, batch: Batch | None, cache: Cache | None, documents: Documents | None
    ) -> tuple[Tensor, dict[int, Routing]]:
        """What the head reads (B, T, C), and the routing of every MoE layer by its index."""
        contexts = self._places(tokens_BT, cache, documents)
        x_BTC, routings = self._embed(tokens_BT, contexts.position), {}
        for i, block in enumerate(self.blocks):
            # With a cache every call has a new length: not through the compiled block, which would start over.
            run = block if cache is None else block._call_impl
            told = None if batch is None else batch.layer(i)
            x_BTC, routing = run(x_BTC, contexts.of(block.mixer), told, None if cache is None else cache.layers[i])
            if routing is not None:
                routings[i] = routing
        return self.norm_f(x_BTC), routings

    def _embed(self, tokens_BT: Tensor, position: Tensor) -> Tensor:
        x_BTC = self.wte(tokens_BT)
        return (x_BTC if self.wpe is None else x_BTC + self.wpe(position)).to(self.dtype)

    def _places(self, tokens_BT: Tensor, cache: Cache | None, documents: Documents | None) -> AttentionContexts:
        """Where these tokens are; the cache counts them. Raises ValueError where they do not fit the context."""
        n_tokens, start = tokens_BT.shape[1], 0
        if cache is not None:
            if documents is not None:
                raise ValueError("documents apart and a cache: a cache is of one text a sample")
            start, cache.n_tokens = cache.n_tokens, cache.n_tokens + n_tokens
            if cache.n_padding_B is not None:
                documents = left_padded(cache.n_padding_B, start, cache.n_tokens)
        max_text_tokens = n_tokens if cache is None else cache.max_text_tokens
        if max_text_tokens > self.config.n_positions:
            raise ValueError(f"{max_text_tokens} tokens do not fit n_positions {self.config.n_positions}")
        visibility = Visibility(n_tokens, start + n_tokens, tokens_BT.device, documents=documents, dtype=self.dtype)
        return AttentionContexts(
            visibility, self.attention if cache is None else self.portable_attention, self.config.rope_theta
        )

    def _head_weight(self) -> Tensor:
        if self.cast_head is not None:
            return self.cast_head
        return (self.wte if self.head is None else self.head).weight

    def cast_for_inference(self) -> GPT:
        """Cast once what every call would cast; the same bits come out, but there is no training from here.

        Routers compute in float32, and so does the sum of the embeddings: these stay as they are.
        """
        self.requires_grad_(False)
        self.cast_head = self._head_weight().detach().to(self.dtype)  # detached: no parameter of its own
        for name, parameter in self.named_parameters():
            if name not in ("wte.weight", "wpe.weight") and ".router." not in name:
                parameter.data = parameter.data.to(self.dtype)
        return self

    def finish_step(self, metrics: dict[str, Tensor], updated: bool = True) -> dict[str, Tensor]:
        """Take the global batch's summed metrics: what a model learns outside its gradients, if the step is `updated`.

        Returns the metrics with those that are known now: for every MoE layer i "bias_range.i".
        """
        alike: dict[MoEConfig, list[int]] = {}
        for i, block in enumerate(self.blocks):
            if isinstance(block.ffn, MoE):
                alike.setdefault(block.ffn.config, []).append(i)
        ranges: dict[int, Tensor] = {}
        for same in alike.values():
            counts = [metrics[f"expert_count.{i}"] for i in same]
            ranges |= zip(same, finish_step([self.blocks[i].ffn for i in same], counts, updated), strict=True)
        return metrics | {f"bias_range.{i}": ranges[i] for i in sorted(ranges)}

    def step_metrics(self, metrics: dict[str, Sequence[float]], n_targets: int) -> dict[str, object]:
        """Summed metrics, fetched to the host as flat lists, in words that a log can print."""
        described: dict[str, object] = {"loss": metrics["loss_sum"][0] / n_targets}
        layers: dict[str, list[Sequence[float]]] = {}  # of every MoE layer, in order
        for name, values in metrics.items():
            if "." in name:
                layers.setdefault(name.partition(".")[0], []).append(values)
        return described | (routing_metrics(layers, self.top_ks) if layers else {})

    @torch.no_grad()
    def init_weights(self, seed: int) -> GPT:
        """Give every parameter and buffer its `initial` value."""
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            tensor.copy_(self.initial_value(name, tensor.shape, seed))
        return self

    def initial_value(self, name: str, shape: torch.Size, seed: int) -> Tensor:
        """GPT-2's initial weights, as Transformers draws them: normal with deviation 0.02, that of the
        projections into the residual stream divided by sqrt(2 n_layer); biases 0, norms 1.

        Every parameter has a generator of its own, keyed by seed and name, so that neither the order of
        construction nor the device matters, nor whether the model here holds all of it.
        """
        if name.endswith(("selection_bias", "load")):
            return torch.full(shape, 0.0 if name.endswith("bias") else 1 / shape[0])
        if _kind(name, len(shape)) == "vector":
            return torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
        into_residual = name.endswith(("mixer.out.weight", "ffn.down.weight", "experts.down", "shared.down.weight"))
        return normal_from_key(f"{seed}/{name}", shape) * (
            0.02 / math.sqrt(2 * self.config.n_layer) if into_residual else 0.02
        )

    def parameter_kinds(self) -> dict[str, ParameterKind]:
        """What every parameter is to an optimizer."""
        return {name: _kind(name, parameter.ndim) for name, parameter in self.named_parameters()}

    def n_parameters(self) -> tuple[int, int]:
        """(all parameters, those that one token uses)."""
        total = sum(p.numel() for p in self.parameters())
        idle = sum(
            sum(p.numel() for p in moe.experts.parameters()) * (1 - moe.config.top_k / moe.config.n_experts)
            for moe in self.modules()
            if isinstance(moe, MoE)
        )
        return total, total - round(idle)

    def flops_per_token(self) -> int:
        """Of forward and backward at full context: 6 a matrix element used, and for attention 6 a channel
        of scores and of results and token seen (arXiv:2204.02311 appendix B: 12 L C T)."""
        matrices, attention = self.config.n_embd * self.config.vocab_size, 0
        for spec in (block.mixer.spec for block in self.blocks):
            n_seen = min(spec.window or self.config.n_positions, self.config.n_positions)
            attention += n_seen * spec.n_head * (spec.head_dim + spec.value_dim)
        for module in self.blocks.modules():
            if isinstance(module, Linear):
                matrices += module.weight.numel()
            elif isinstance(module, MoE):
                share = module.config.top_k / module.config.n_experts
                matrices += round(share * sum(p.numel() for p in module.experts.parameters() if p.ndim == 3))
        return 6 * (matrices + attention)


def _kind(name: str, n_dimensions: int) -> ParameterKind:
    if n_dimensions < 2 or name.endswith("bias"):
        return "vector"
    if ".router." in name:
        return "router"
    return "matrix" if name.startswith("blocks.") else "embedding"
