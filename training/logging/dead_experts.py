"""Experts that starve: the one thing that routers do which is worth a line of the console."""

from __future__ import annotations

from training.logging.format import layer_name

PATIENCE = 200  # steps without tokens before it is said, and between two lines about a layer


class DeadExpertWatch:
    """Follows every MoE layer's load from row to row; the counting begins anew with the process."""

    def __init__(self, moe_layers: list[int]) -> None:
        self.layers = [Layer(layer) for layer in moe_layers]

    def update(self, row: dict) -> list[str]:
        """What there is to say after this row, which follows the one before: at most a line a layer."""
        load = row.get("expert_load") or []
        lines = (layer.update(load_E) for layer, load_E in zip(self.layers, load, strict=bool(load)))
        return [line for line in lines if line]


class Layer:
    """One layer: said when it begins, again when more experts starve and when it has lasted twice as long."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.hungry_E: list[int] = []  # for how many rows in a row
        self.told = (0, 0)  # experts and steps of the last line; (0, 0): all have recovered since
        self.quiet = 0  # rows until the next line

    def update(self, load_E: list[float]) -> str | None:
        from training.model.metrics import dead_expert_threshold  # comes with torch

        limit, n_experts = dead_expert_threshold(len(load_E)), len(load_E)
        before_E = self.hungry_E or [0] * n_experts
        self.hungry_E = [(n + 1) * (share < limit) for n, share in zip(before_E, load_E, strict=True)]
        self.quiet = max(self.quiet - 1, 0)

        lasting = [n for n in self.hungry_E if n >= PATIENCE]
        if not lasting:
            self.told = (0, 0)
            return None
        n_told, steps_told = self.told
        if self.quiet or (len(lasting) <= n_told and min(lasting) < 2 * steps_told):
            return None
        self.told, self.quiet = (len(lasting), min(lasting)), PATIENCE
        return (
            f"{layer_name(self.index)}: {len(lasting)} of {n_experts} experts received < {100 * limit:.2g} % "
            f"of tokens for {min(lasting)} steps"
        )
