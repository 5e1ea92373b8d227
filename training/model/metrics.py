"""Log rows from the summed metrics of a step. Shapes: L MoE layers, E experts."""

import math
from collections.abc import Sequence


def step_metrics(metrics: dict[str, Sequence[float]], n_targets: int, top_ks: list[int]) -> dict[str, object]:
    """Return the loss and, if there are MoE layers, the routing figures of one step for the log.

    `metrics` is the result of `GPT.finish_step` as flat lists on the host; `top_ks` is `ModelStats.top_ks`.
    Over all layers: "expert_load_max" (busiest expert over the mean, worst layer), "expert_entropy" (of the load;
    1: even; worst layer), "dead_experts" (number with a load below `dead_expert_threshold`), "router_confidence" and
    "router_z_loss" (mean over tokens and layers), "router_bias_range" (largest), "dropped_share" (of all
    assignments). By layer: "expert_load", and the lists in "router_layers".
    """
    row: dict[str, object] = {"loss": metrics["loss_sum"][0] / n_targets}
    layers: dict[str, list[Sequence[float]]] = {}  # by metric: its values in each MoE layer, in order
    for name, values in metrics.items():
        if "." in name:
            layers.setdefault(name.partition(".")[0], []).append(values)
    if not layers:
        return row

    counts_LE = layers["expert_count"]
    routed_L = [sum(count_E) for count_E in counts_LE]
    load_LE = [[round(count / n, 8) for count in count_E] for count_E, n in zip(counts_LE, routed_L, strict=True)]
    n_tokens_L = [routed / top_k for routed, top_k in zip(routed_L, top_ks, strict=True)]

    def divided(name: str, by_L: list[float]) -> list[float]:
        return [value / n for (value,), n in zip(layers[name], by_L, strict=True)]

    by_layer = {
        "entropy": [load_entropy(load_E) for load_E in load_LE],
        "confidence": divided("confidence", n_tokens_L),
        "z_loss": divided("z_loss", n_tokens_L),
        "bias_range": [value for (value,) in layers["bias_range"]],
        "dropped": divided("dropped", routed_L),
    }
    return row | {
        "expert_load": load_LE,
        "expert_load_max": max(max(load_E) * len(load_E) for load_E in load_LE),
        "expert_entropy": min(by_layer["entropy"]),
        "dead_experts": sum(share < dead_expert_threshold(len(load_E)) for load_E in load_LE for share in load_E),
        "router_confidence": sum(by_layer["confidence"]) / len(load_LE),
        "router_z_loss": sum(by_layer["z_loss"]) / len(load_LE),
        "router_bias_range": max(by_layer["bias_range"]),
        "dropped_share": sum(value for (value,) in layers["dropped"]) / sum(routed_L),
        "router_layers": by_layer,
    }


def load_entropy(load_E: Sequence[float]) -> float:
    """Return the normalized entropy of the load: 1 if even, 0 if all tokens go to one expert."""
    if len(load_E) == 1:
        return 1.0
    return -sum(share * math.log(share) for share in load_E if share) / math.log(len(load_E))


def dead_expert_threshold(n_experts: int) -> float:
    """Return the share of the load below which an expert counts as dead: 1 %, or a tenth of an even share if less."""
    return min(0.01, 0.1 / n_experts)
