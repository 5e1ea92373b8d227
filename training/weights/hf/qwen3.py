"""`qwen3` and `qwen3_moe`: Llama with QK-norm in every layer and, if asked for, a sliding window.

The window is ours: a token sees itself and `sliding_window` - 1 before it. Qwen3's layers may differ in having it;
Qwen3-MoE's may not, but may differ in having experts.
"""

from __future__ import annotations

from collections.abc import Iterator

from training.config import ModelConfig
from training.errors import UserError
from training.weights.hf import experts, llama
from training.weights.hf.architecture import Architecture
from training.weights.hf.fields import check_neutral, read
from training.weights.hf.names import Name

# The configuration classes' defaults of what files may leave out.
DEFAULTS = llama.DEFAULTS | {
    "num_key_value_heads": 32,
    "head_dim": 128,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
MOE_DEFAULTS = llama.DEFAULTS | {
    "num_key_value_heads": 4,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": False,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def _unsupported(config: ModelConfig) -> Iterator[str]:
    yield from llama.dense_unsupported(config)
    if not config.layers()[0].mixer.qk_norm:
        yield "no QK-norm"
    yield from window_unsupported(config)


def window_unsupported(config: ModelConfig) -> Iterator[str]:
    """What there is not where each layer has the one window or none."""
    if len({block.mixer.window for block in config.layers()} - {None}) > 1:
        yield "windows of several widths"


def _moe_unsupported(config: ModelConfig) -> Iterator[str]:
    yield from experts.unsupported(config)
    if not config.layers()[0].mixer.qk_norm:
        yield "no QK-norm"
    yield from experts.window_unsupported(config)
    yield from experts.routing_unsupported(config)


def _to_hf(config: ModelConfig) -> dict:
    windows = windows_to_hf(config)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        **llama.common_to_hf(config),
        **llama.heads_to_hf(config),
        "use_sliding_window": windows["sliding_window"] is not None,
        **windows,
    }


def windows_to_hf(config: ModelConfig) -> dict:
    """Which layers have the window."""
    windows = [block.mixer.window for block in config.layers()]
    there = [i for i, window in enumerate(windows) if window is not None]
    return {
        "sliding_window": windows[there[0]] if there else None,
        "max_window_layers": there[0] if there else len(windows),
        "layer_types": [FULL if window is None else SLIDING for window in windows],
    }


def _moe_to_hf(config: ModelConfig) -> dict:
    moe, window = experts.experts(config)[0], config.layers()[0].mixer.window
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        **llama.common_to_hf(config),
        **llama.heads_to_hf(config),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        # Transformers 4 reads the first, Transformers 5 either.
        "num_experts": moe.n_experts,
        "num_local_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "norm_topk_prob": moe.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": experts.dense_layers(config),
    }


def _from_hf(hf: dict) -> dict:
    check_neutral(hf, llama.NEUTRAL)
    hf = DEFAULTS | hf
    windows = read_windows(hf, _window(hf))
    mixer, mlp = llama.read_mixer(hf) | {"qk_norm": True}, llama.read_mlp(hf)
    return llama.common_from_hf(hf, [{"mixer": mixer | {"window": width}, "ffn": mlp} for width in windows])


def read_windows(hf: dict, window: int | None) -> list[int | None]:
    """Each layer's window, which is this one or none."""
    n_layer, types = read(hf, "num_hidden_layers", int), hf.get("layer_types")
    if types is None:
        first = n_layer if window is None else read(hf, "max_window_layers", int)
        types = [FULL if i < first else SLIDING for i in range(n_layer)]
    if not isinstance(types, list) or len(types) != n_layer or not all(kind in (FULL, SLIDING) for kind in types):
        raise UserError(f"layer_types: {types!r} is not {FULL} or {SLIDING} for each of {n_layer} layers")
    if SLIDING in types and window is None:
        raise UserError(f"layer_types: {SLIDING} without a sliding_window that is used")
    return [None if kind == FULL else window for kind in types]


def _moe_from_hf(hf: dict) -> dict:
    check_neutral(hf, llama.NEUTRAL | {"layer_types": (None,)})
    hf = MOE_DEFAULTS | hf
    moe = experts.read_experts(
        hf,
        experts.read_one(hf, "num_experts", "num_local_experts"),
        top_k=read(hf, "num_experts_per_tok", int),
        hidden=read(hf, "moe_intermediate_size", int),
        renormalize=read(hf, "norm_topk_prob", bool),
        balance="switch",  # as Qwen3 was trained; a selection bias would have no place in an export
    )
    step, dense = read(hf, "decoder_sparse_step", int), read(hf, "mlp_only_layers", list)
    if step < 1:
        raise UserError(f"decoder_sparse_step: {step} is less than 1")
    mixer = llama.read_mixer(hf) | {"qk_norm": True, "window": _window(hf)}
    layers = [
        {"mixer": mixer, "ffn": llama.read_mlp(hf) if i in dense or (i + 1) % step or not moe["n_experts"] else moe}
        for i in range(read(hf, "num_hidden_layers", int))
    ]
    return llama.common_from_hf(hf, layers)


def _window(hf: dict) -> int | None:
    """The width of the sliding window, where it is used."""
    asked = read(hf, "use_sliding_window", bool) and hf["sliding_window"] is not None
    return read(hf, "sliding_window", int) if asked else None


def _moe_names(config: ModelConfig) -> list[Name]:
    return llama.table(config, llama.attention, experts.feed_forward)


QWEN3 = Architecture(_unsupported, _to_hf, _from_hf, llama.names, prefix="model.", harmless=llama.HARMLESS)
QWEN3_MOE = Architecture(
    _moe_unsupported, _moe_to_hf, _moe_from_hf, _moe_names, prefix="model.", harmless=llama.HARMLESS
)
