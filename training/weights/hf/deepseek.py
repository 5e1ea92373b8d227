"""`dots1`, `glm4_moe` and `deepseek_v3`: DeepSeek-V3's experts under three kinds of attention.

Each expert has a score of its own, a sigmoid in float32; a bias is added to it for the choice alone; the weights of
those chosen are, if asked for, divided by their sum + 1e-20, and multiplied by `routed_scaling_factor`. That is ours
(`training/model/moe.py`), where there is one group of experts. The first `first_k_dense_replace` layers are dense.

dots1: grouped queries with QK-norm, windows in some or all layers. glm4_moe: grouped queries, with or without QK-norm.
deepseek_v3: latent attention, whose latent vectors are normalised with an epsilon of 1e-6, whatever config.json says.
"""

from __future__ import annotations

from collections.abc import Iterator

from training.config import LatentConfig, MLPConfig, ModelConfig, MoEConfig
from training.errors import UserError
from training.weights.hf import experts, llama, qwen3
from training.weights.hf.architecture import Architecture
from training.weights.hf.fields import check_neutral, read
from training.weights.hf.layers import with_explicit_sizes
from training.weights.hf.names import Name

# The configuration classes' defaults of what files may leave out.
DOTS1_DEFAULTS = llama.DEFAULTS | {
    "num_key_value_heads": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "sliding_window": 4096,
    "max_window_layers": 62,
}
GLM4_DEFAULTS = llama.DEFAULTS | {
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "use_qk_norm": False,
}
DEEPSEEK_DEFAULTS = llama.DEFAULTS | {
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536,
    "rope_interleave": True,
}
# Transformers does not read the last three; the code that came with DeepSeek-V3, and other programs, do.
NEUTRAL = llama.NEUTRAL | {
    "n_group": (1,),
    "topk_group": (1,),
    "scoring_func": (None, "sigmoid"),
    "topk_method": (None, "noaux_tc"),
    "moe_layer_freq": (None, 1),
}
NO_WINDOW = {"sliding_window": (None,), "layer_types": (None,)}
LATENT_EPS = 1e-6
RANKS = {
    "kv_lora_rank": "kv_rank",
    "qk_nope_head_dim": "head_dim",
    "qk_rope_head_dim": "rope_dim",
    "v_head_dim": "value_dim",
}


def _router_unsupported(config: ModelConfig) -> Iterator[str]:
    """What these experts are not."""
    for ffn in experts.experts(config):
        if ffn.scoring != "sigmoid":
            yield f"{ffn.scoring} scores"
        if ffn.n_experts == 1:
            yield "a single expert"  # the two best of a group are looked at
    dense = experts.dense_layers(config)
    if dense != list(range(len(dense))):
        yield "dense layers after experts"


def _dots1_unsupported(config: ModelConfig) -> Iterator[str]:
    yield from experts.unsupported(config)
    yield from _router_unsupported(config)
    if not config.layers()[0].mixer.qk_norm:
        yield "no QK-norm"
    yield from qwen3.window_unsupported(config)


def _glm4_unsupported(config: ModelConfig) -> Iterator[str]:
    yield from experts.unsupported(config)
    yield from _router_unsupported(config)
    yield from experts.no_window(config)


def _deepseek_unsupported(config: ModelConfig) -> Iterator[str]:
    if any(type(block.mixer) is not LatentConfig for block in config.layers()):
        yield "attention that is not latent"
    yield from experts.unsupported(config, LatentConfig)
    yield from _router_unsupported(config)
    yield from experts.no_window(config)
    if config.norm_eps != LATENT_EPS:
        yield f"norm_eps {config.norm_eps:g}, where the latent vectors' is {LATENT_EPS:g}"


def _to_hf(config: ModelConfig) -> dict:
    """The fields that all three have."""
    moe = experts.experts(config)[0]
    return {
        **llama.common_to_hf(config),
        "n_routed_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "n_shared_experts": moe.n_shared,
        "first_k_dense_replace": len(experts.dense_layers(config)),
        "norm_topk_prob": moe.renormalize,
        "routed_scaling_factor": moe.route_scale,
        "num_nextn_predict_layers": 0,
        **{name: values[-1] for name, values in NEUTRAL.items() if name not in llama.NEUTRAL},
    }


def _dots1_to_hf(config: ModelConfig) -> dict:
    windows = qwen3.windows_to_hf(config)
    return {"architectures": ["Dots1ForCausalLM"], **_to_hf(config), **llama.heads_to_hf(config), **windows}


def _glm4_to_hf(config: ModelConfig) -> dict:
    return {
        "architectures": ["Glm4MoeForCausalLM"],
        **_to_hf(config),
        **llama.heads_to_hf(config),
        "use_qk_norm": config.layers()[0].mixer.qk_norm,
        "partial_rotary_factor": 1.0,
    }


def _deepseek_to_hf(config: ModelConfig) -> dict:
    mixer = with_explicit_sizes(config)[0].mixer
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        **_to_hf(config),
        "num_key_value_heads": config.n_head,
        "q_lora_rank": mixer.q_rank,
        **{theirs: getattr(mixer, ours) for theirs, ours in RANKS.items()},
        "rope_interleave": True,
    }


