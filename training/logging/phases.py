"""The phases of a run's time, and their shares."""

from collections.abc import Iterable

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
