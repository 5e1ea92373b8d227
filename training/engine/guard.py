"""Decide which updates to skip: those with a NaN or infinite loss or gradient and, if configured, spikes."""

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Any

MAX_CONSECUTIVE = 10  # skipped updates in a row, before a run stops or a spike counts as the new level
WINDOW = 128  # updates that a spike is measured against
MIN_WINDOW = 32  # fewer updates are too few to estimate the deviation


@dataclass
class StepGuard:
    """The count of skipped updates and the recent losses and gradient norms. Equal on all ranks, because inputs are."""

    spike_limit: float | None = None  # standard deviations above the mean that count as a spike; None: never skip one
    n_skipped: int = 0
    consecutive: int = 0  # non-finite updates in a row
    consecutive_spikes: int = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @property
    def is_stuck(self) -> bool:
        """True after MAX_CONSECUTIVE non-finite updates in a row."""
        return self.consecutive >= MAX_CONSECUTIVE

    def reason_to_skip(self, loss: float, grad_norm: float) -> str | None:
        """Count one update and return why to skip it, or None to apply it. `loss` is in nats. Call once per step."""
        non_finite = _non_finite(loss, grad_norm)
        reason = non_finite or self._spike(loss, grad_norm)
        self.consecutive = self.consecutive + 1 if non_finite else 0
        if reason:
            self.n_skipped += 1
        else:
            self.losses.append(loss)
            self.norms.append(grad_norm)
        return reason

    def to_json(self) -> dict[str, Any]:
        """Return the guard's state as plain data, without the limit, which is an option."""
        window = {"losses": list(self.losses), "norms": list(self.norms)} if self.spike_limit is not None else {}
        return {"total": self.n_skipped, "in_a_row": self.consecutive, "spikes": self.consecutive_spikes} | window

    def load_json(self, values: dict[str, Any]) -> None:
        """Restore the result of `to_json`. Raises KeyError or TypeError for anything else."""
        self.n_skipped, self.consecutive = values["total"], values["in_a_row"]
        self.consecutive_spikes = values["spikes"]
        self.losses.extend(values.get("losses", ()))
        self.norms.extend(values.get("norms", ()))

    def _spike(self, loss: float, grad_norm: float) -> str | None:
        if self.spike_limit is None or len(self.losses) < MIN_WINDOW:
            return None
        for name, value, window in (("loss", loss, self.losses), ("grad_norm", grad_norm, self.norms)):
            mean, deviation = statistics.fmean(window), statistics.pstdev(window)
            if value > mean + self.spike_limit * max(deviation, 1e-12):
                self.consecutive_spikes += 1
                if self.consecutive_spikes > MAX_CONSECUTIVE:  # not a spike: the run has reached a new level
                    self.losses.clear()
                    self.norms.clear()
                    break
                return f"{name} is {value:.4g}, after a mean of {mean:.4g} +- {deviation:.2g}"
        self.consecutive_spikes = 0
        return None


def _non_finite(loss: float, grad_norm: float) -> str | None:
    for name, value in (("loss", loss), ("grad_norm", grad_norm)):
        if not math.isfinite(value):
            return f"{name} is {value}"
    return None
