"""Tables of fields and of tensors, which both writing and reading use.

Reading is strict: a value that would change a logit, and that this package does not compute, is an error.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from training.config import Activation
from training.errors import UserError

# Names in Transformers' ACT2FN, and ours. If several names mean the same of ours, the first one is written.
ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}
MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1

# Accepted values of fields that any configuration may have.
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
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}


class Field(NamedTuple):
    """One field of config.json, and the option of ours with the same meaning."""

    theirs: str
    ours: str
    type: Any  # int, float, bool or Activation
    nullable: bool = False  # null means the same on both sides
    alias: str | None = None  # another name of the field; if a file has both, they must agree

    def read(self, hf: dict[str, Any]) -> Any:
        """Return the value of our option. Raises UserError that names the field."""
        present = [name for name in (self.theirs, self.alias) if name is not None and hf.get(name) is not None]
        if not present and self.nullable:
            return None
        values = {name: read(hf, name, self.type) for name in present or [self.theirs]}
        if len(set(values.values())) > 1:
            raise UserError(f"{' and '.join(f'{name}: {value}' for name, value in values.items())} differ")
        return next(iter(values.values()))

    def write(self, config: BaseModel) -> Any:
        """Return the value of their field."""
        value = getattr(config, self.ours)
        return next(name for name, ours in ACTIVATIONS.items() if ours == value) if self.type is Activation else value


def read_fields(hf: dict[str, Any], fields: Iterable[Field]) -> dict[str, Any]:
    """Return our options. Raises UserError that names the first field that is wrong."""
    return {field.ours: field.read(hf) for field in fields}


def write_fields(config: BaseModel, fields: Iterable[Field]) -> dict[str, Any]:
    """Return their fields."""
    return {field.theirs: field.write(config) for field in fields}


def read(hf: dict[str, Any], name: str, type_: Any) -> Any:
    """Return a field's value. Raises UserError if it is missing, has another type or is too large."""
    value = hf.get(name)
    if value is None:
        raise UserError(f"{name} is missing")
    if type_ is Activation:
        if (theirs := read(hf, name, str)) not in ACTIVATIONS:
            raise UserError(f"{name}: {theirs!r} is none of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[theirs]
    if type_ is float and type(value) is int:
        value = float(value)
    if type(value) is not type_:
        raise UserError(f"{name}: {value!r} is not {TYPE_NAMES[type_]}")
    if type_ is int and value > (MAX_LAYERS if name in ("n_layer", "num_hidden_layers") else MAX_SIZE):
        raise UserError(f"{name}: {value} is too large")
    return value


def check_neutral(hf: dict[str, Any], neutral: dict[str, tuple[Any, ...]]) -> None:
    """Raise UserError for the first field whose value is not one of those accepted."""
    for name, values in (NEUTRAL | neutral).items():
        if name in hf and hf[name] not in values:
            raise UserError(f"{name}: {hf[name]!r} is not supported, only {values[-1]!r}")


def one_line(error: UserError | ValidationError) -> str:
    """Return the error on one line; of pydantic's errors, the first."""
    if isinstance(error, UserError):
        return str(error)
    detail = error.errors()[0]
    return ": ".join(filter(None, [".".join(map(str, detail["loc"])), detail["msg"]]))


class Name(NamedTuple):
    """One of their tensors, and those of ours that are concatenated along the rows to form it.

    `transposed`: theirs is (in, out), like GPT-2's Conv1D. `index`: an index into ours, such as an expert's.
    `pairs`: (rows of a head, rotated rows at its end) if theirs stores the two rows of each rotary pair next to each
    other. Ours stores them half of the rotated rows apart.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    index: tuple[int | slice | None, ...] = ()
    pairs: tuple[int, int] | None = None

    def parts(self, ours: dict[str, Tensor]) -> list[Tensor]:
        """Return views of our tensors."""
        return [ours[name][self.index] for name in self.ours]

    def shape(self, ours: dict[str, Tensor]) -> tuple[int, ...]:
        """Return the shape of theirs, without computing it."""
        first, *others = self.parts(ours)
        shape = (len(first) + sum(map(len, others)), *first.shape[1:])
        return shape[::-1] if self.transposed else shape


def to_theirs(names: list[Name], ours: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (their name, tensor): views of ours unless rows are concatenated or rearranged."""
    for name in names:
        parts = name.parts(ours)
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        joined = joined if name.pairs is None else _regroup(joined, *name.pairs, (2, -1))
        yield name.theirs, joined.T if name.transposed else joined


def copy_to_ours(name: Name, ours: dict[str, Tensor], theirs: Tensor) -> None:
    """Copy one of their tensors into those of ours that form it."""
    parts = name.parts(ours)
    joined = theirs.T if name.transposed else theirs
    joined = joined if name.pairs is None else _regroup(joined, *name.pairs, (-1, 2))
    for part, values in zip(parts, joined.split([len(part) for part in parts]), strict=True):
        part.copy_(values)


def _regroup(rows: Tensor, head: int, n_rotated: int, groups: tuple[int, int]) -> Tensor:
    """Return the rows, with the last `n_rotated` of each head reshaped to `groups` and transposed."""
    fixed, rotated = rows.unflatten(0, (-1, head)).split([head - n_rotated, n_rotated], dim=1)
    rotated = rotated.unflatten(1, groups).transpose(1, 2).flatten(1, 2)
    return torch.cat([fixed, rotated], dim=1).flatten(0, 1)
