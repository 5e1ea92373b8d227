"""`ernie4_5_moe`: softmax experts with a selection bias, with or without shared ones, and Llama's attention.

The weights of the chosen experts are divided by their sum, which is taken for at least `moe_norm_min`: of ours that
is written as the 1e-20 that is added to it here. The layers of experts are in a row, dense ones before and after.
"""

from __future__ import annotations

from collections.abc import Iterator

from training.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig
from training.errors import UserError
from training.weights.hf import experts, llama
from training.weights.hf.architecture import Architecture
from training.weights.hf.fields import check_neutral, read
from training.weights.hf.names import Name

DEFAULTS = llama.DEFAULTS | {
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "use_bias": False,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "moe_norm_min": 1e-12,
}
ROPE_THETA = 5e5  # the class's
NEUTRAL = llama.NEUTRAL | {
    "use_bias": (None, False),
    "sliding_window": (None,),
    "layer_types": (None,),
    "moe_layer_interval": (1,),
}
MOST_NORM_MIN = 1e-12  # the class's; the chosen experts' share of the softmax is more, unless a bias rules the choice


def _unsupported(config: ModelConfig) -> Iterator[str]:
    yield from experts.unsupported(config)
    if config.layers()[0].mixer.qk_norm:
        yield "QK-norm"
    yield from experts.no_window(config)
    yield from experts.weight_unsupported(config)
    if not experts.experts(config)[0].renormalize:
        yield "experts' weights that do not sum to one"
    first, last = _range(config)
    if len(experts.experts(config)) != last - first + 1:
        yield "dense layers between experts"


def _range(config: ModelConfig) -> tuple[int, int]:
    """The first and the last layer of experts."""
    there = sorted(set(range(config.n_layer)) - set(experts.dense_layers(config)))
    return there[0], there[-1]


def _to_hf(config: ModelConfig) -> dict:
    moe = experts.experts(config)[0]
    first, last = _range(config)
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        **llama.common_to_hf(config),
        **llama.heads_to_hf(config),
        "use_bias": False,
        "moe_num_experts": moe.n_experts,
        "moe_k": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "moe_num_shared_experts": moe.n_shared,
        "moe_layer_start_index": first,
        "moe_layer_end_index": last,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-20,
        "num_nextn_predict_layers": 0,
        "pad_token_id": None,  # or the first token's embedding would take no gradient
    }


def _from_hf(hf: dict) -> dict:
    hf = DEFAULTS | hf
    check_neutral(hf, NEUTRAL)
    if (norm_min := read(hf, "moe_norm_min", float)) > MOST_NORM_MIN:
        raise UserError(f"moe_norm_min: {norm_min:g} cannot be computed here, only {MOST_NORM_MIN:g} or less")
    moe = experts.read_experts(
        hf,
        experts.read_one(hf, "moe_num_experts", "num_experts"),
        top_k=experts.read_one(hf, "moe_k", "num_experts_per_tok"),
        hidden=read(hf, "moe_intermediate_size", int),
        n_shared=read(hf, "moe_num_shared_experts", int),
        balance="bias",  # as ERNIE 4.5 was trained
    )
    n_layer = read(hf, "num_hidden_layers", int)
    first, last = (read(hf, f"moe_layer_{name}_index", int) for name in ("start", "end"))
    there = range(first, n_layer if last == -1 else last + 1)
    mixer = llama.read_mixer(hf)
    layers = [{"mixer": mixer, "ffn": moe if i in there else llama.read_mlp(hf)} for i in range(n_layer)]
    return llama.common_from_hf(hf, layers, ROPE_THETA)


def _attention(mixer: AttentionConfig, theirs: str, ours: str) -> list[Name]:
    """A layer of attention, whose heads are turned whole."""
    turned = (f"{theirs}.q_proj.weight", f"{theirs}.k_proj.weight")
    paired = (mixer.head_dim, mixer.head_dim)
    names = llama.attention(mixer, theirs, ours)
    return [name._replace(paired=paired) if name.theirs in turned else name for name in names]


def _feed_forward(ffn: MLPConfig | MoEConfig, theirs: str, ours: str) -> list[Name]:
    """A dense layer, or experts with their bias, a matrix (1, E) there, and the shared ones."""
    if isinstance(ffn, MLPConfig):
        return llama.dense(ffn, theirs, ours)
    bias = Name(f"{theirs}.mlp.moe_statics.e_score_correction_bias", (f"{ours}.selection_bias",), only=(None,))
    return [*experts.feed_forward(ffn, theirs, ours), bias, *(experts.shared(theirs, ours) if ffn.n_shared else [])]


def _names(config: ModelConfig) -> list[Name]:
    return llama.table(config, _attention, _feed_forward)


ERNIE4_5_MOE = Architecture(_unsupported, _to_hf, _from_hf, _names, prefix="model.", harmless=llama.HARMLESS)
