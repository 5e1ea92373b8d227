"""Causal self-attention: multi-head, grouped-query, multi-query; also the base class of other mixers.

Shapes: B batch, T tokens, S keys (cached ones included), C channels, H query heads, G heads of keys and
values, D head width, E width of a value.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import AttentionConfig, ModelConfig
from training.kernels.attention.masks import Visibility
from training.kernels.interface import AttentionBackend, AttentionSpec
from training.model.cache import LayerCache
from training.model.layers import Linear, RMSNorm, rotary_table, rotate


class AttentionContext(NamedTuple):
    """Positions, mask and kernel of one layer in one forward pass."""

    rotation_2TD: Tensor | None  # rotary table of the mixer's `rotary_dim`; None: no rotary positions
    mask: Any  # which keys each query sees, in the back-end's own form
    backend: AttentionBackend
    position_BT: Tensor | None = None  # of each token in its document; None: no documents, or not isolated

    def attend(self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSE: Tensor, spec: AttentionSpec) -> Tensor:
        """Return softmax(scale x q k) v over the visible keys, (B, H, T, E)."""
        return self.backend.attend(q_BHTD, k_BGSD, v_BGSE, self.mask, scale=spec.scale, softcap=spec.softcap)


class AttentionContexts:
    """Rotary tables and masks of one forward pass, each built once for all layers that need the same one."""

    def __init__(self, visibility: Visibility, backend: AttentionBackend, rope_theta: float):
        self.visibility, self.backend = visibility, backend
        start = visibility.n_keys - visibility.n_queries
        self.position_BT = None if visibility.documents is None else visibility.documents.position_BT
        position = self.position_BT
        if position is None:
            position = torch.arange(start, visibility.n_keys, device=visibility.device)
        self.position = position  # (T,), or (B, T) with documents
        # No reference to `self`: a reference cycle would keep the masks alive after the forward pass.
        self.rotation = functools.cache(lambda width: rotary_table(position, width, rope_theta) if width else None)
        self.mask = functools.cache(lambda window: backend.build_mask(visibility._replace(window=window)))

    def for_mixer(self, mixer: nn.Module) -> AttentionContext:
        """Return the context of a layer, by its `rotary_dim` and its window."""
        window = self.visibility._replace(window=mixer.spec.window).effective_window
        return AttentionContext(self.rotation(mixer.rotary_dim), self.mask(window), self.backend, self.position_BT)


class Attention(nn.Module):
    """Causal attention. A subclass overrides `attend` to change the input of the output projection."""

    def __init__(self, config: AttentionConfig, model: ModelConfig):
        super().__init__()
        self.spec = spec = self.attention_spec(config, model)
        self.rotary_dim = spec.head_dim if config.rope and model.position == "rope" else 0
        sizes = [(model.n_embd, n * spec.head_dim) for n in (spec.n_head, spec.n_kv_head, spec.n_kv_head)]
        sizes.append((spec.n_head * spec.head_dim, model.n_embd))
        self.query, self.key, self.value, self.out = (Linear(*size, bias=model.bias) for size in sizes)
        self.query_norm = RMSNorm(spec.head_dim, model.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(spec.head_dim, model.norm_eps) if config.qk_norm else nn.Identity()

    @staticmethod
    def attention_spec(config: AttentionConfig, model: ModelConfig) -> AttentionSpec:
        """Return the sizes and features that this layer needs from an attention back-end."""
        width = config.head_dim or model.n_embd // model.n_head
        n_kv_head = config.n_kv_head or model.n_head
        return AttentionSpec(model.n_head, n_kv_head, width, width, config.window, config.softcap)

    def forward(self, x_BTC: Tensor, context: AttentionContext, cache: LayerCache | None) -> Tensor:
        """Return y_BTC. `cache` holds the keys and values of earlier tokens; the new ones are appended."""
        projections = (self.query, self.key, self.value)
        if torch.is_grad_enabled():  # one matmul
            weight = torch.cat([p.weight for p in projections]).to(x_BTC.dtype)
            bias = None if self.query.bias is None else torch.cat([p.bias for p in projections]).to(x_BTC.dtype)
            qkv = F.linear(x_BTC, weight, bias).split([p.out_features for p in projections], dim=-1)
        else:  # few tokens: concatenating the weights costs more than three matmuls
            qkv = [projection(x_BTC) for projection in projections]
        widths = (self.spec.head_dim, self.spec.head_dim, self.spec.value_dim)
        q_BHTD, k_BGSD, v_BGSE = (
            x.unflatten(-1, (-1, width)).transpose(1, 2) for x, width in zip(qkv, widths, strict=True)
        )
        q_BHTD, k_BGSD = self.query_norm(q_BHTD), self.key_norm(k_BGSD)
        if context.rotation_2TD is not None:
            q_BHTD, k_BGSD = rotate(q_BHTD, context.rotation_2TD), rotate(k_BGSD, context.rotation_2TD)
        if cache is not None:
            k_BGSD, v_BGSE = cache.append("key", k_BGSD), cache.append("value", v_BGSE)
        y_BHTE = self.attend(x_BTC, q_BHTD, k_BGSD, v_BGSE, context)
        return self.out(y_BHTE.transpose(1, 2).flatten(2))

    def attend(self, x_BTC: Tensor, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:  # noqa: ARG002
        """Return the input of the output projection, (B, H, T, E). `x_BTC`, the layer's input, is for subclasses."""
        return context.attend(q, k, v, self.spec)
