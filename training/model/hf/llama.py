"""`llama`: LlamaForCausalLM, and what Qwen3 shares with it: rotary positions, RMSNorm, gated layers, no biases."""

from __future__ import annotations

import re
from collections.abc import Iterator

from training.config import MLPConfig, ModelConfig, MoEConfig
from training.errors import UserError
from training.model.hf.architecture import Architecture
from training.model.hf.fields import check_neutral, read, read_activation, written
from training.model.hf.layers import other_kinds, pattern, written_out
from training.model.hf.names import Name

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


def common_differences(config: ModelConfig) -> Iterator[str]:
    """What neither Llama nor Qwen3 has."""
    layers = written_out(config)
    mixers = [block.mixer for block in layers]
    yield from other_kinds(layers)
    if config.position != "rope":
        yield f"{config.position} positions"
    if not all(mixer.rope for mixer in mixers):
        yield "layers without rope"
    if config.norm != "rmsnorm":
        yield config.norm
    if config.bias:
        yield "biases"
    if not all(block.ffn.gated for block in layers):
        yield "layers that are not gated"
    if config.logit_softcap is not None or any(mixer.softcap is not None for mixer in mixers):
        yield "a soft-cap"
    if len({mixer.model_copy(update={"window": None}) for mixer in mixers}) > 1:
        yield "attention that differs between layers"


def dense_differences(config: ModelConfig) -> Iterator[str]:
    """What neither Llama nor Qwen3 without experts has."""
    ffns = {block.ffn for block in written_out(config)}
    if any(isinstance(ffn, MoEConfig) for ffn in ffns):
        yield "experts"
    yield from common_differences(config)
    if len(ffns) > 1:
        yield "feed-forward layers that differ"


def common_to_hf(config: ModelConfig) -> dict:
    """The fields that all three have."""
    layers = written_out(config)
    mixer, ffn = layers[0].mixer, layers[0].ffn
    dense = next((block.ffn for block in layers if isinstance(block.ffn, MLPConfig)), ffn)
    return {
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
        "num_key_value_heads": mixer.n_kv_head,
        "head_dim": mixer.head_dim,
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


def common_from_hf(hf: dict, layers: list[dict]) -> dict:
    """The options of a model with these blocks."""
    return {
        **{ours: read(hf, theirs, int) for theirs, ours in SIZES.items()},
        "position": "rope",
        "rope_theta": _rope_theta(hf),
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


def _rope_theta(hf: dict) -> float:
    """The base of the rotary frequencies. Raises UserError where they are scaled, or said in two ways that differ."""
    found = {} if hf.get("rope_theta") is None else {"rope_theta": read(hf, "rope_theta", float)}
    for name in ("rope_parameters", "rope_scaling"):
        rope = hf.get(name) or {}
        plain = isinstance(rope, dict) and rope.keys() <= {"rope_theta", "rope_type", "type"}
        if not plain or any(rope.get(key, "default") != "default" for key in ("rope_type", "type")):
            raise UserError(f"{name}: {rope!r} cannot be computed here, only rotary frequencies that are not scaled")
        if rope.get("rope_theta") is not None:
            found[f"{name}.rope_theta"] = read(rope, "rope_theta", float)
    if len(set(found.values())) > 1:
        raise UserError(f"{', '.join(f'{name}: {theta:g}' for name, theta in found.items())}: which is meant?")
    return next(iter(found.values()), 10_000.0)


def names(config: ModelConfig) -> list[Name]:
    """The tensors of LlamaForCausalLM, Qwen3ForCausalLM and Qwen3MoeForCausalLM."""
    table = [Name("model.embed_tokens.weight", ("wte.weight",)), Name("model.norm.weight", ("norm_f.weight",))]
    if not config.tie_head:
        table.append(Name("lm_head.weight", ("head.weight",)))
    for i, block in enumerate(config.layers()):
        theirs, ours = f"model.layers.{i}", f"blocks.{i}"
        same = {
            "input_layernorm": "norm_1",
            "post_attention_layernorm": "norm_2",
            **{f"self_attn.{letter}_proj": f"mixer.{word}" for letter, word in PROJECTIONS.items()},
        }
        if block.mixer.qk_norm:
            same |= {"self_attn.q_norm": "mixer.query_norm", "self_attn.k_norm": "mixer.key_norm"}
        if isinstance(block.ffn, MLPConfig):
            same |= {f"mlp.{name}_proj": f"ffn.{name}" for name in ("up", "gate", "down")}
        else:
            same |= {"mlp.gate": "ffn.router"}
            table += [
                Name(f"{theirs}.mlp.experts.{e}.{name}_proj.weight", (f"{ours}.ffn.experts.{name}",), expert=e)
                for e in range(block.ffn.n_experts)
                for name in ("up", "gate", "down")
            ]
        table += [Name(f"{theirs}.{a}.weight", (f"{ours}.{b}.weight",)) for a, b in same.items()]
    return table


PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}
HARMLESS = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # older files; rope_theta says it


def _differences(config: ModelConfig) -> Iterator[str]:
    yield from dense_differences(config)
    mixers = [block.mixer for block in config.layers()]
    if mixers[0].qk_norm:
        yield "QK-norm"
    if any(mixer.window is not None for mixer in mixers):
        yield "a window"
    if config.n_embd % config.n_head:
        yield "n_head that does not divide n_embd"  # Transformers 5 refuses it, whatever head_dim is


def _to_hf(config: ModelConfig) -> dict:
    return {"architectures": ["LlamaForCausalLM"], **common_to_hf(config), "mlp_bias": False}


def _from_hf(hf: dict) -> dict:
    check_neutral(hf, NEUTRAL | {"sliding_window": (None,)})
    hf = DEFAULTS | hf
    return common_from_hf(hf, [{"mixer": read_mixer(hf), "ffn": read_mlp(hf)}])


LLAMA = Architecture(_differences, _to_hf, _from_hf, names, prefix="model.", harmless=HARMLESS)
