"""`llama`: LlamaForCausalLM, and what its successors share with it: rotary positions, RMSNorm, gated layers, no biases.

Those are the other modules here but `gpt2`, with experts or without.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from training.config import AttentionConfig, MixerConfig, MLPConfig, ModelConfig, MoEConfig
from training.errors import UserError
from training.weights.hf.architecture import Architecture
from training.weights.hf.fields import check_neutral, read, read_activation, written
from training.weights.hf.layers import other_kinds, pattern, with_explicit_sizes
from training.weights.hf.names import Name

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}

# LlamaConfig's defaults of what files may leave out.
DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
NEUTRAL = {"attention_bias": (None, False), "mlp_bias": (None, False)}


def common_unsupported(config: ModelConfig, attention: type[MixerConfig] = AttentionConfig) -> Iterator[str]:
    """What none of them has. `attention`: the kind that is in every layer."""
    layers = with_explicit_sizes(config)
    mixers = [block.mixer for block in layers]
    grouped = [mixer for mixer in mixers if isinstance(mixer, AttentionConfig)]
    yield from other_kinds(layers, attention)
    if config.position != "rope":
        yield f"{config.position} positions"
    if not all(mixer.rope for mixer in grouped):
        yield "layers without rope"
    if config.norm != "rmsnorm":
        yield config.norm
    if config.bias:
        yield "biases"
    if not all(block.ffn.gated for block in layers):
        yield "layers that are not gated"
    if config.logit_softcap is not None or any(mixer.softcap is not None for mixer in grouped):
        yield "a soft-cap"
    if len({mixer.model_copy(update={"window": None}) for mixer in mixers}) > 1:
        yield "attention that differs between layers"


def dense_unsupported(config: ModelConfig) -> Iterator[str]:
    """What neither Llama nor Qwen3 without experts has."""
    ffns = {block.ffn for block in with_explicit_sizes(config)}
    if any(isinstance(ffn, MoEConfig) for ffn in ffns):
        yield "experts"
    yield from common_unsupported(config)
    if len(ffns) > 1:
        yield "feed-forward layers that differ"


def common_to_hf(config: ModelConfig) -> dict:
    """The fields that all have, but those of attention."""
    layers = with_explicit_sizes(config)
    ffn = layers[0].ffn
    dense = next((block.ffn for block in layers if isinstance(block.ffn, MLPConfig)), ffn)
    return {
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        "intermediate_size": dense.hidden,
        "hidden_act": written(ffn.activation),
        "rms_norm_eps": config.norm_eps,
        # Transformers 4 reads the first, Transformers 5 the second.
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "tie_word_embeddings": config.tie_head,
        "attention_bias": False,
        "attention_dropout": 0.0,
    }


def heads_to_hf(config: ModelConfig) -> dict:
    """The fields of attention whose heads share keys and values."""
    mixer = with_explicit_sizes(config)[0].mixer
    return {"num_key_value_heads": mixer.n_kv_head, "head_dim": mixer.head_dim}


def common_from_hf(hf: dict, layers: list[dict], rope_theta: float = 10_000.0) -> dict:
    """The options of a model with these blocks. `rope_theta`: the class's, where the file says none."""
    return {
        **{ours: read(hf, theirs, int) for theirs, ours in SIZES.items()},
        "position": "rope",
        "rope_theta": _rope_theta(hf, rope_theta),
        "norm": "rmsnorm",
        "norm_eps": read(hf, "rms_norm_eps", float),
        "bias": False,
        "tie_head": read(hf, "tie_word_embeddings", bool),
        "blocks": pattern(layers),
    }


def read_mixer(hf: dict) -> dict:
    """The options of the attention in every layer; null means the same on both sides."""
    sizes = {"n_kv_head": "num_key_value_heads", "head_dim": "head_dim"}
    return {ours: None if hf.get(theirs) is None else read(hf, theirs, int) for ours, theirs in sizes.items()}


def read_mlp(hf: dict) -> dict:
    """The options of a dense feed-forward layer."""
    hidden, activation = read(hf, "intermediate_size", int), read_activation(hf, "hidden_act")
    return {"type": "mlp", "hidden": hidden, "activation": activation, "gated": True}


