"""`ernie4_5_moe`: softmax experts with a selection bias, with or without shared ones, and Llama's attention.

Transformers divides the weights of the chosen experts by their sum, or by `moe_norm_min` if that is larger. This
package adds 1e-20 to the sum instead, and exports that number as `moe_norm_min`. The layers of experts are
consecutive; dense layers may come before and after them.
"""

from functools import partial
from typing import Any

from training.config import AttentionConfig, ModelConfig
from training.errors import UserError
from training.weights.hf import llama
from training.weights.hf.llama import EXPERT_KINDS, LlamaLike, dense_layers
from training.weights.hf.tables import Field, Name, read

# Transformers' default. A token's scores sum to more, unless a large selection bias picks experts with tiny scores.
MAX_NORM_MIN = 1e-12


def _check(hf: dict[str, Any]) -> None:
    if (norm_min := read(hf, "moe_norm_min", float)) > MAX_NORM_MIN:
        raise UserError(f"moe_norm_min: {norm_min:g} is not supported, only {MAX_NORM_MIN:g} or less")


def _written(config: ModelConfig) -> dict[str, Any]:
    moe_layers = sorted(set(range(config.n_layer)) - set(dense_layers(config)))
    return {
        "moe_layer_start_index": moe_layers[0],
        "moe_layer_end_index": moe_layers[-1],
        "use_bias": False,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-20,
        "num_nextn_predict_layers": 0,
        "pad_token_id": None,  # the class's 0 would keep token 0's embedding from training
    }


def _read_experts(hf: dict[str, Any], n_layer: int) -> list[bool]:
    first, last = (read(hf, f"moe_layer_{name}_index", int) for name in ("start", "end"))
    return [first <= i <= (n_layer if last == -1 else last) for i in range(n_layer)]


def _attention(mixer: AttentionConfig, theirs: str, ours: str) -> list[Name]:
    """Return Llama's tensors; ERNIE rotates neighboring rows of queries and keys."""
    pairs = (mixer.head_dim, mixer.head_dim)
    return [
        name._replace(pairs=pairs) if name.theirs.endswith(("q_proj.weight", "k_proj.weight")) else name
        for name in llama.attention(mixer, theirs, ours)
    ]


ERNIE4_5_MOE = LlamaLike(
    class_name="Ernie4_5_MoeForCausalLM",
    ffns=EXPERT_KINDS,
    defaults={"num_key_value_heads": 4, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "use_bias": False}
    | {"moe_num_shared_experts": 2, "moe_norm_min": 1e-12}
    | {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
    rope_theta=5e5,
    neutral=llama.NO_WINDOW | {"use_bias": (None, False), "moe_layer_interval": (1,)},
    check=_check,
    expert_fields=(
        Field("moe_num_experts", "n_experts", int, alias="num_experts"),
        Field("moe_k", "top_k", int, alias="num_experts_per_tok"),
        Field("moe_intermediate_size", "hidden", int),
        Field("moe_num_shared_experts", "n_shared", int),
    ),
    implied_experts={"balance": "bias"},  # as ERNIE 4.5 was trained
    read_experts=_read_experts,
    written=_written,
    attention=_attention,
    experts=partial(llama.experts, bias="moe_statics.e_score_correction_bias", bias_index=(None,)),
)
