"""Llama and its successors: rotary positions, RMSNorm, gated layers, no biases; here `llama` itself and `mixtral`.

An architecture is data: tables of fields, options that config.json implies, and functions for the fields that say which
layers have experts.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from training.config import Activation, AttentionConfig, BlockConfig, MLPConfig, ModelConfig, MoEConfig
from training.errors import UserError
from training.weights.hf.architecture import Architecture, pattern
from training.weights.hf.tables import Field, Name, check_neutral, read, read_fields, write_fields

MODEL = (
    Field("vocab_size", "vocab_size", int),
    Field("hidden_size", "n_embd", int),
    Field("num_hidden_layers", "n_layer", int),
    Field("num_attention_heads", "n_head", int),
    Field("max_position_embeddings", "n_positions", int),
    Field("rms_norm_eps", "norm_eps", float),
    Field("tie_word_embeddings", "tie_head", bool),
)
ATTENTION = (
    Field("num_key_value_heads", "n_kv_head", int, nullable=True),
    Field("head_dim", "head_dim", int, nullable=True),
)
WINDOW = Field("sliding_window", "window", int, nullable=True)
ACTIVATION = Field("hidden_act", "activation", Activation)
MLP = (Field("intermediate_size", "hidden", int), ACTIVATION)

# Of every architecture here; its own `defaults` come on top.
DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
FULL, SLIDING = "full_attention", "sliding_attention"
NO_WINDOW = {"sliding_window": (None,), "layer_types": (None,)}
EXPERT_KINDS = (MLPConfig, MoEConfig)

PROJECTIONS = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}
MATRICES = {"up_proj": "up", "gate_proj": "gate", "down_proj": "down"}

Tensors = Callable[[Any, str, str], list[Name]]  # (a layer's config, prefix of their names, prefix of ours)


def weights(theirs: str, ours: str, same: dict[str, str]) -> list[Name]:
    """Return the table of weights that are equal in both layouts; `same` maps their names to ours."""
    return [Name(f"{theirs}.{a}.weight", (f"{ours}.{b}.weight",)) for a, b in same.items()]


def attention(mixer: AttentionConfig, theirs: str, ours: str) -> list[Name]:
    """Return the tensors of a layer's attention."""
    norms = {"q_norm": "query_norm", "k_norm": "key_norm"} if mixer.qk_norm else {}
    return weights(f"{theirs}.self_attn", f"{ours}.mixer", PROJECTIONS | norms)


def experts(
    moe: MoEConfig,
    theirs: str,
    ours: str,
    *,
    module: str = "mlp",
    matrices: dict[str, str] = MATRICES,
    bias: str | None = None,
    bias_index: tuple[None, ...] = (),
    always_shared: bool = False,
) -> list[Name]:
    """Return the tensors of a layer of experts: router, experts, selection bias and shared experts.

    `bias` is their name of the selection bias, (1, E) with bias_index=(None,). With `always_shared` a layer without
    shared experts has shared matrices of width 0.
    """
    theirs, ours = f"{theirs}.{module}", f"{ours}.ffn"
    names = [Name(f"{theirs}.gate.weight", (f"{ours}.router.weight",))]
    names += [
        Name(f"{theirs}.experts.{e}.{a}.weight", (f"{ours}.experts.{b}",), index=(e,))
        for e in range(moe.n_experts)
        for a, b in matrices.items()
    ]
    if bias is not None:
        names.append(Name(f"{theirs}.{bias}", (f"{ours}.selection_bias",), index=bias_index))
    if moe.n_shared:
        names += weights(f"{theirs}.shared_experts", f"{ours}.shared", MATRICES)
    elif always_shared:
        empty = {"up": (0, slice(0)), "gate": (0, slice(0)), "down": (0, slice(None), slice(0))}
        names += [
            Name(f"{theirs}.shared_experts.{a}.weight", (f"{ours}.experts.{b}",), index=empty[b])
            for a, b in MATRICES.items()
        ]
    return names


