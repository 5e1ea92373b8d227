"""Tables in text."""

from collections.abc import Sequence


def aligned_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as lines: the first column on the left, the others on the right."""
    first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        "  ".join([f"{name:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(cells, others, strict=True))])
        for name, *cells in rows
    ]
