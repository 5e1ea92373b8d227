"""`qwen3` and `qwen3_moe`: Llama with QK-norm in every layer and, optionally, a sliding window.

The window means the same as ours: a token sees itself and `sliding_window` - 1 tokens before it. In Qwen3 some layers
may have it and others not. In Qwen3-MoE all layers have it or none; some layers may have experts and others not.
"""

from typing import Any

from training.config import ModelConfig
from training.errors import UserError
from training.weights.hf.llama import EXPERT_KINDS, LlamaLike, dense_layers
from training.weights.hf.tables import Field, read

N_EXPERTS = Field("num_experts", "n_experts", int, alias="num_local_experts")


def _written(config: ModelConfig) -> dict[str, Any]:
    # Transformers 4 reads num_experts alone, Transformers 5 either.
    n_experts = next(block.ffn.n_experts for block in config.blocks if block.ffn.type == "moe")
    return {"num_local_experts": n_experts, "decoder_sparse_step": 1, "mlp_only_layers": dense_layers(config)}


def _read_experts(hf: dict[str, Any], n_layer: int) -> list[bool]:
    step, dense = read(hf, "decoder_sparse_step", int), read(hf, "mlp_only_layers", list)
    if step < 1:
        raise UserError(f"decoder_sparse_step: {step} is less than 1")
    return [bool(N_EXPERTS.read(hf)) and i not in dense and (i + 1) % step == 0 for i in range(n_layer)]


QWEN3 = LlamaLike(
    class_name="Qwen3ForCausalLM",
    defaults={"num_key_value_heads": 32, "head_dim": 128}
    | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    implied_attention={"qk_norm": True},
)
QWEN3_MOE = LlamaLike(
    class_name="Qwen3MoeForCausalLM",
    ffns=EXPERT_KINDS,
    defaults={"num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": 4096}
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False},
    neutral={"layer_types": (None,)},
    implied_attention={"qk_norm": True},
    expert_fields=(
        N_EXPERTS,
        Field("num_experts_per_tok", "top_k", int),
        Field("moe_intermediate_size", "hidden", int),
        Field("norm_topk_prob", "renormalize", bool),
    ),
    implied_experts={"balance": "switch"},  # as Qwen3 was trained; a selection bias would have no place in an export
    written=_written,
    read_experts=_read_experts,
)
