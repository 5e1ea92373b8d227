"""`mixtral`: Llama with experts in every layer, weighted by a softmax over a token's top-k, and optionally a window."""

from training.weights.hf.llama import ACTIVATION, EXPERT_KINDS, LlamaLike, PerLayer, expert_tensors
from training.weights.hf.qwen3 import ONE_WINDOW
from training.weights.hf.tables import Field

MIXTRAL = LlamaLike(
    class_name="MixtralForCausalLM",
    ffns=EXPERT_KINDS,
    defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "sliding_window": None},
    rope_theta=1e6,
    neutral={"layer_types": (None,)},
    expert_fields=(
        Field("num_local_experts", "n_experts", int, alias="num_experts"),
        Field("num_experts_per_tok", "top_k", int),
        Field("intermediate_size", "hidden", int),
        ACTIVATION,
    ),
    implied_experts={"balance": "switch"},  # as Mixtral was trained; a selection bias would have no place in an export
    windows=ONE_WINDOW,
    experts=PerLayer(read=lambda _hf, n_layer: [True] * n_layer),
    constants=lambda _config: {"router_jitter_noise": 0.0},
    feed_forward=expert_tensors("block_sparse_moe", {"w3": "up", "w1": "gate", "w2": "down"}),
)
