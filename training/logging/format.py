"""How numbers are said to a person."""

from __future__ import annotations

import math


def count(n: float) -> str:
    """Four figures or fewer: 512, 9.80k, 124.4M, 1.20B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            scaled = n / size
            return f"{scaled:.2f}{unit}" if scaled < 10 else f"{scaled:.1f}{unit}"
    return f"{n:.0f}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


def spoken(seconds: float) -> str:
    """A duration as one would say it."""
    for unit, size in (("hour", 3600), ("minute", 60), ("second", 1)):
        amount = seconds / size
        if amount >= 2 or size == 1:
            rounded = f"{amount:.1f}".removesuffix(".0") if amount < 10 else f"{amount:.0f}"
            return f"{rounded} {unit}" if rounded == "1" else f"{rounded} {unit}s"
    raise AssertionError


def share(ratio: float | None) -> str:
    """A ratio in per cent; "unknown" where there is none."""
    return "unknown" if ratio is None else f"{100 * ratio:.1f} %"


def number(value: float | None, spec: str = ".4f") -> str:
    """A measured number, or "nan" where a row has null for what was not finite."""
    return "nan" if value is None or math.isnan(value) else format(value, spec)


def layer_name(layer: int) -> str:
    """What a person calls the layer of that index."""
    return f"layer {layer + 1}"


def printable(text: str) -> str:
    """The text without what a terminal would obey, such as escape sequences, which a model may well write."""
    return "".join(
        c if c == "\n" or c.isprintable() else "    " if c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


VISIBLE = {" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}
LONGEST = 16  # characters of a token that are shown


def visible(text: str) -> str:
    """A token with nothing in it that the eye would miss: a mark for a space, a line's end and a tab, codes for the
    rest of what does not print, and three dots where it is long."""
    marked = [VISIBLE.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text]
    return "".join(marked if len(marked) <= LONGEST else [*marked[: LONGEST - 1], "…"])