def _layers(hf: dict, mixer: dict, windows: list[int | None]) -> list[dict]:
    """The layers, of which the first are dense."""
    moe = experts.read_experts(
        hf,
        experts.read_one(hf, "n_routed_experts", "num_local_experts"),
        top_k=read(hf, "num_experts_per_tok", int),
        hidden=read(hf, "moe_intermediate_size", int),
        n_shared=read(hf, "n_shared_experts", int),
        scoring="sigmoid",
        renormalize=read(hf, "norm_topk_prob", bool),
        route_scale=read(hf, "routed_scaling_factor", float),
        balance="bias",  # as DeepSeek-V3 was trained
    )
    n_dense = read(hf, "first_k_dense_replace", int)
    ffns = [llama.read_mlp(hf) if i < n_dense else moe for i in range(len(windows))]
    return [{"mixer": mixer | {"window": width}, "ffn": ffn} for width, ffn in zip(windows, ffns, strict=True)]


def _dots1_from_hf(hf: dict) -> dict:
    hf = DOTS1_DEFAULTS | hf
    check_neutral(hf, NEUTRAL)
    window = None if hf["sliding_window"] is None else read(hf, "sliding_window", int)
    mixer = llama.read_mixer(hf) | {"qk_norm": True}
    return llama.common_from_hf(hf, _layers(hf, mixer, qwen3.read_windows(hf, window)))


def _glm4_from_hf(hf: dict) -> dict:
    hf = GLM4_DEFAULTS | hf
    check_neutral(hf, NEUTRAL | NO_WINDOW)
    rope = hf.get("rope_parameters")
    if all(where.get("partial_rotary_factor") is None for where in (hf, rope if isinstance(rope, dict) else {})):
        raise UserError("partial_rotary_factor: missing, which means 0.5, and cannot be computed here, only 1.0")
    mixer = llama.read_mixer(hf) | {"qk_norm": read(hf, "use_qk_norm", bool)}
    return llama.common_from_hf(hf, _layers(hf, mixer, [None] * read(hf, "num_hidden_layers", int)))


def _deepseek_from_hf(hf: dict) -> dict:
    hf = DEEPSEEK_DEFAULTS | hf
    mixer = {ours: read(hf, theirs, int) for theirs, ours in RANKS.items()}
    neutral = {
        "rope_interleave": (True,),
        "rms_norm_eps": (LATENT_EPS,),
        "num_key_value_heads": (None, hf.get("num_attention_heads")),
        # What Transformers works out, and takes from the file where that has it.
        "head_dim": (mixer["rope_dim"],),
        "qk_head_dim": (mixer["head_dim"] + mixer["rope_dim"],),
    }
    check_neutral(hf, NEUTRAL | NO_WINDOW | neutral)
    q_rank = None if hf["q_lora_rank"] is None else read(hf, "q_lora_rank", int)
    mixer |= {"type": "latent", "q_rank": q_rank}
    return llama.common_from_hf(hf, _layers(hf, mixer, [None] * read(hf, "num_hidden_layers", int)))


def _feed_forward(ffn: MLPConfig | MoEConfig, theirs: str, ours: str) -> list[Name]:
    """A dense layer, or experts with their bias and the shared ones: of no width where there are none."""
    if isinstance(ffn, MLPConfig):
        return llama.dense(ffn, theirs, ours)
    rows, columns = (0, slice(0)), (0, slice(None), slice(0))
    none = [
        Name(f"{theirs}.mlp.shared_experts.{a}.weight", (f"{ours}.experts.{b}",), only=columns if b == "down" else rows)
        for a, b in llama.MATRICES.items()
    ]
    return [
        *experts.tensors(ffn, f"{theirs}.mlp", ours),
        Name(f"{theirs}.mlp.gate.e_score_correction_bias", (f"{ours}.selection_bias",)),
        *(experts.shared(theirs, ours) if ffn.n_shared else none),
    ]


def _latent(mixer: LatentConfig, theirs: str, ours: str) -> list[Name]:
    """A layer of latent attention."""
    same = {"kv_a_layernorm": "latent_norm", "kv_b_proj": "key_value", "o_proj": "out"}
    if mixer.q_rank is not None:
        same |= {"q_a_proj": "squeeze.0", "q_a_layernorm": "squeeze.1"}
    query, turned = "q_proj" if mixer.q_rank is None else "q_b_proj", mixer.rope_dim
    rows = {query: ("query", mixer.head_dim + turned), "kv_a_proj_with_mqa": ("latent", mixer.kv_rank + turned)}
    return [
        *llama.weights(theirs, ours, same),
        *(Name(f"{theirs}.{a}.weight", (f"{ours}.{b}.weight",), paired=(n, turned)) for a, (b, n) in rows.items()),
    ]


def _names(config: ModelConfig) -> list[Name]:
    return llama.table(config, llama.attention, _feed_forward)


def _deepseek_names(config: ModelConfig) -> list[Name]:
    return llama.table(config, _latent, _feed_forward)


DOTS1, GLM4_MOE, DEEPSEEK_V3 = (
    Architecture(*functions, prefix="model.", harmless=llama.HARMLESS)
    for functions in (
        (_dots1_unsupported, _dots1_to_hf, _dots1_from_hf, _names),
        (_glm4_unsupported, _glm4_to_hf, _glm4_from_hf, _names),
        (_deepseek_unsupported, _deepseek_to_hf, _deepseek_from_hf, _deepseek_names),
    )
)
