"""Where the time of a run went, in words and as the report's bar."""

from __future__ import annotations

from collections.abc import Iterable

from training.logging.format import spoken

# The phases of a run's time, as `training/logging/phase_timer.py` measures them: what each is.
PHASES = {
    "compute": "forward and backward",
    "optimizer": "clipping and the update",
    "data": "waiting for a batch",
    "communication": "waiting for other ranks",
    "evaluation": "validation and samples",
    "checkpoint": "waiting for a save",
    "idle": "rows and logs",
    "start": "start-up, with the first step",
    "redone": "lost to a kill, and done again",
}
PRODUCTIVE = ("compute", "optimizer", "data", "communication")  # what goodput counts
SHOWN = 0.005  # a smaller share is nothing, in words


def phase_seconds(rows: Iterable[dict]) -> dict[str, float]:
    """Seconds by phase that the rows tell of."""
    sums = dict.fromkeys(PHASES, 0.0)
    for row in rows:
        for phase in PHASES:
            sums[phase] += row.get(f"time_{phase}") or 0.0
    return sums


def goodput(seconds: dict[str, float]) -> float | None:
    """The share of all time that went into steps that count; None where nothing was measured."""
    total = sum(seconds.values())
    return sum(seconds[phase] for phase in PRODUCTIVE) / total if total else None


def shares(seconds: dict[str, float]) -> dict[str, float]:
    """Of all time, the largest first, without those that round to nothing."""
    total = sum(seconds.values())
    found = {phase: value / total for phase, value in seconds.items() if total and value / total >= SHOWN}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def as_text(seconds: dict[str, float]) -> str:
    """The phases' shares, and goodput: 92 % compute, 3 % optimizer, 5 % start; goodput 95 %."""
    said = ", ".join(f"{100 * share:.0f} % {phase}" for phase, share in shares(seconds).items())
    return f"{said}; goodput {100 * goodput(seconds):.0f} %" if said else ""


def bar(seconds: dict[str, float]) -> dict | None:
    """The report's bar, a part each phase with its place between two colours; None where nothing was measured."""
    found = shares(seconds)
    if not found:
        return None
    order = list(PHASES)
    parts = [
        {
            "phase": phase,
            "what": PHASES[phase],
            "text": f"{100 * found[phase]:.0f} %",
            "share": round(100 * found[phase], 2),
            "lasted": spoken(seconds[phase]),
            "shade": 100 * order.index(phase) // (len(order) - 1),
        }
        for phase in found
    ]
    return {"goodput": f"{100 * goodput(seconds):.0f} %", "parts": parts}
