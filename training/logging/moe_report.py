"""What the report says of a Mixture of Experts: who does the work, how routers choose, what each expert likes."""

from __future__ import annotations

from typing import Any

from training.logging.charts import Curve, chart, noisy, points, smoothed
from training.logging.format import layer_name, number, share, visible

RECENT_STEPS = 50  # that expert load "at the end" is a mean of
LAYER_POINTS = 400  # of a layer's curve, and all the first ones, which a logarithmic axis shows


def routing(rows: list[dict], moe_layers: list[int] | None) -> dict[str, Any] | None:
    """The section's numbers, heat map and charts; None for a dense run.

    `moe_layers`, counted from 0; None: unknown, and MoE layers are counted among themselves.
    """
    map_ = heat_map(rows)
    if not map_:
        return None
    names = [layer_name(i) for i in moe_layers] if moe_layers else [f"MoE layer {i + 1}" for i in range(len(map_))]
    return {
        "figures": figures(rows),
        "layers": [{"name": name, "cells": cells} for name, cells in zip(names, map_, strict=True)],
        "n_experts": max(map(len, map_)),
        "even": " or ".join(f"{100 / n:.1f} %" for n in sorted({len(cells) for cells in map_})),
        "charts": [found for found in charts(rows, names) if found],
    }


def heat_map(rows: list[dict]) -> list[list[dict]]:
    """Expert load at the end, a line for each MoE layer: each cell's share as text, and per cent over or under."""
    loads = [row["expert_load"] for row in rows[-RECENT_STEPS:] if row.get("expert_load")]
    table = []
    for layer in zip(*loads, strict=True):
        shares = [sum(of_expert) / len(layer) for of_expert in zip(*layer, strict=True)]
        over = [100 * (share * len(shares) - 1) for share in shares]
        table.append(
            [
                {"text": f"{100 * share:.1f}", "kind": "over" if by > 0 else "under", "by": min(round(abs(by)), 100)}
                for share, by in zip(shares, over, strict=True)
            ]
        )
    return table


def figures(rows: list[dict]) -> list[tuple[str, str]]:
    """The last step's routing in numbers: (text, what it is); of the worst layer where layers differ."""
    known = {key: row[key] for row in rows for key in row if row[key] is not None}
    n_experts = sum(map(len, known["expert_load"]))
    found = [
        (
            "expert_load_max",
            lambda value: f"{number(value, '.2f')} \N{MULTIPLICATION SIGN}",
            "busiest expert's load over the mean",
        ),
        ("expert_entropy", lambda value: number(value, ".3f"), "entropy of the load (1: even)"),
        ("dead_experts", lambda value: f"{value} of {n_experts}", "dead experts"),
        ("router_confidence", share, "largest score of a token, of all its scores"),
        ("router_bias_range", lambda value: number(value, ".3f"), "range of the selection bias"),
        ("dropped_share", share, "dropped of what was sent"),
    ]
    may_be_none = {"router_bias_range", "dropped_share"}  # where nothing is balanced by bias, nothing can be dropped
    return [
        (said(known[key]), label)
        for key, said, label in found
        if key in known and (key not in may_be_none or any(value for _, value in points(rows, key)))
    ]


def charts(rows: list[dict], names: list[str]) -> list[dict | None]:
    """The charts of routing; None for those that the run has no numbers for, or nothing but zeros."""
    last = rows[-1]["step"]

    def if_any(title: str, unit: str, key: str) -> dict | None:
        some = any(value for _, value in points(rows, key))
        return chart(title, unit, last, noisy(rows, key), zero=True) if some else None

    busiest = {
        row["step"]: [max(load) * len(load) for load in row["expert_load"]] for row in rows if "expert_load" in row
    }
    confidence = {row["step"]: row["router_layers"]["confidence"] for row in rows if row.get("router_layers")}
    z_loss = noisy(rows, "router_z_loss")
    return [
        chart(
            "Busiest expert", "its load over the mean, in each MoE layer", last, by_layer(busiest, names), spikes=True
        ),
        chart("Router confidence", "a token's largest score, of all its scores", last, by_layer(confidence, names)),
        chart("Evenness", "entropy of the load, 1: even, in the worst MoE layer", last, noisy(rows, "expert_entropy")),
        if_any("Dead experts", "in all MoE layers", "dead_experts"),
        if_any("Selection bias", "largest less smallest, in the worst MoE layer", "router_bias_range"),
        if_any("Dropped", "share of what was sent to experts", "dropped_share"),
        chart("Router z-loss", "mean over the MoE layers", last, z_loss, spikes=True, zero=True),
    ]


def by_layer(values: dict[int, list[float | None]], names: list[str]) -> list[Curve]:
    """A smoothed curve for each MoE layer, of each layer's value by step."""
    curves = []
    for layer, name in enumerate(names):
        found = [(step, layers[layer]) for step, layers in values.items() if layers[layer] is not None]
        apart, smooth = max(len(found) // LAYER_POINTS, 1), smoothed(found, len(found) // 200)
        kept = [point for i, point in enumerate(smooth) if i < LAYER_POINTS or (len(found) - 1 - i) % apart == 0]
        curves.append(Curve(name, "layer", kept, 100 * layer // max(len(names) - 1, 1)))
    return curves


def liked(preferences: dict[str, Any]) -> dict[str, Any] | None:
    """The table of experts.json as the page shows it; None where there is no such file."""
    if not preferences:
        return None
    layers = []
    for layer in preferences["layers"]:
        experts = [
            [
                {"text": visible(token["text"]), "lift": f"{token['lift']:.1f}", "sent": f"{token['sent']:,}"}
                for token in tokens
            ]
            for tokens in layer["liked"]
        ]
        unnamed = layer["n_experts"] - len(experts)
        layers.append({"name": layer_name(layer["layer"]), "experts": experts, "unnamed": unnamed})
    return {key: f"{preferences[key]:,}" for key in ("step", "n_tokens", "seen_at_least")} | {"layers": layers}
