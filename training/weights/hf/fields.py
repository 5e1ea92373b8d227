"""Fields of a config.json, read strictly: what would change the mathematics is never passed over."""

from __future__ import annotations

from typing import Any

from training.config import Activation
from training.errors import UserError

# Ours by the names in Transformers' ACT2FN; the first of each is the one that is written.
ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
MOST = {"n_layer": 10_000, "num_hidden_layers": 10_000}  # of what is counted out; of all else what fits a size
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}

# Fields that any configuration may have, with the values that leave the model as it is.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "per_layer_config": (None, {}),
    "pruned_heads": (None, {}),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "is_causal": (None, True),
    "partial_rotary_factor": (None, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
}


def written(activation: Activation) -> str:
    """Transformers' name of an activation."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)


def read(hf: dict, name: str, kind: type) -> Any:
    """A field that has to be there. Raises UserError where it is missing, of another type or too large."""
    value = hf.get(name)
    if value is None:
        raise UserError(f"{name} is missing")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{name}: {value!r} is not {WORDS[kind]}")
    if kind is int and value > MOST.get(name, 2**31 - 1):
        raise UserError(f"{name}: {value} is too large")
    return value


def read_activation(hf: dict, name: str) -> Activation:
    """Our name of an activation. Raises UserError for one that there is not here."""
    theirs = read(hf, name, str)
    if theirs not in ACTIVATIONS:
        raise UserError(f"{name}: {theirs!r} is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[theirs]


def check_neutral(hf: dict, neutral: dict[str, tuple[Any, ...]]) -> None:
    """Raises UserError for the first field whose value asks for something that there is not here."""
    for name, values in (NEUTRAL | neutral).items():
        if name in hf and hf[name] not in values:
            raise UserError(f"{name}: {hf[name]!r} cannot be computed here, only {values[-1]!r}")
