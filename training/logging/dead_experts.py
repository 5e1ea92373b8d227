"""Console lines about dead experts, the one router problem that needs attention during a run."""

from collections.abc import Sequence

from training.logging.format import layer_name
from training.logging.metrics import expert_load

PATIENCE = 200  # steps below the threshold before the first line, and between two lines about a layer at least


class DeadExpertWatch:
    """A watch over all MoE layers. Its counts start at 0 after a restart."""

    def __init__(self, moe_layers: Sequence[int]) -> None:
        self.layers = {layer: LayerWatch(layer) for layer in moe_layers}

    def update(self, row: dict) -> list[str]:
        """Return the lines to print after this row, at most one per layer. The rows of all calls are consecutive."""
        load = expert_load(row, list(self.layers))
        lines = [self.layers[layer].update(load_E) for layer, load_E in load.items()]
        return [line for line in lines if line]


class LayerWatch:
    """A watch over one layer. It reports when experts die, when more die, and each time the duration has doubled."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.dead_steps_E: list[int] = []  # consecutive steps below the threshold
        self.reported = (0, 0)  # experts and steps in the last line; (0, 0): all have recovered since
        self.quiet = 0  # steps until another line may come

    def update(self, load_E: list[float]) -> str | None:
        from training.model.metrics import dead_expert_threshold  # imports torch

        threshold, n_experts = dead_expert_threshold(len(load_E)), len(load_E)
        before_E = self.dead_steps_E or [0] * n_experts
        self.dead_steps_E = [(n + 1) * (share < threshold) for n, share in zip(before_E, load_E, strict=True)]
        self.quiet = max(self.quiet - 1, 0)

        dead = [n for n in self.dead_steps_E if n >= PATIENCE]
        if not dead:
            self.reported = (0, 0)
            return None
        n_reported, steps_reported = self.reported
        if self.quiet or (len(dead) <= n_reported and min(dead) < 2 * steps_reported):
            return None
        self.reported, self.quiet = (len(dead), min(dead)), PATIENCE
        return (
            f"{layer_name(self.layer)}: {len(dead)} of {n_experts} experts received < {100 * threshold:.2g} % "
            f"of tokens for {min(dead)} steps"
        )
