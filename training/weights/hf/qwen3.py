"""`qwen3` and `qwen3_moe`: Llama with QK-norm in every layer and, optionally, a sliding window.

The window means the same as ours: a token sees itself and `sliding_window` - 1 tokens before it. In Qwen3 some layers
may have it and others not. In Qwen3-MoE all layers have it or none; some layers may have experts and others not.
"""

from typing import Any

from training.config import BlockConfig
from training.errors import UserError
from training.weights.hf.llama import ACTIVATION, EXPERT_KINDS, LlamaLike, PerLayer, dense_layers, expert_tensors
from training.weights.hf.tables import Field, read

FULL, SLIDING = "full_attention", "sliding_attention"
QK_NORM = {"qk_norm": True}


def write_windows(layers: list[BlockConfig]) -> dict[str, Any]:
    """Return the fields of one window that some layers have."""
    widths = [block.mixer.window for block in layers]
    sliding = [i for i, width in enumerate(widths) if width is not None]
    return {
        "sliding_window": widths[sliding[0]] if sliding else None,
        "max_window_layers": sliding[0] if sliding else len(widths),
        "layer_types": [FULL if width is None else SLIDING for width in widths],
    }


def read_windows(hf: dict[str, Any], n_layer: int) -> list[int | None]:
    """Return each layer's window. Raises UserError if layer_types is wrong or needs a window that is not there."""
    window = read_width(hf)
    types = hf.get("layer_types")
    if types is None:
        first = n_layer if window is None else read(hf, "max_window_layers", int)
        types = [FULL if i < first else SLIDING for i in range(n_layer)]
    if not isinstance(types, list) or len(types) != n_layer or not all(kind in (FULL, SLIDING) for kind in types):
        raise UserError(f"layer_types: {types!r} is not {FULL} or {SLIDING} for each of {n_layer} layers")
    if SLIDING in types and window is None:
        raise UserError(f"layer_types: {SLIDING} without a sliding_window that is used")
    return [None if kind == FULL else window for kind in types]


def read_width(hf: dict[str, Any]) -> int | None:
    """Return the width of the sliding window; None if there is none."""
    return None if hf["sliding_window"] is None else read(hf, "sliding_window", int)


SOME_WINDOWS = PerLayer(write_windows, read_windows)  # one window in some layers
ONE_WINDOW = PerLayer(  # in all layers or in none
    lambda layers: {"sliding_window": layers[0].mixer.window}, lambda hf, n_layer: [read_width(hf)] * n_layer
)


def _with_switch(windows: PerLayer) -> PerLayer:
    """Add `use_sliding_window` to the fields, which switches the window on or off."""

    def write(layers: list[BlockConfig]) -> dict[str, Any]:
        fields = windows.write(layers)
        return fields | {"use_sliding_window": fields["sliding_window"] is not None}

    def read_if_used(hf: dict[str, Any], n_layer: int) -> list[int | None]:
        return windows.read(hf if read(hf, "use_sliding_window", bool) else hf | {"sliding_window": None}, n_layer)

    return PerLayer(write, read_if_used)


def _write_experts(layers: list[BlockConfig]) -> dict[str, Any]:
    # Transformers 4 reads num_experts alone, Transformers 5 either.
    n_experts = next(block.ffn.n_experts for block in layers if block.ffn.type == "moe")
    return {"num_local_experts": n_experts, "decoder_sparse_step": 1, "mlp_only_layers": dense_layers(layers)}


def _read_experts(hf: dict[str, Any], n_layer: int) -> list[bool]:
    step, dense = read(hf, "decoder_sparse_step", int), read(hf, "mlp_only_layers", list)
    if step < 1:
        raise UserError(f"decoder_sparse_step: {step} is less than 1")
    return [bool(N_EXPERTS.read(hf)) and i not in dense and (i + 1) % step == 0 for i in range(n_layer)]


N_EXPERTS = Field("num_experts", "n_experts", int, alias="num_local_experts")

QWEN3 = LlamaLike(
    class_name="Qwen3ForCausalLM",
    defaults={"num_key_value_heads": 32, "head_dim": 128}
    | {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    implied_attention=QK_NORM,
    windows=_with_switch(SOME_WINDOWS),
)
QWEN3_MOE = LlamaLike(
    class_name="Qwen3MoeForCausalLM",
    ffns=EXPERT_KINDS,
    defaults={"num_key_value_heads": 4, "use_sliding_window": False, "sliding_window": 4096}
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": False},
    neutral={"layer_types": (None,)},
    implied_attention=QK_NORM,
    expert_fields=(
        N_EXPERTS,
        Field("num_experts_per_tok", "top_k", int),
        Field("moe_intermediate_size", "hidden", int),
        Field("norm_topk_prob", "renormalize", bool),
        ACTIVATION,
    ),
    implied_experts={"balance": "switch"},  # as Qwen3 was trained; a selection bias would have no place in an export
    windows=_with_switch(ONE_WINDOW),
    experts=PerLayer(_write_experts, _read_experts),
    feed_forward=expert_tensors(),
)