def _rope_theta(hf: dict, default: float) -> float:
    """The base of the rotary frequencies. Raises UserError where they are scaled, or said in two ways that differ."""
    found = {} if hf.get("rope_theta") is None else {"rope_theta": read(hf, "rope_theta", float)}
    for name in ("rope_parameters", "rope_scaling"):
        rope = hf.get(name) or {}
        unscaled = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
        plain = isinstance(rope, dict) and rope.keys() <= unscaled.keys() | {"rope_theta"}
        if not plain or any(rope.get(key, value) != value for key, value in unscaled.items()):
            raise UserError(f"{name}: {rope!r} cannot be computed here, only rotary frequencies that are not scaled")
        if rope.get("rope_theta") is not None:
            found[f"{name}.rope_theta"] = read(rope, "rope_theta", float)
    if len(set(found.values())) > 1:
        raise UserError(f"{', '.join(f'{name}: {theta:g}' for name, theta in found.items())}: which is meant?")
    return next(iter(found.values()), default)


def names(config: ModelConfig) -> list[Name]:
    """The tensors of LlamaForCausalLM and Qwen3ForCausalLM."""
    return table(config, attention, dense)


Part = Callable[[Any, str, str], list[Name]]  # of its section, their prefix of a layer and ours


def table(config: ModelConfig, attention: Part, feed_forward: Part) -> list[Name]:
    """The tensors of a model that has these in each of its layers."""
    table = [Name("model.embed_tokens.weight", ("wte.weight",)), Name("model.norm.weight", ("norm_f.weight",))]
    if not config.tie_head:
        table.append(Name("lm_head.weight", ("head.weight",)))
    for i, block in enumerate(with_explicit_sizes(config)):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        table += weights(theirs, ours, {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2"})
        table += attention(block.mixer, f"{theirs}.self_attn", f"{ours}.mixer")
        table += feed_forward(block.ffn, theirs, f"{ours}.ffn")
    return table


def weights(theirs: str, ours: str, same: dict[str, str]) -> list[Name]:
    """Weights that are the same on both sides."""
    return [Name(f"{theirs}.{a}.weight", (f"{ours}.{b}.weight",)) for a, b in same.items()]


def attention(mixer: AttentionConfig, theirs: str, ours: str) -> list[Name]:
    """A layer of attention."""
    norms = {"q_norm": "query_norm", "k_norm": "key_norm"} if mixer.qk_norm else {}
    return weights(theirs, ours, {f"{letter}_proj": word for letter, word in PROJECTIONS.items()} | norms)


def dense(_mlp: MLPConfig, theirs: str, ours: str) -> list[Name]:
    """A dense feed-forward layer."""
    return weights(f"{theirs}.mlp", ours, MATRICES)


PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}
MATRICES = {"up_proj": "up", "gate_proj": "gate", "down_proj": "down"}
HARMLESS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # older files; rope_theta says it


def _unsupported(config: ModelConfig) -> Iterator[str]:
    yield from dense_unsupported(config)
    mixers = [block.mixer for block in config.layers()]
    if mixers[0].qk_norm:
        yield "QK-norm"
    if any(mixer.window is not None for mixer in mixers):
        yield "a window"
    if config.n_embd % config.n_head:
        yield "n_head that does not divide n_embd"  # Transformers 5 refuses it, whatever head_dim is


def _to_hf(config: ModelConfig) -> dict:
    return {"architectures": ["LlamaForCausalLM"], **common_to_hf(config), **heads_to_hf(config), "mlp_bias": False}


def _from_hf(hf: dict) -> dict:
    check_neutral(hf, NEUTRAL | {"sliding_window": (None,)})
    hf = DEFAULTS | hf
    return common_from_hf(hf, [{"mixer": read_mixer(hf), "ffn": read_mlp(hf)}])


LLAMA = Architecture(_unsupported, _to_hf, _from_hf, names, prefix="model.", harmless=HARMLESS)
