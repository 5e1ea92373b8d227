"""`dots1`, `glm4_moe` and `deepseek_v3`: DeepSeek-V3's experts under three kinds of attention.

Each expert's score is a sigmoid in float32. A bias is added to it to choose experts, not to weight them. A token's
weights are optionally divided by their sum + 1e-20, and multiplied by `routed_scaling_factor`. `training/model/moe.py`
computes the same for one group of experts. The first `first_k_dense_replace` layers are dense.

dots1: grouped queries with QK-norm, a window in some or all layers. glm4_moe: grouped queries, with or without QK-norm.
deepseek_v3: latent attention, whose vectors are normalized with an epsilon of 1e-6 whatever config.json says.
"""

from functools import partial
from typing import Any

from training.config import LatentConfig, ModelConfig
from training.errors import UserError
from training.weights.hf import llama
from training.weights.hf.llama import EXPERT_KINDS, LlamaLike, dense_layers
from training.weights.hf.tables import Field, Name, check_neutral, read, read_fields

LATENT = (
    Field("kv_lora_rank", "kv_rank", int),
    Field("qk_nope_head_dim", "head_dim", int),
    Field("qk_rope_head_dim", "rope_dim", int),
    Field("v_head_dim", "value_dim", int),
    Field("q_lora_rank", "q_rank", int, nullable=True),
)
# Transformers does not read the last three; DeepSeek-V3's own code and other programs do.
ROUTING = {
    "n_group": (1,),
    "topk_group": (1,),
    "scoring_func": (None, "sigmoid"),
    "topk_method": (None, "noaux_tc"),
    "moe_layer_freq": (None, 1),
}


def _written(config: ModelConfig) -> dict[str, Any]:
    if any(getattr(block.ffn, "n_experts", 2) == 1 for block in config.blocks):
        raise UserError("n_experts: 1")  # Transformers sums the two best scores of a group
    constants = {"num_nextn_predict_layers": 0} | {name: values[-1] for name, values in ROUTING.items()}
    return {"first_k_dense_replace": len(dense_layers(config))} | constants


def _check_glm4(hf: dict[str, Any]) -> None:
    rope = hf.get("rope_parameters")
    if all(where.get("partial_rotary_factor") is None for where in (hf, rope if isinstance(rope, dict) else {})):
        raise UserError("partial_rotary_factor is missing, which means 0.5; only 1.0 is supported")


def _check_deepseek(hf: dict[str, Any]) -> None:
    sizes = read_fields(hf, LATENT)
    # Transformers computes these two, or reads them from the file.
    derived = {"head_dim": (sizes["rope_dim"],), "qk_head_dim": (sizes["head_dim"] + sizes["rope_dim"],)}
    same = {"rope_interleave": (True,), "rms_norm_eps": (1e-6,)}
    check_neutral(hf, same | derived | {"num_key_value_heads": (None, hf.get("num_attention_heads"))})


def _latent_attention(mixer: LatentConfig, theirs: str, ours: str) -> list[Name]:
    """Return the tensors of a layer's latent attention; DeepSeek rotates neighboring rows."""
    theirs, ours = f"{theirs}.self_attn", f"{ours}.mixer"
    same = {"kv_a_layernorm": "latent_norm", "kv_b_proj": "key_value", "o_proj": "out"}
    if mixer.q_rank is not None:
        same |= {"q_a_proj": "squeeze.0", "q_a_layernorm": "squeeze.1"}
    query, rotated = "q_proj" if mixer.q_rank is None else "q_b_proj", mixer.rope_dim
    rows = {query: ("query", mixer.head_dim + rotated), "kv_a_proj_with_mqa": ("latent", mixer.kv_rank + rotated)}
    return [
        *llama.weights(theirs, ours, same),
        *(Name(f"{theirs}.{a}.weight", (f"{ours}.{b}.weight",), pairs=(n, rotated)) for a, (b, n) in rows.items()),
    ]


_deepseek_like = partial(
    LlamaLike,
    ffns=EXPERT_KINDS,
    neutral=ROUTING | llama.NO_WINDOW,
    written=_written,
    expert_fields=(
        Field("n_routed_experts", "n_experts", int, alias="num_local_experts"),
        Field("num_experts_per_tok", "top_k", int),
        Field("moe_intermediate_size", "hidden", int),
        Field("n_shared_experts", "n_shared", int),
        Field("norm_topk_prob", "renormalize", bool),
        Field("routed_scaling_factor", "route_scale", float),
    ),
    implied_experts={"scoring": "sigmoid", "balance": "bias"},  # as DeepSeek-V3 was trained
    read_experts=lambda hf, n_layer: [i >= read(hf, "first_k_dense_replace", int) for i in range(n_layer)],
    experts=partial(llama.experts, bias="gate.e_score_correction_bias", always_shared=True),
)

DOTS1 = _deepseek_like(
    class_name="Dots1ForCausalLM",
    defaults={"num_key_value_heads": 32, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
    | {"first_k_dense_replace": 0, "norm_topk_prob": False, "sliding_window": 4096, "max_window_layers": 62},
    neutral=ROUTING,
    implied_attention={"qk_norm": True},
)
GLM4_MOE = _deepseek_like(
    class_name="Glm4MoeForCausalLM",
    defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "use_qk_norm": False, "n_shared_experts": 1}
    | {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "norm_topk_prob": True},
    check=_check_glm4,
    attention_fields=(*llama.ATTENTION, Field("use_qk_norm", "qk_norm", bool)),
    written=lambda config: _written(config) | {"partial_rotary_factor": 1.0},
)
DEEPSEEK_V3 = _deepseek_like(
    class_name="DeepseekV3ForCausalLM",
    mixer=LatentConfig,
    defaults={"num_key_value_heads": 128, "q_lora_rank": 1536, "rope_interleave": True, "n_shared_experts": 1}
    | {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "norm_topk_prob": True},
    check=_check_deepseek,
    attention_fields=LATENT,
    implied_attention={"type": "latent"},
    attention=_latent_attention,
    written=lambda config: _written(config) | {"num_key_value_heads": config.n_head, "rope_interleave": True},
)
