"""Tensors of two layouts, by a table that is read in both directions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Name(NamedTuple):
    """One tensor of theirs: ours that it is made of, one below the other.

    `transposed`: theirs is (in, out), as GPT-2's Conv1D has it. `only`: an index into ours, such as an expert's.
    `paired`: (rows of a head, how many of its last ones rotary positions turn) where theirs has the two rows that are
    turned together side by side; in ours they are half of those rows apart.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False
    only: tuple[int | slice | None, ...] = ()
    paired: tuple[int, int] | None = None

    def parts(self, ours: dict[str, Tensor]) -> list[Tensor]:
        """The views of our tensors that theirs is made of."""
        return [ours[name][self.only] for name in self.ours]


def as_theirs(names: list[Name], ours: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Their tensors, (name, values): views of ours where nothing is concatenated or rearranged."""
    for name in names:
        parts = name.parts(ours)
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        whole = whole if name.paired is None else _regrouped(whole, *name.paired, (2, -1))
        yield name.theirs, whole.T if name.transposed else whole


def fill(name: Name, ours: dict[str, Tensor], theirs: Tensor) -> None:
    """Write one tensor of theirs into the parts of ours that it is made of."""
    parts = name.parts(ours)
    whole = theirs.T if name.transposed else theirs
    whole = whole if name.paired is None else _regrouped(whole, *name.paired, (-1, 2))
    for part, values in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.copy_(values)


def _regrouped(rows: Tensor, head: int, n_turned: int, groups: tuple[int, int]) -> Tensor:
    """The last `n_turned` of each head's rows, seen as a matrix of `groups`, transposed."""
    kept, turned = rows.unflatten(0, (-1, head)).split([head - n_turned, n_turned], dim=1)
    turned = turned.unflatten(1, groups).transpose(1, 2).flatten(1, 2)
    return torch.cat([kept, turned], dim=1).flatten(0, 1)
