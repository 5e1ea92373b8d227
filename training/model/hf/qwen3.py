"""`qwen3` and `qwen3_moe`: Llama with QK-norm in every layer and, if asked for, a sliding window.

The window is ours: a token sees itself and `sliding_window` - 1 before it. Qwen3's layers may differ in having it;
Qwen3-MoE's may not, but may differ in having experts.
"""

from __future__ import annotations

from collections.abc import Iterator

from training.config import MLPConfig, ModelConfig, MoEConfig
from training.errors import UserError
from training.model.hf import llama
from training.model.hf.architecture import Architecture
from training.model.hf.fields import check_neutral, read, read_activation
from training.model.hf.layers import written_out

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


def _differences(config: ModelConfig) -> Iterator[str]:
    yield from llama.dense_differences(config)
    mixers = [block.mixer for block in config.layers()]
    if not mixers[0].qk_norm:
        yield "no QK-norm"
    if len({mixer.window for mixer in mixers} - {None}) > 1:
        yield "windows of several widths"


def _moe_differences(config: ModelConfig) -> Iterator[str]:
    layers = written_out(config)
    experts = [block.ffn for block in layers if isinstance(block.ffn, MoEConfig)]
    if not experts:
        yield "no experts"
    yield from llama.common_differences(config)
    if not layers[0].mixer.qk_norm:
        yield "no QK-norm"
    if len({block.mixer.window for block in layers}) > 1:
        yield "windows that differ between layers"
    for ffn in experts:
        if ffn.balance in ("bias", "both"):
            yield f"a selection bias (balance: {ffn.balance})"
        if ffn.n_shared:
            yield "shared experts"
        if ffn.scoring != "softmax" or ffn.route_scale != 1:
            yield f"experts' weights of another kind ({ffn.scoring}, times {ffn.route_scale:g})"
    if len({(ffn.n_experts, ffn.top_k, ffn.hidden, ffn.renormalize) for ffn in experts}) > 1:
        yield "experts that differ between layers"
    if len({block.ffn.hidden for block in layers if isinstance(block.ffn, MLPConfig)}) > 1:
        yield "dense layers that differ"
    if len({block.ffn.activation for block in layers}) > 1:
        yield "several activations"


def _to_hf(config: ModelConfig) -> dict:
    windows = [block.mixer.window for block in config.layers()]
    there = [i for i, window in enumerate(windows) if window is not None]
    return {
        "architectures": ["Qwen3ForCausalLM"],
        **llama.common_to_hf(config),
        "use_sliding_window": bool(there),
        "sliding_window": windows[there[0]] if there else None,
        "max_window_layers": there[0] if there else len(windows),
        "layer_types": [FULL if window is None else SLIDING for window in windows],
    }


def _moe_to_hf(config: ModelConfig) -> dict:
    layers = written_out(config)
    moe = next(block.ffn for block in layers if isinstance(block.ffn, MoEConfig))
    window = layers[0].mixer.window
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        **llama.common_to_hf(config),
        "use_sliding_window": window is not None,
        "sliding_window": window,
        # Transformers 4 reads the first, Transformers 5 either.
        "num_experts": moe.n_experts,
        "num_local_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.hidden,
        "norm_topk_prob": moe.renormalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, block in enumerate(layers) if isinstance(block.ffn, MLPConfig)],
    }


def _from_hf(hf: dict) -> dict:
    check_neutral(hf, llama.NEUTRAL)
    hf = DEFAULTS | hf
    n_layer, window = read(hf, "num_hidden_layers", int), _window(hf)
    types = hf.get("layer_types")
    if types is None:
        first = n_layer if window is None else read(hf, "max_window_layers", int)
        types = [FULL if i < first else SLIDING for i in range(n_layer)]
    if not isinstance(types, list) or len(types) != n_layer or not all(kind in (FULL, SLIDING) for kind in types):
        raise UserError(f"layer_types: {types!r} is not {FULL} or {SLIDING} for each of {n_layer} layers")
    if SLIDING in types and window is None:
        raise UserError(f"layer_types: {SLIDING} without use_sliding_window and a sliding_window")
    mixer, mlp = llama.read_mixer(hf) | {"qk_norm": True}, llama.read_mlp(hf)
    windows = [None if kind == FULL else window for kind in types]
    return llama.common_from_hf(hf, [{"mixer": mixer | {"window": width}, "ffn": mlp} for width in windows])


def _moe_from_hf(hf: dict) -> dict:
    check_neutral(hf, llama.NEUTRAL | {"layer_types": (None,)})
    hf = MOE_DEFAULTS | hf
    n_experts = {read(hf, name, int) for name in ("num_experts", "num_local_experts") if hf.get(name) is not None}
    if len(n_experts) != 1:
        raise UserError("num_experts: " + ("not num_local_experts: which is meant?" if n_experts else "missing"))
    moe = {
        "type": "moe",
        "n_experts": n_experts.pop(),
        "top_k": read(hf, "num_experts_per_tok", int),
        "hidden": read(hf, "moe_intermediate_size", int),
        "activation": read_activation(hf, "hidden_act"),
        "gated": True,
        "renormalize": read(hf, "norm_topk_prob", bool),
        "balance": "switch",  # as Qwen3 was trained; a selection bias would have no place in an export
    }
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


QWEN3 = Architecture(_differences, _to_hf, _from_hf, llama.names, prefix="model.", harmless=llama.HARMLESS)
QWEN3_MOE = Architecture(
    _moe_differences, _moe_to_hf, _moe_from_hf, llama.names, prefix="model.", harmless=llama.HARMLESS
)
