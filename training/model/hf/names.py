"""Tensors of two layouts, by a table that is read in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Name(NamedTuple):
    """One tensor of theirs: ours that it is made of, one below the other.

    `transposed`: theirs is (in, out), as GPT-2's Conv1D has it. `expert`: only this entry of ours (E, ...).
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    expert: int | None = None

    def parts(self, ours: dict[str, Tensor]) -> list[Tensor]:
        """The views of our tensors that theirs is made of."""
        return [ours[name] if self.expert is None else ours[name][self.expert] for name in self.ours]


def as_theirs(names: list[Name], ours: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Their tensors, (name, values): views of ours where nothing is concatenated."""
    for name in names:
        parts = name.parts(ours)
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        yield name.theirs, whole.T if name.transposed else whole


def fill(name: Name, ours: dict[str, Tensor], theirs: Tensor) -> None:
    """Write one tensor of theirs into the parts of ours that it is made of."""
    parts = name.parts(ours)
    whole = theirs.T if name.transposed else theirs
    for part, values in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.copy_(values)
