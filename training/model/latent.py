"""Multi-head latent attention (MLA, arXiv:2405.04434 section 2.1).

Shapes: B batch, T tokens, S keys, C channels, H heads, R kv_rank, N unrotated head width, P rotated head
width, D = N + P, E value width.
"""

import math

import torch
from torch import Tensor, nn

from training.config import LatentConfig, ModelConfig
from training.kernels.interface import AttentionSpec
from training.model.attention import AttentionContext
from training.model.cache import LayerCache
from training.model.layers import Linear, RMSNorm, rotate


class LatentAttention(nn.Module):
    """Attention whose keys and values are projections of one vector per token. The cache: it and one rotated key."""

    def __init__(self, config: LatentConfig, model: ModelConfig):
        super().__init__()
        self.spec = spec = self.attention_spec(config, model)
        self.rope_dim = config.rope_dim
        self.rotary_dim = config.rope_dim if model.position == "rope" else 0
        self.squeeze = nn.Sequential()  # empty: the identity
        if config.q_rank is not None:
            self.squeeze.append(Linear(model.n_embd, config.q_rank, bias=False))
            self.squeeze.append(RMSNorm(config.q_rank, model.norm_eps))
        self.query = Linear(config.q_rank or model.n_embd, spec.n_head * spec.head_dim, bias=False)
        self.latent = Linear(model.n_embd, config.kv_rank + config.rope_dim, bias=False)
        self.latent_norm = RMSNorm(config.kv_rank, model.norm_eps)
        key_width = spec.head_dim - config.rope_dim
        self.key_value = Linear(config.kv_rank, spec.n_head * (key_width + spec.value_dim), bias=False)
        self.out = Linear(spec.n_head * spec.value_dim, model.n_embd, bias=model.bias)

    @staticmethod
    def attention_spec(config: LatentConfig, model: ModelConfig) -> AttentionSpec:
        """Return the sizes and features that this layer needs from an attention back-end."""
        width = config.head_dim or model.n_embd // model.n_head
        key_dim, value_dim = width + config.rope_dim, config.value_dim or width
        return AttentionSpec(model.n_head, model.n_head, key_dim, value_dim, config.window)

    def forward(self, x_BTC: Tensor, context: AttentionContext, cache: LayerCache | None) -> Tensor:
        """Return y_BTC. `cache` holds latent vectors and rotated keys of earlier tokens; new ones are appended."""
        q_BHTD = self.query(self.squeeze(x_BTC)).unflatten(-1, (self.spec.n_head, -1)).transpose(1, 2)
        q_BHTN, q_BHTP = q_BHTD.tensor_split([-self.rope_dim], dim=-1)
        latent_BTR, k_BTP = self.latent(x_BTC).tensor_split([-self.rope_dim], dim=-1)
        latent_BSR, k_B1SP = self.latent_norm(latent_BTR), k_BTP[:, None]
        if context.rotation_2TD is not None:
            q_BHTP, k_B1SP = rotate(q_BHTP, context.rotation_2TD), rotate(k_B1SP, context.rotation_2TD)
        if cache is not None:
            latent_BSR, k_B1SP = cache.append("latent", latent_BSR), cache.append("key", k_B1SP)
        if latent_BSR.shape[1] == x_BTC.shape[1]:  # expand the latent vectors to the keys and values of every head
            kv = self.key_value(latent_BSR).unflatten(-1, (self.spec.n_head, -1)).transpose(1, 2)
            k_BHSN, v_BHSE = kv.tensor_split([q_BHTN.shape[-1]], dim=-1)
            k_BHSD = torch.cat([k_BHSN, k_B1SP.expand(-1, self.spec.n_head, -1, -1)], dim=-1)
            y_BHTE = context.attend(torch.cat([q_BHTN, q_BHTP], dim=-1), k_BHSD, v_BHSE, self.spec)
        else:  # the same by attending in the latent space, which is cheaper for the few queries of generation
            w_HFR = self.key_value.weight.to(latent_BSR.dtype).unflatten(0, (self.spec.n_head, -1))
            w_HNR, w_HER = w_HFR.tensor_split([q_BHTN.shape[-1]], dim=1)
            q = torch.cat([torch.einsum("bhtn,hnr->bhtr", q_BHTN, w_HNR), q_BHTP], dim=-1)
            k = torch.cat([latent_BSR[:, None], k_B1SP], dim=-1)
            spec = self.spec._replace(scale=1 / math.sqrt(self.spec.head_dim))
            y_BHTR = context.attend(q, k, latent_BSR[:, None], spec)
            y_BHTE = torch.einsum("bhtr,her->bhte", y_BHTR, w_HER)
        return self.out(y_BHTE.transpose(1, 2).flatten(2))
