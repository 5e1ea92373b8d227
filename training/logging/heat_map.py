"""Images: the expert load for TensorBoard and Weights & Biases, figures by layer for the report."""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from training.logging.format import layer_name

CELL = 24  # pixels from one cell to the next, including the line between them
LEFT, TOP = 64, 20  # pixels of the margins with the names of layers and experts
PAPER, INK, NO_EXPERT = (255, 255, 255), (60, 60, 60), (127, 127, 127)
RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis, from low to high
MAX_COLUMNS = 300
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


def draw_layer_map(layers: Sequence[Mapping[int, float]]) -> dict[str, Any]:
    """Draw figures by layer, each {step: value}, as a PNG of a row for each layer and a column for each step.

    At most MAX_COLUMNS steps are drawn. Colors follow the logarithm; a value that is not positive is left out. Returns
    the image as base64, the lowest and the highest value as text, and the first and last step.
    """
    steps = sorted(set().union(*layers))
    steps = steps[(len(steps) - 1) % -(-len(steps) // MAX_COLUMNS) :: -(-len(steps) // MAX_COLUMNS)]
    values = np.array([[layer.get(step, np.nan) for step in steps] for layer in layers])
    if np.nanmax(values) > 0:
        values = np.where(values > 0, values, np.nan)
    low, high = np.nanmin(values), np.nanmax(values)
    scaled = np.log(values) if high > 0 else values
    bottom, top = np.nanmin(scaled), np.nanmax(scaled)
    share = (scaled - bottom) / max(top - bottom, 1e-9)
    stops = np.linspace(0, 1, len(RAMP))
    pixels = np.stack([np.interp(share, stops, channel) for channel in zip(*RAMP, strict=True)], -1)
    alpha = np.where(np.isnan(share), 0, 255)[..., None]  # no value: transparent
    image = Image.fromarray(np.concatenate([np.nan_to_num(pixels), alpha], -1).astype(np.uint8), "RGBA")
    file = BytesIO()
    image.save(file, "PNG")
    return {
        "png": base64.b64encode(file.getvalue()).decode(),
        "low": f"{low:.3g}",
        "high": f"{high:.3g}",
        "first": steps[0],
        "last": steps[-1],
        "n_layers": len(layers),
    }


def _color(over_mean: float) -> tuple[int, int, int]:
    return tuple(round(np.interp(over_mean, (0, 1, 2), stops)) for stops in zip(EMPTY, EVEN, DOUBLE, strict=True))
