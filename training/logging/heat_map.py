"""Expert load of all MoE layers as an image, for TensorBoard and Weights & Biases."""

import numpy as np
from PIL import Image, ImageDraw

from training.logging.format import layer_name

CELL = 24  # pixels from one cell to the next, including the line between them
LEFT, TOP = 64, 20  # pixels of the margins with the names of layers and experts
PAPER, INK, NO_EXPERT = (255, 255, 255), (60, 60, 60), (127, 127, 127)
EMPTY, EVEN, DOUBLE = (33, 102, 172), (247, 247, 247), (178, 24, 43)  # no tokens, an even share, twice that or more


def should_draw(row: dict, every: int, last: int) -> bool:
    """Return True if this row's load is due for an image: every `every` steps and at step `last`."""
    return bool(row.get("expert_load")) and (row["step"] % every == 0 or row["step"] == last)


def draw_heat_map(load: dict[int, list[float]]) -> np.ndarray:
    """Draw each expert's share, by layer, as an image: uint8 (TOP + layers x CELL, LEFT + experts x CELL, 3)."""
    n_experts = max(map(len, load.values()))
    image = Image.new("RGB", (LEFT + n_experts * CELL, TOP + len(load) * CELL), PAPER)
    draw = ImageDraw.Draw(image)
    for expert in range(n_experts):
        draw.text((LEFT + (expert + 0.5) * CELL, TOP / 2), str(expert + 1), fill=INK, anchor="mm")
    for row, (layer, load_E) in enumerate(load.items()):
        top = TOP + row * CELL
        draw.text((LEFT - 6, top + CELL / 2), layer_name(layer), fill=INK, anchor="rm")
        for expert in range(n_experts):
            fill = _color(load_E[expert] * len(load_E)) if expert < len(load_E) else NO_EXPERT
            left = LEFT + expert * CELL
            draw.rectangle((left, top, left + CELL - 2, top + CELL - 2), fill=fill)
    return np.asarray(image)


def _color(over_mean: float) -> tuple[int, int, int]:
    return tuple(round(np.interp(over_mean, (0, 1, 2), stops)) for stops in zip(EMPTY, EVEN, DOUBLE, strict=True))
