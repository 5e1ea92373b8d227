"""GPT-2, dense or Mixture-of-Experts: an embedding, a pattern of blocks, a head.

Shapes: B batch, T tokens, C channels, V vocabulary, N = B x T tokens.
Use: `loss, metrics = model(batch)` in training and evaluation, `model.logits(tokens_BT, cache)` in generation.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.batch import Batch
from training.config import (
    AttentionConfig,
    BlockConfig,
    DifferentialConfig,
    GatedConfig,
    LatentConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)
from training.kernels.attention.masks import Documents, Visibility, left_padded
from training.kernels.attention.table import ATTENTION_BACKENDS
from training.kernels.interface import AttentionBackend, ExpertsSpec, KernelRequirements, Kernels, LossSpec
from training.kernels.loss import apply_softcap
from training.model.attention import Attention, AttentionContext, AttentionContexts
from training.model.cache import Cache, LayerCache
from training.model.differential import DifferentialAttention
from training.model.gated import GatedAttention
from training.model.latent import LatentAttention
from training.model.layers import (
    EMBEDDING_DROPOUT,
    FFN_DROPOUT,
    MIXER_DROPOUT,
    BigramEmbedding,
    Embedding,
    FeedForwardContext,
    Linear,
    ShortConvolution,
    build_norm,
    dropout,
)
from training.model.mlp import MLP
from training.model.moe import MoE, Routing, finish_step

EMBEDDINGS = ("wte.", "wpe.", "bigram.")  # how the names of the parameters before the blocks begin
MIXERS = {
    AttentionConfig: Attention,
    LatentConfig: LatentAttention,
    DifferentialConfig: DifferentialAttention,
    GatedConfig: GatedAttention,
}
FEED_FORWARDS = {MLPConfig: MLP, MoEConfig: MoE}


class Block(nn.Module):
    """Pre-normalized mixer and feed-forward layer, each added to the residual stream."""

    def __init__(self, block: BlockConfig, model: ModelConfig, kernels: Kernels):
        super().__init__()
        self.norm_1 = build_norm(model)
        self.conv_1, self.conv_2 = (
            None if block.short_conv is None else ShortConvolution(model.n_embd, block.short_conv) for _ in range(2)
        )
        self.mixer = MIXERS[type(block.mixer)](block.mixer, model)
        self.norm_2 = build_norm(model)
        self.ffn = FEED_FORWARDS[type(block.ffn)](block.ffn, model, kernels)
        self.dropout = model.dropout

    def forward(
        self, x_BTC: Tensor, attention: AttentionContext, context: FeedForwardContext, cache: LayerCache | None
    ) -> tuple[Tensor, Routing | None]:
        h_BTC = self.norm_1(x_BTC)
        if self.conv_1 is not None:
            h_BTC = self.conv_1(cached(cache, "conv_1", h_BTC), h_BTC.shape[1], attention.position_BT)
        x_BTC = x_BTC + dropout(self.mixer(h_BTC, attention, cache), self.dropout, context, MIXER_DROPOUT)
        h_BTC = self.norm_2(x_BTC)
        if self.conv_2 is not None:
            h_BTC = self.conv_2(cached(cache, "conv_2", h_BTC), h_BTC.shape[1], attention.position_BT)
        y_BTC, routing = self.ffn(h_BTC, context)
        return x_BTC + dropout(y_BTC, self.dropout, context, FFN_DROPOUT), routing


def cached(cache: LayerCache | None, name: str, new: Tensor) -> Tensor:
    """Return `new` after what the cache holds of earlier tokens, and append it there."""
    return new if cache is None else cache.append(name, new)


class Loss(nn.Module):
    """The head's matmul and cross-entropy; a module, so that hooks and the model graph see it."""

    def __init__(self, kernels: Kernels, softcap: float | None, n_vocab: int):
        super().__init__()
        self.kernel, self.softcap, self.n_vocab = kernels.loss, softcap, n_vocab

    def forward(self, x_BTC: Tensor, w_VC: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the sum of the tokens' losses, in nats."""
        return self.kernel(x_BTC.flatten(0, 1), w_VC, targets_BT.flatten(), self.softcap, self.n_vocab)


def kernel_requirements(config: ModelConfig) -> KernelRequirements:
    """Return the features and sizes that the kernels of this model must support."""
    width = config.n_embd
    moes = [block.ffn for block in config.blocks if block.ffn.type == "moe"]
    return KernelRequirements(
        frozenset(MIXERS[type(block.mixer)].attention_spec(block.mixer, config) for block in config.blocks),
        frozenset(ExpertsSpec(width, moe.hidden or 4 * width, moe.n_experts, moe.top_k, moe.gated) for moe in moes),
        config.isolate_documents,
        frozenset({LossSpec(width, config.vocab_size, config.logit_softcap)}),
    )


class GPT(nn.Module):
    """The network. Parameters are float32; the residual stream has `dtype`. `config.vocab_size` must be set.

    Rows of embedding and head from `n_vocab` on are padding: no logit, no part in the loss, a gradient of 0. None: all
    rows are tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: Kernels | None = None,
        dtype: torch.dtype = torch.float32,
        n_vocab: int | None = None,
    ):
        super().__init__()
        kernels = kernels or Kernels()
        self.config, self.dtype, self.n_vocab = config, dtype, n_vocab or config.vocab_size
        self.wte = Embedding(config.vocab_size, config.n_embd)
        self.wpe = Embedding(config.n_positions, config.n_embd) if config.position == "learned" else None
        self.bigram = None if config.bigram_rows is None else BigramEmbedding(config.bigram_rows, config.n_embd)
        self.blocks = nn.ModuleList(Block(block, config, kernels) for block in config.layers())
        self.norm_f = build_norm(config)
        self.head = None if config.tie_head else Linear(config.n_embd, config.vocab_size, bias=False)
        self.cast_head: Tensor | None = None  # the head's weight in `dtype`, after `cast_for_inference`
        self.loss = Loss(kernels, config.logit_softcap, self.n_vocab)
        has_softcap = any(block.mixer.spec.softcap for block in self.blocks)
        # Runs on every device and supports all of this model's features.
        self.portable_attention = ATTENTION_BACKENDS["reference" if has_softcap else "sdpa"]
        self.attention = kernels.attention or self.portable_attention
        self.measures_residual = False  # if True, `forward` adds "residual_square" (n_layer,) to its metrics

    def forward(self, batch: Batch, attention: AttentionBackend | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (training loss, metrics) of a micro-batch on the model's device.

        The loss is the micro-batch's part of the global mean: its sum over tokens divided by `batch.n_targets`.
        Metrics are sums, to be added over micro-batches and ranks: "loss_sum" (nats, cross-entropy alone) and for every
        MoE layer i "expert_count.i" (E,), "dropped.i", "confidence.i" and "z_loss.i"; if `measures_residual`, also
        "residual_square" (n_layer,), of the residual stream after each block. Dropout, router noise and expert
        capacity apply in training mode, if the batch has keys. `attention` replaces the model's back-end.
        """
        is_training = self.training and batch.key_B is not None
        context = FeedForwardContext(
            batch.n_tokens or batch.n_targets, batch.key_B if is_training else None, is_training
        )
        squares: list[Tensor] = []
        backend = attention or self.attention
        x_BTC, routings = self._hidden(batch.tokens_BT, batch.documents, context, backend, squares=squares)
        loss_sum = self.loss(x_BTC, self._head_weight(), batch.targets_BT)
        loss, metrics = loss_sum / batch.n_targets, {"loss_sum": loss_sum.detach()}
        if squares:
            metrics["residual_square"] = torch.stack(squares)
        for i, routing in routings.items():
            loss = loss + routing.aux_loss
            metrics[f"expert_count.{i}"] = routing.count_E
            metrics[f"dropped.{i}"] = routing.n_dropped
            metrics[f"confidence.{i}"] = routing.confidence
            metrics[f"z_loss.{i}"] = routing.z_loss
        return loss, metrics

    def logits(
        self, tokens_BT: Tensor, cache: Cache | None = None, documents: Documents | None = None, n_last: int = 0
    ) -> Tensor:
        """Return float32 logits (B, T, V), or those of the last `n_last` tokens only; 0: of all.

        `cache`, from `new_cache`, holds the earlier tokens; the new ones are appended. Raises ValueError if the text is
        longer than the context, or if both `cache` and `documents` are set.
        """
        backend = self.attention if cache is None else self.portable_attention
        x_BTC, _ = self._hidden(tokens_BT, documents, FeedForwardContext(), backend, cache)
        if n_last:
            x_BTC = x_BTC[:, -n_last:]
        logits_BTV = F.linear(x_BTC, self._head_weight().to(self.dtype))[..., : self.n_vocab]
        return apply_softcap(logits_BTV.float(), self.config.logit_softcap)

    @torch.no_grad()
    def routed_experts(self, tokens_BT: Tensor, documents: Documents | None = None) -> dict[int, Tensor]:
        """Return the experts of each token, int64 (B, T, K), by the index of the MoE layer."""
        _, routings = self._hidden(tokens_BT, documents, FeedForwardContext(n_tokens=1), self.attention)
        return {i: routing.topk_ids_NK.view(*tokens_BT.shape, -1) for i, routing in routings.items()}

    def new_cache(self, n_padding_B: Tensor | None = None) -> Cache:
        """Return an empty cache for `logits`; sample b may begin with n_padding_B[b] padding tokens."""
        return Cache(len(self.blocks), n_padding_B)

    def _hidden(
        self,
        tokens_BT: Tensor,
        documents: Documents | None,
        context: FeedForwardContext,
        backend: AttentionBackend,
        cache: Cache | None = None,
        squares: list[Tensor] | None = None,
    ) -> tuple[Tensor, dict[int, Routing]]:
        """Return the head's input (B, T, C), and the routing of every MoE layer by its index. Extends the cache.

        If `measures_residual`, extends `squares` by the residual stream's sum of squares after each block.
        """
        n_tokens = n_keys = n_text = tokens_BT.shape[1]
        if cache is not None:
            if documents is not None:
                raise ValueError("isolated documents do not work with a cache: a cache holds one text per sample")
            cache.n_tokens += n_tokens
            n_keys, n_text = cache.n_tokens, cache.n_tokens - cache.min_padding
            if cache.n_padding_B is not None:
                documents = left_padded(cache.n_padding_B, n_keys - n_tokens, n_keys)
        if n_text > self.config.n_positions:
            raise ValueError(f"{n_text} tokens do not fit n_positions {self.config.n_positions}")
        visibility = Visibility(n_tokens, n_keys, tokens_BT.device, documents=documents, dtype=self.dtype)
        attention = AttentionContexts(visibility, backend, self.config.rope_theta)

        x_BTC = self._embed(tokens_BT, attention, cache)
        x_BTC = dropout(x_BTC, self.config.dropout, context, EMBEDDING_DROPOUT)
        routings = {}
        for i, block in enumerate(self.blocks):
            # With a cache every call has a new length, for which a compiled block would recompile.
            # `_call_impl` calls the block without `torch.compile`, but with its hooks, which FSDP2 needs.
            call, layer_cache = (block, None) if cache is None else (block._call_impl, cache.layers[i])
            x_BTC, routing = call(x_BTC, attention.for_mixer(block.mixer), context.for_layer(i), layer_cache)
            if routing is not None:
                routings[i] = routing
            if squares is not None and self.measures_residual:
                norm_BT = torch.linalg.vector_norm(x_BTC.detach(), dim=-1, dtype=torch.float32)
                squares.append(norm_BT.square().sum())
        return self.norm_f(x_BTC), routings

    def _embed(self, tokens_BT: Tensor, attention: AttentionContexts, cache: Cache | None) -> Tensor:
        """Return the sum of the embeddings of tokens, pairs and positions, (B, T, C) in `dtype`."""
        x_BTC = self.wte(tokens_BT)
        if self.bigram is not None:
            tokens_BS1 = cached(cache and cache.layers[0], "tokens", tokens_BT.unsqueeze(-1))
            x_BTC = x_BTC + self.bigram(tokens_BS1.squeeze(-1), tokens_BT.shape[1], attention.position_BT)
        return (x_BTC if self.wpe is None else x_BTC + self.wpe(attention.position)).to(self.dtype)

    def _head_weight(self) -> Tensor:
        return (self.head or self.wte).weight if self.cast_head is None else self.cast_head

    def cast_for_inference(self) -> "GPT":
        """Cast the weights to `dtype` once instead of on every call; return the model, now untrainable.

        Outputs are bit-identical. Routers and embeddings stay float32, because they compute in float32.
        """
        self.requires_grad_(False)
        self.cast_head = self._head_weight().detach().to(self.dtype)  # detached: a plain tensor, not a parameter
        for name, parameter in self.named_parameters():
            if not name.startswith(EMBEDDINGS) and ".router." not in name:
                parameter.data = parameter.data.to(self.dtype)
        return self

    def finish_step(self, metrics: dict[str, Tensor], updated: bool = True) -> dict[str, Tensor]:
        """Balance the experts by the summed metrics of the global batch; return them and "bias_range.i" of layer i."""
        layers_by_config, ranges = defaultdict(list), {}
        for i, block in enumerate(self.blocks):
            if isinstance(block.ffn, MoE):
                layers_by_config[block.ffn.config].append(i)
        for layers in layers_by_config.values():
            counts = [metrics[f"expert_count.{i}"] for i in layers]
            ranges |= zip(layers, finish_step([self.blocks[i].ffn for i in layers], counts, updated), strict=True)
        return metrics | {f"bias_range.{i}": ranges[i] for i in sorted(ranges)}
