"""Llama and its successors: rotary positions, RMSNorm, gated layers, no biases; here `llama` itself.

An architecture is data: tables of fields, options that config.json implies, and functions for the fields that say which
layers have a window or experts.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

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
ACTIVATION = Field("hidden_act", "activation", Activation)
MLP = (Field("intermediate_size", "hidden", int), ACTIVATION)

# Of every architecture here; its own `defaults` and `neutral` come on top.
DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
NEUTRAL = {"attention_bias": (None, False), "mlp_bias": (None, False)}
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


def dense(_mlp: MLPConfig, theirs: str, ours: str) -> list[Name]:
    """Return the tensors of a dense feed-forward layer."""
    return weights(f"{theirs}.mlp", f"{ours}.ffn", MATRICES)


def expert_tensors(
    module: str = "mlp",
    matrices: dict[str, str] = MATRICES,
    *,
    bias: str | None = None,
    bias_index: tuple[None, ...] = (),
    always_shared: bool = False,
) -> Tensors:
    """Return the table of a layer of experts: router, experts, selection bias and shared experts.

    `bias` is their name of the selection bias, (1, E) with bias_index=(None,). With `always_shared` a layer without
    shared experts has shared matrices of width 0.
    """

    def tensors(ffn: MoEConfig, theirs: str, ours: str) -> list[Name]:
        theirs, ours = f"{theirs}.{module}", f"{ours}.ffn"
        names = [Name(f"{theirs}.gate.weight", (f"{ours}.router.weight",))]
        names += [
            Name(f"{theirs}.experts.{e}.{a}.weight", (f"{ours}.experts.{b}",), index=(e,))
            for e in range(ffn.n_experts)
            for a, b in matrices.items()
        ]
        if bias is not None:
            names.append(Name(f"{theirs}.{bias}", (f"{ours}.selection_bias",), index=bias_index))
        if ffn.n_shared:
            names += weights(f"{theirs}.shared_experts", f"{ours}.shared", MATRICES)
        elif always_shared:
            empty = {"up": (0, slice(0)), "gate": (0, slice(0)), "down": (0, slice(None), slice(0))}
            names += [
                Name(f"{theirs}.shared_experts.{a}.weight", (f"{ours}.experts.{b}",), index=empty[b])
                for a, b in MATRICES.items()
            ]
        return names

    return tensors


def dense_layers(layers: list[BlockConfig]) -> list[int]:
    """Return the indices of the layers without experts."""
    return [i for i, block in enumerate(layers) if isinstance(block.ffn, MLPConfig)]


class PerLayer(NamedTuple):
    """The fields that say, layer by layer, how wide the window is or whether there are experts."""

    write: Callable[[list[BlockConfig]], dict[str, Any]] = lambda _layers: {}
    read: Callable[[dict[str, Any], int], list] = lambda _hf, n_layer: [None] * n_layer  # (fields, n_layer)


@dataclass(frozen=True, kw_only=True)
class LlamaLike(Architecture):
    """Llama or one of its successors."""

    class_name: str
    defaults: dict[str, Any] = field(default_factory=dict)  # of Transformers' class, for fields that a file leaves out
    rope_theta: float = 10_000.0  # where the file has none
    neutral: dict[str, tuple[Any, ...]] = field(default_factory=dict)  # accepted values of further fields
    check: Callable[[dict[str, Any]], None] = lambda _hf: None  # raises UserError for what `neutral` cannot express
    attention_fields: tuple[Field, ...] = ATTENTION
    implied_attention: dict[str, Any] = field(default_factory=dict)  # options of every layer's attention
    expert_fields: tuple[Field, ...] = ()
    implied_experts: dict[str, Any] = field(default_factory=dict)
    windows: PerLayer = field(default_factory=PerLayer)
    experts: PerLayer = field(default_factory=PerLayer)
    constants: Callable[[ModelConfig], dict[str, Any]] = lambda _config: {}  # further fields that are written
    attention: Tensors = attention
    feed_forward: Tensors = dense
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
            **(write_fields(experts[0], self.expert_fields) if experts else {}),
            **self.windows.write(layers),
            **self.experts.write(layers),
            **self.constants(config),
        }

    def from_hf(self, hf: dict[str, Any]) -> dict[str, Any]:
        hf = DEFAULTS | self.defaults | hf
        self.check(hf)
        check_neutral(hf, NEUTRAL | self.neutral)
        mixer = read_fields(hf, self.attention_fields) | self.implied_attention
        mlp = {"type": "mlp", "gated": True} | read_fields(hf, MLP)
        experts = {"type": "moe", "gated": True} | read_fields(hf, self.expert_fields) | self.implied_experts
        n_layer = read(hf, "num_hidden_layers", int)
        layers = [
            {"mixer": mixer | {"window": window}, "ffn": experts if has_experts else mlp}
            for window, has_experts in zip(self.windows.read(hf, n_layer), self.experts.read(hf, n_layer), strict=True)
        ]
        return {
            **read_fields(hf, MODEL),
            "position": "rope",
            "rope_theta": read_rope_theta(hf, self.rope_theta),
            "norm": "rmsnorm",
            "bias": False,
            "blocks": pattern(layers),
        }

    def names(self, config: ModelConfig) -> list[Name]:
        table = [Name("model.embed_tokens.weight", ("wte.weight",)), Name("model.norm.weight", ("norm_f.weight",))]
        if not config.tie_head:
            table.append(Name("lm_head.weight", ("head.weight",)))
        for i, block in enumerate(config.with_explicit_sizes().layers()):
            theirs, ours = f"model.layers.{i}", f"blocks.{i}"
            table += weights(theirs, ours, {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2"})
            table += self.attention(block.mixer, theirs, ours)
            table += (dense if isinstance(block.ffn, MLPConfig) else self.feed_forward)(block.ffn, theirs, ours)
        return table


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


def _odd_heads(config: ModelConfig) -> str | None:
    # Transformers 5 refuses them, whatever head_dim is.
    return f"n_head {config.n_head} does not divide n_embd {config.n_embd}" if config.n_embd % config.n_head else None


LLAMA = LlamaLike(
    class_name="LlamaForCausalLM",
    neutral={"sliding_window": (None,)},
    constants=lambda _config: {"mlp_bias": False},
    limit=_odd_heads,
)
