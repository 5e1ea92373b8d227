"""Decide which updates to skip: those with a NaN or infinite loss or gradient and, if configured, spikes."""

import math
import statistics

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt

MAX_CONSECUTIVE = 10  # skipped updates in a row, before a run stops or a spike counts as the new level
WINDOW = 128  # updates that a spike is measured against
MIN_WINDOW = 32  # fewer updates are too few to estimate the deviation


class StepGuard(BaseModel):
    """The count of skipped updates; part of state.json. Equal on all ranks, because inputs are."""

    model_config = ConfigDict(strict=True, populate_by_name=True)

    n_skipped: NonNegativeInt = Field(alias="total")
    consecutive: NonNegativeInt = Field(alias="in_a_row")  # non-finite updates in a row
    consecutive_spikes: NonNegativeInt = Field(alias="spikes")
    losses: list[FiniteFloat] = []  # of the last WINDOW applied updates, if spikes are skipped
    norms: list[FiniteFloat] = []  # of their gradients

    @property
    def is_stuck(self) -> bool:
        """True after MAX_CONSECUTIVE non-finite updates in a row."""
        return self.consecutive >= MAX_CONSECUTIVE

    def reason_to_skip(self, loss: float, grad_norm: float, spike_limit: float | None) -> str | None:
        """Count one update and return why to skip it, or None to apply it. `loss` is in nats. Call once per step.

        A spike is `spike_limit` standard deviations above the mean; None: skip no spikes.
        """
        values = {"loss": loss, "grad_norm": grad_norm}
        reason = next((f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)), None)
        self.consecutive = self.consecutive + 1 if reason else 0
        if spike_limit is not None and reason is None:
            reason = self._spike(values, spike_limit)
            if reason is None:
                self.losses = [*self.losses, loss][-WINDOW:]
                self.norms = [*self.norms, grad_norm][-WINDOW:]
        self.n_skipped += reason is not None
        return reason

    def _spike(self, values: dict[str, float], limit: float) -> str | None:
        if len(self.losses) < MIN_WINDOW:
            return None
        for (name, value), window in zip(values.items(), (self.losses, self.norms), strict=True):
            mean, deviation = statistics.fmean(window), statistics.pstdev(window)
            if value > mean + limit * max(deviation, 1e-12):
                self.consecutive_spikes += 1
                if self.consecutive_spikes > MAX_CONSECUTIVE:  # not a spike: the run has reached a new level
                    self.losses, self.norms = [], []
                    break
                return f"{name} is {value:.4g}, after a mean of {mean:.4g} +- {deviation:.2g}"
        self.consecutive_spikes = 0
        return None