def dense_layers(config: ModelConfig) -> list[int]:
    """Return the indices of the layers without experts."""
    return [i for i, block in enumerate(config.layers()) if isinstance(block.ffn, MLPConfig)]


@dataclass(frozen=True, kw_only=True)
class LlamaLike(Architecture):
    """Llama or one of its successors."""

    class_name: str
    # Of Transformers' class, for fields that a file leaves out. Its window is in no layer, in all of them if
    # `sliding_window` is here, in some if `max_window_layers` is; `use_sliding_window` switches it on and off.
    defaults: dict[str, Any] = field(default_factory=dict)
    rope_theta: float = 10_000.0  # where the file has none
    neutral: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # accepted values of further fields
    check: Callable[[dict[str, Any]], None] = lambda _hf: None  # raises UserError for what `neutral` cannot express
    attention_fields: tuple[Field, ...] = ATTENTION
    implied_attention: dict[str, Any] = field(default_factory=dict)  # options of every layer's attention
    expert_fields: tuple[Field, ...] = ()
    implied_experts: dict[str, Any] = field(default_factory=dict)
    # (fields, n_layer) -> True for each layer with experts; called only if `expert_fields` is set.
    read_experts: Callable[[dict[str, Any], int], list[bool]] = lambda _hf, n_layer: [True] * n_layer
    written: Callable[[ModelConfig], dict[str, Any]] = lambda _config: {}  # further fields that are written
    attention: Tensors = attention
    experts: Tensors = experts
    prefix: str = "model."
    # In older files; rope_theta says the same.
    harmless: re.Pattern[str] = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

    def to_hf(self, config: ModelConfig) -> dict[str, Any]:
        layers = config.with_explicit_sizes().layers()
        experts = [block.ffn for block in layers if isinstance(block.ffn, MoEConfig)]
        mlps = [block.ffn for block in layers if isinstance(block.ffn, MLPConfig)]
        return {
            "architectures": [self.class_name],
            **write_fields(config, MODEL),
            **write_fields((mlps or experts)[0], MLP),
            # Transformers 4 reads the first, Transformers 5 the second.
            "rope_theta": config.rope_theta,
            "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
            "attention_bias": False,
            "attention_dropout": 0.0,
            **write_fields(layers[0].mixer, self.attention_fields),
            **(write_fields(experts[0], (*self.expert_fields, ACTIVATION)) if experts else {}),
            **self._write_windows(layers),
            **self.written(config),
        }

    def from_hf(self, hf: dict[str, Any]) -> dict[str, Any]:
        hf = DEFAULTS | self.defaults | hf
        self.check(hf)
        check_neutral(hf, self.neutral)
        mixer = read_fields(hf, self.attention_fields) | self.implied_attention
        mlp = {"type": "mlp", "gated": True} | read_fields(hf, MLP)
        moe = mlp | {"type": "moe"} | read_fields(hf, self.expert_fields) | self.implied_experts
        n_layer = read(hf, "num_hidden_layers", int)
        windows = self._read_windows(hf, n_layer)
        has_experts = self.read_experts(hf, n_layer) if self.expert_fields else [False] * n_layer
        layers = [
            {"mixer": mixer | {"window": windows[i]}, "ffn": moe if has_experts[i] else mlp} for i in range(n_layer)
        ]
        return {
            **read_fields(hf, MODEL),
            "position": "rope",
            "rope_theta": read_rope_theta(hf, self.rope_theta),
            "norm": "rmsnorm",
            "bias": False,
            "blocks": pattern(layers),
        }

    def min_tensors(self, config: ModelConfig) -> int:
        return sum(getattr(block.ffn, "n_experts", 1) for block in config.layers())

    def names(self, config: ModelConfig) -> list[Name]:
        table = [Name("model.embed_tokens.weight", ("wte.weight",)), Name("model.norm.weight", ("norm_f.weight",))]
        if not config.tie_head:
            table.append(Name("lm_head.weight", ("head.weight",)))
        for i, block in enumerate(config.with_explicit_sizes().layers()):
            theirs, ours = f"model.layers.{i}", f"blocks.{i}"
            table += weights(theirs, ours, {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2"})
            table += self.attention(block.mixer, theirs, ours)
            if isinstance(block.ffn, MoEConfig):
                table += self.experts(block.ffn, theirs, ours)
            else:
                table += weights(f"{theirs}.mlp", f"{ours}.ffn", MATRICES)
        return table

    def _write_windows(self, layers: list[BlockConfig]) -> dict[str, Any]:
        if "sliding_window" not in self.defaults:
            return {}
        widths = [block.mixer.window for block in layers]
        fields = {"sliding_window": widths[0]}
        if "max_window_layers" in self.defaults:
            first = next((i for i, width in enumerate(widths) if width is not None), len(widths))
            fields = {
                "sliding_window": widths[first] if first < len(widths) else None,
                "max_window_layers": first,
                "layer_types": [FULL if width is None else SLIDING for width in widths],
            }
        if "use_sliding_window" in self.defaults:
            fields["use_sliding_window"] = fields["sliding_window"] is not None
        return fields

    def _read_windows(self, hf: dict[str, Any], n_layer: int) -> list[int | None]:
        """Return each layer's window. Raises UserError if layer_types is wrong or needs a window that is not there."""
        is_used = "use_sliding_window" not in self.defaults or read(hf, "use_sliding_window", bool)
        window = WINDOW.read(hf) if is_used and "sliding_window" in self.defaults else None
        if "max_window_layers" not in self.defaults:
            return [window] * n_layer
        types = hf.get("layer_types")
        if types is None:
            first = n_layer if window is None else read(hf, "max_window_layers", int)
            types = [FULL if i < first else SLIDING for i in range(n_layer)]
        if not isinstance(types, list) or len(types) != n_layer or not all(kind in (FULL, SLIDING) for kind in types):
            raise UserError(f"layer_types: {types!r} is not {FULL} or {SLIDING} for each of {n_layer} layers")
        if SLIDING in types and window is None:
            raise UserError(f"layer_types: {SLIDING} without a sliding_window that is used")
        return [None if kind == FULL else window for kind in types]


def read_rope_theta(hf: dict[str, Any], default: float) -> float:
    """Return the base of the rotary frequencies. Raises UserError if they are scaled, or given twice and differ."""
    thetas = {} if hf.get("rope_theta") is None else {"rope_theta": read(hf, "rope_theta", float)}
    for name in ("rope_parameters", "rope_scaling"):
        rope = hf.get(name) or {}
        unscaled = {"rope_type": "default", "type": "default", "partial_rotary_factor": 1.0}
        plain = isinstance(rope, dict) and rope.keys() <= unscaled.keys() | {"rope_theta"}
        if not plain or any(rope.get(key, value) != value for key, value in unscaled.items()):
            raise UserError(f"{name}: {rope!r} is not supported, only rotary frequencies that are not scaled")
        if rope.get("rope_theta") is not None:
            thetas[f"{name}.rope_theta"] = read(rope, "rope_theta", float)
    if len(set(thetas.values())) > 1:
        raise UserError(f"{' and '.join(f'{name}: {theta:g}' for name, theta in thetas.items())} differ")
    return next(iter(thetas.values()), default)


def _written(config: ModelConfig) -> dict[str, Any]:
    if config.n_embd % config.n_head:  # Transformers 5 refuses this, whatever head_dim is
        raise UserError(f"n_head {config.n_head} does not divide n_embd {config.n_embd}")
    return {"mlp_bias": False}


LLAMA = LlamaLike(class_name="LlamaForCausalLM", neutral={"sliding_window": (None,)}, written=_written)
# Experts in every layer, weighted by a softmax over a token's top-k, and optionally a window.
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
    ),
    implied_experts={"balance": "switch"},  # as Mixtral was trained; a selection bias would have no place in an export
    written=lambda _config: {"router_jitter_noise": 0.0},
    experts=partial(experts, module="block_sparse_moe", matrices={"w3": "up", "w1": "gate", "w2": "down"}),
)
