"""The phases of a run's time, and their shares as text and as the report's bar."""

from __future__ import annotations

from collections.abc import Iterable

from training.logging.format import duration_text

PHASES = {  # measured by `PhaseTimer`: name and meaning
    "compute": "forward and backward",
    "optimizer": "clipping and the update",
    "data": "waiting for a batch",
    "communication": "waiting for other ranks",
    "evaluation": "validation and samples",
    "checkpoint": "waiting for a save",
    "idle": "rows and logs",
    "start": "start-up, with the first step",
    "redone": "steps lost to a kill, done again",
}
PRODUCTIVE = ("compute", "optimizer", "data", "communication")  # counted by goodput
MIN_SHARE = 0.005  # a smaller share rounds to 0 %


def phase_seconds(rows: Iterable[dict]) -> dict[str, float]:
    """Return the seconds by phase that the rows add up to."""
    sums = dict.fromkeys(PHASES, 0.0)
    for row in rows:
        for phase in PHASES:
            sums[phase] += row.get(f"time_{phase}") or 0.0
    return sums


def goodput(seconds: dict[str, float]) -> float | None:
    """Return the share of all time that went into steps that count; None if nothing was measured."""
    total = sum(seconds.values())
    return sum(seconds[phase] for phase in PRODUCTIVE) / total if total else None


def phase_shares(seconds: dict[str, float]) -> dict[str, float]:
    """Return each phase's share of all time, the largest first, without those that round to 0 %."""
    total = sum(seconds.values())
    shares = {phase: value / total for phase, value in seconds.items() if total and value / total >= MIN_SHARE}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def as_text(seconds: dict[str, float]) -> str:
    """Return the shares and goodput on a line: "92 % compute, 3 % optimizer, 5 % start; goodput 95 %"."""
    text = ", ".join(f"{100 * share:.0f} % {phase}" for phase, share in phase_shares(seconds).items())
    return f"{text}; goodput {100 * goodput(seconds):.0f} %" if text else ""


def stacked_bar(seconds: dict[str, float]) -> dict | None:
    """Return the report's bar, a part per phase; None if nothing was measured. `shade` mixes two colors, 0 to 100."""
    shares, order = phase_shares(seconds), list(PHASES)
    parts = [
        {
            "phase": phase,
            "meaning": PHASES[phase],
            "text": f"{100 * share:.0f} %",
            "share": round(100 * share, 2),
            "duration": duration_text(seconds[phase]),
            "shade": 100 * order.index(phase) // (len(order) - 1),
        }
        for phase, share in shares.items()
    ]
    return {"goodput": f"{100 * goodput(seconds):.0f} %", "parts": parts} if parts else None
