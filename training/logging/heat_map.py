"""The load of every expert of every MoE layer as an image, for TensorBoard and Weights & Biases."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from training.logging.format import layer_name

CELL = 24  # pixels from one cell to the next, the line between them included
LEFT, TOP = 64, 20  # pixels of the margins that name layers and experts
PAPER, INK, NONE = (255, 255, 255), (60, 60, 60), (127, 127, 127)  # NONE: where a layer has fewer experts
STARVES, EVEN, TWICE = (33, 102, 172), (247, 247, 247), (178, 24, 43)


def due(row: dict, every: int, last: int) -> bool:
    """Whether this row's load is drawn: that of every so manieth step and of the last."""
    return bool(row.get("expert_load")) and (row["step"] % every == 0 or row["step"] == last)


def heat_map(load: list[list[float]], moe_layers: list[int]) -> np.ndarray:
    """(TOP + layers x CELL, LEFT + experts x CELL, 3) of uint8, layers downwards and experts to the right, by number.

    Blue starves, white has its share, red has twice that or more.
    """
    n_experts = max(map(len, load))
    image = Image.new("RGB", (LEFT + n_experts * CELL, TOP + len(load) * CELL), PAPER)
    draw = ImageDraw.Draw(image)
    for expert in range(n_experts):
        draw.text((LEFT + (expert + 0.5) * CELL, TOP / 2), str(expert + 1), fill=INK, anchor="mm")
    for row, (layer, shares) in enumerate(zip(moe_layers, load, strict=True)):
        top = TOP + row * CELL
        draw.text((LEFT - 6, top + CELL / 2), layer_name(layer), fill=INK, anchor="rm")
        colours = [colour(share * len(shares)) for share in shares] + [NONE] * (n_experts - len(shares))
        for expert, fill in enumerate(colours):
            left = LEFT + expert * CELL
            draw.rectangle((left, top, left + CELL - 2, top + CELL - 2), fill=fill)
    return np.asarray(image)


def colour(over_mean: float) -> tuple[int, int, int]:
    """Of an expert with so many times its even share."""
    return tuple(round(np.interp(over_mean, (0, 1, 2), stops)) for stops in zip(STARVES, EVEN, TWICE, strict=True))
