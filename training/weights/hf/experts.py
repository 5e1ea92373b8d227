"""What the architectures with experts share: what in ours they cannot express, fields, and tensors."""

from __future__ import annotations

from collections.abc import Iterator

from training.config import AttentionConfig, MixerConfig, MLPConfig, ModelConfig, MoEConfig
from training.errors import UserError
from training.weights.hf import llama
from training.weights.hf.fields import read, read_activation
from training.weights.hf.layers import with_explicit_sizes
from training.weights.hf.names import Name


def experts(config: ModelConfig) -> list[MoEConfig]:
    """The layers of experts, with every size written out."""
    return [block.ffn for block in with_explicit_sizes(config) if isinstance(block.ffn, MoEConfig)]


def dense_layers(config: ModelConfig) -> list[int]:
    """The layers that have none."""
    return [i for i, block in enumerate(config.layers()) if isinstance(block.ffn, MLPConfig)]


def unsupported(config: ModelConfig, attention: type[MixerConfig] = AttentionConfig) -> Iterator[str]:
    """What none of them has. `attention`: the kind that is in every layer."""
    if not experts(config):
        yield "no experts"
    yield from llama.common_unsupported(config, attention)
    ffns = [block.ffn for block in with_explicit_sizes(config)]
    kept = ("n_experts", "top_k", "hidden", "n_shared", "scoring", "renormalize", "route_scale")
    if len({tuple(getattr(ffn, name) for name in kept) for ffn in experts(config)}) > 1:
        yield "experts that differ between layers"
    if len({ffn.hidden for ffn in ffns if isinstance(ffn, MLPConfig)}) > 1:
        yield "dense layers that differ"
    if len({ffn.activation for ffn in ffns}) > 1:
        yield "several activations"


def routing_unsupported(config: ModelConfig) -> Iterator[str]:
    """What Qwen3's and Mixtral's do not have: they choose by a softmax alone, and no expert is shared."""
    for ffn in experts(config):
        if ffn.balance in ("bias", "both"):
            yield f"a selection bias (balance: {ffn.balance})"
        if ffn.n_shared:
            yield "shared experts"
    yield from weight_unsupported(config)


def weight_unsupported(config: ModelConfig) -> Iterator[str]:
    """What there is not where experts are weighted by a softmax, not scaled."""
    for ffn in experts(config):
        if ffn.scoring != "softmax" or ffn.route_scale != 1:
            yield f"experts' weights of another kind ({ffn.scoring}, times {ffn.route_scale:g})"


def window_unsupported(config: ModelConfig) -> Iterator[str]:
    """What there is not where all layers have one window, or none has."""
    if len({block.mixer.window for block in config.layers()}) > 1:
        yield "windows that differ between layers"


def no_window(config: ModelConfig) -> Iterator[str]:
    """What there is not where no layer has a window."""
    if any(block.mixer.window is not None for block in config.layers()):
        yield "a window"


def read_one(hf: dict, *names: str) -> int:
    """A number that has several names. Raises UserError where they do not say the same."""
    found = {read(hf, name, int) for name in names if hf.get(name) is not None}
    if len(found) != 1:
        raise UserError(f"{names[0]}: " + (f"not {names[1]}: which is meant?" if found else "missing"))
    return found.pop()


def read_experts(hf: dict, n_experts: int, **others: object) -> dict:
    """The options of a layer of experts."""
    return {
        "type": "moe",
        "n_experts": n_experts,
        "activation": read_activation(hf, "hidden_act"),
        "gated": True,
        **others,
    }


def tensors(ffn: MoEConfig, theirs: str, ours: str, matrices: dict[str, str] = llama.MATRICES) -> list[Name]:
    """The router's and the experts'."""
    return [
        Name(f"{theirs}.gate.weight", (f"{ours}.router.weight",)),
        *(
            Name(f"{theirs}.experts.{e}.{a}.weight", (f"{ours}.experts.{b}",), only=(e,))
            for e in range(ffn.n_experts)
            for a, b in matrices.items()
        ),
    ]


def feed_forward(ffn: MLPConfig | MoEConfig, theirs: str, ours: str) -> list[Name]:
    """A layer that is dense or has experts, no shared ones and no bias among them."""
    return llama.dense(ffn, theirs, ours) if isinstance(ffn, MLPConfig) else tensors(ffn, f"{theirs}.mlp", ours)


def shared(theirs: str, ours: str) -> list[Name]:
    """The shared experts', one dense layer on both sides."""
    return llama.weights(f"{theirs}.mlp.shared_experts", f"{ours}.shared", llama.MATRICES)
