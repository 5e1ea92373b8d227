"""Translation of tensors between two layouts, by tables that work in both directions."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


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
