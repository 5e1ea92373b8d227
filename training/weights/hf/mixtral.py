"""`mixtral`: Llama with experts in every layer, a softmax over those that were chosen and, if asked for, a window."""

from __future__ import annotations

from collections.abc import Iterator

from training.config import ModelConfig, MoEConfig
from training.weights.hf import experts, llama
from training.weights.hf.architecture import Architecture
from training.weights.hf.fields import check_neutral, read
from training.weights.hf.names import Name

DEFAULTS = llama.DEFAULTS | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "sliding_window": None}
ROPE_THETA = 1e6  # the class's
MATRICES = {"w3": "up", "w1": "gate", "w2": "down"}


def _unsupported(config: ModelConfig) -> Iterator[str]:
    yield from experts.unsupported(config)
    if experts.dense_layers(config):
        yield "dense layers"
    if config.layers()[0].mixer.qk_norm:
        yield "QK-norm"
    yield from experts.window_unsupported(config)
    yield from experts.routing_unsupported(config)
    if not experts.experts(config)[0].renormalize:
        yield "experts' weights that do not sum to one"


def _to_hf(config: ModelConfig) -> dict:
    moe = experts.experts(config)[0]
    return {
        "architectures": ["MixtralForCausalLM"],
        **llama.common_to_hf(config),  # intermediate_size among it: an expert's
        **llama.heads_to_hf(config),
        "sliding_window": config.layers()[0].mixer.window,
        "num_local_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "router_jitter_noise": 0.0,
    }


def _from_hf(hf: dict) -> dict:
    hf = DEFAULTS | hf
    check_neutral(hf, llama.NEUTRAL | {"layer_types": (None,)})
    moe = experts.read_experts(
        hf,
        experts.read_one(hf, "num_local_experts", "num_experts"),
        top_k=read(hf, "num_experts_per_tok", int),
        hidden=read(hf, "intermediate_size", int),
        balance="switch",  # as Mixtral was trained; a selection bias would have no place in an export
    )
    window = None if hf["sliding_window"] is None else read(hf, "sliding_window", int)
    layers = [{"mixer": llama.read_mixer(hf) | {"window": window}, "ffn": moe}]
    return llama.common_from_hf(hf, layers, ROPE_THETA)


def _feed_forward(ffn: MoEConfig, theirs: str, ours: str) -> list[Name]:
    return experts.tensors(ffn, f"{theirs}.block_sparse_moe", ours, MATRICES)


def _names(config: ModelConfig) -> list[Name]:
    return llama.table(config, llama.attention, _feed_forward)


MIXTRAL = Architecture(_unsupported, _to_hf, _from_hf, _names, prefix="model.", harmless=llama.HARMLESS)
