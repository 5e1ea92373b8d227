"""`gpt2`: GPT2LMHeadModel. Its layers store transposed matrices (Conv1D), query, key and value as one."""

from __future__ import annotations

import re
from collections.abc import Iterator

from training.config import MLPConfig, ModelConfig
from training.weights.hf.architecture import Architecture
from training.weights.hf.fields import check_neutral, read, read_activation, written
from training.weights.hf.layers import other_kinds, with_explicit_sizes
from training.weights.hf.names import Name

SIZES = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")

# GPT2Config's defaults of what older files leave out. Dropout is left out: there is none here.
DEFAULTS = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
NEUTRAL = {"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (None, False)}


def unsupported(config: ModelConfig) -> Iterator[str]:
    """What GPT-2 does not have."""
    layers = with_explicit_sizes(config)
    mixers, ffns = [block.mixer for block in layers], [block.ffn for block in layers]
    yield from other_kinds(layers)
    if not all(isinstance(ffn, MLPConfig) for ffn in ffns):
        yield "experts"
    if any(ffn.gated for ffn in ffns):
        yield "gated layers"
    if len({(block.mixer, block.ffn) for block in layers}) > 1:
        yield "blocks that differ"
    mixer = mixers[0]
    if mixer.qk_norm:
        yield "QK-norm"
    if mixer.n_kv_head != config.n_head:
        yield "grouped queries"
    if mixer.head_dim * config.n_head != config.n_embd:
        yield "heads of another width"
    if mixer.window is not None:
        yield "a window"
    if mixer.softcap is not None or config.logit_softcap is not None:
        yield "a soft-cap"
    if config.position != "learned":
        yield f"{config.position} positions"
    if config.norm != "layernorm":
        yield config.norm
    if not config.bias:
        yield "no biases"


def to_hf(config: ModelConfig) -> dict:
    """Transformers' `GPT2Config`."""
    ffn = with_explicit_sizes(config)[0].ffn
    return {
        "architectures": ["GPT2LMHeadModel"],
        **{name: getattr(config, name) for name in SIZES},
        "n_inner": ffn.hidden,
        "activation_function": written(ffn.activation),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_head,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    }


def from_hf(hf: dict) -> dict:
    """The options of a `GPT2Config`."""
    check_neutral(hf, NEUTRAL)
    hf = DEFAULTS | hf
    ffn = {
        "type": "mlp",
        "hidden": None if hf["n_inner"] is None else read(hf, "n_inner", int),
        "activation": read_activation(hf, "activation_function"),
    }
    return {
        **{name: read(hf, name, int) for name in SIZES},
        "norm_eps": read(hf, "layer_norm_epsilon", float),
        "tie_head": read(hf, "tie_word_embeddings", bool),
        "blocks": [{"ffn": ffn}],
    }


def names(config: ModelConfig) -> list[Name]:
    """GPT2LMHeadModel's tensors."""
    table = [Name("transformer.wte.weight", ("wte.weight",)), Name("transformer.wpe.weight", ("wpe.weight",))]
    if not config.tie_head:
        table.append(Name("lm_head.weight", ("head.weight",)))
    for kind in ("weight", "bias"):
        table.append(Name(f"transformer.ln_f.{kind}", (f"norm_f.{kind}",)))
        matrix = kind == "weight"
        for i in range(config.n_layer):
            theirs, ours = f"transformer.h.{i}", f"blocks.{i}"
            qkv = tuple(f"{ours}.mixer.{name}.{kind}" for name in ("query", "key", "value"))
            table += [
                Name(f"{theirs}.ln_1.{kind}", (f"{ours}.norm_1.{kind}",)),
                Name(f"{theirs}.ln_2.{kind}", (f"{ours}.norm_2.{kind}",)),
                Name(f"{theirs}.attn.c_attn.{kind}", qkv, matrix),
                Name(f"{theirs}.attn.c_proj.{kind}", (f"{ours}.mixer.out.{kind}",), matrix),
                Name(f"{theirs}.mlp.c_fc.{kind}", (f"{ours}.ffn.up.{kind}",), matrix),
                Name(f"{theirs}.mlp.c_proj.{kind}", (f"{ours}.ffn.down.{kind}",), matrix),
            ]
    return table


GPT2 = Architecture(
    unsupported,
    to_hf,
    from_hf,
    names,
    prefix="transformer.",
    harmless=re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),  # the causal mask, in older files
)
