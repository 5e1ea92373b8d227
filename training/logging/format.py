"""Numbers, durations and texts as people read them."""

import math

MAX_TOKEN_CHARS = 16  # of a token; the rest is cut
VISIBLE = {" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}


def count(n: float) -> str:
    """Return a count in four figures or fewer: 512, 9.80k, 124.4M, 1.20B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            scaled = n / size
            return f"{scaled:.2f}{unit}" if scaled < 10 else f"{scaled:.1f}{unit}"
    return f"{n:.0f}"


def clock(seconds: float) -> str:
    """Return hours, minutes and seconds: 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def duration_text(seconds: float) -> str:
    """Return a duration in the largest unit of which there are two or more: 2.1 minutes."""
    units = ((3600, "hour"), (60, "minute"), (1, "second"))
    size, unit = next((unit for unit in units if seconds >= 2 * unit[0]), units[-1])
    amount = seconds / size
    rounded = f"{amount:.1f}".removesuffix(".0") if amount < 10 else f"{amount:.0f}"
    return f"{rounded} {unit}" if rounded == "1" else f"{rounded} {unit}s"


def bytes_text(n: int) -> str:
    """Return a size in bytes: 512 B, 1.4 MiB, 2.0 GiB."""
    for size, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n} B"


def age_text(seconds: float) -> str:
    """Return how long ago something was: 3 days ago."""
    if seconds < 2 * 86400:
        return f"{duration_text(seconds)} ago"
    return f"{seconds / 86400:.0f} days ago"


def share(ratio: float | None) -> str:
    """Return a ratio in per cent; "unknown" for None."""
    return "unknown" if ratio is None else f"{100 * ratio:.1f} %"


def number(value: float | None, spec: str = ".4f") -> str:
    """Return a measured number; "nan" for NaN and for None, which a row has in place of NaN and Inf."""
    return "nan" if value is None or math.isnan(value) else format(value, spec)


def layer_name(layer: int) -> str:
    """Return the name of the layer of this index; people count layers from 1."""
    return f"layer {layer + 1}"


def token_text(text: str) -> str:
    """Return a token with marks for blanks, codes for other characters that do not print, and "…" if it is cut."""
    marked = [VISIBLE.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text]
    return "".join(marked if len(marked) <= MAX_TOKEN_CHARS else [*marked[: MAX_TOKEN_CHARS - 1], "…"])
