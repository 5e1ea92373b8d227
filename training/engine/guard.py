"""Steps that are not taken: one whose loss or gradient is not finite teaches nothing, and a spike does harm."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field

MOST = 10  # skipped in a row
WINDOW, FEWEST = 128, 32  # steps that a spike is measured against


@dataclass
class Skips:
    """Which steps are taken; a part of the run's state. All ranks have the same figures, and so the same answer."""

    limit: float | None = None  # standard deviations above the mean that make a spike; None: nothing is one
    total: int = 0
    in_a_row: int = 0  # that were not finite
    spikes: int = 0  # in a row
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def why(self, loss: float, norm: float) -> str | None:
        """Why a step of this loss, in nats, and gradient norm is skipped; None: it is taken. To be asked once a step.

        After `MOST` spikes in a row the higher level is the new one.
        """
        found = _not_finite(loss, norm) or self._spike(loss, norm)
        self.in_a_row = self.in_a_row + 1 if _not_finite(loss, norm) else 0
        if found:
            self.total += 1
        else:
            self.losses.append(loss)
            self.norms.append(norm)
        return found

    def state_dict(self) -> dict:
        """For JSON."""
        window = {"losses": list(self.losses), "norms": list(self.norms)} if self.limit is not None else {}
        return {"total": self.total, "in_a_row": self.in_a_row, "spikes": self.spikes} | window

    def load_state_dict(self, state: dict) -> None:
        """The inverse."""
        self.total, self.in_a_row, self.spikes = (state[name] for name in ("total", "in_a_row", "spikes"))
        self.losses.extend(state.get("losses", ()))
        self.norms.extend(state.get("norms", ()))

    def _spike(self, loss: float, norm: float) -> str | None:
        if self.limit is None or len(self.losses) < FEWEST:
            return None
        for what, value, before in (("loss", loss, self.losses), ("grad_norm", norm, self.norms)):
            mean, deviation = statistics.fmean(before), statistics.pstdev(before)
            if value > mean + self.limit * max(deviation, 1e-12):
                self.spikes += 1
                if self.spikes > MOST:
                    self.losses.clear()
                    self.norms.clear()
                    break
                return f"{what} is {value:.4g}, and was {mean:.4g} +- {deviation:.2g}"
        self.spikes = 0
        return None


def _not_finite(loss: float, norm: float) -> str | None:
    for what, value in (("loss", loss), ("grad_norm", norm)):
        if not math.isfinite(value):
            return f"{what} is {value}"
    return None
