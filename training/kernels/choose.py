"""The choice of kernels: a kernel qualifies if it matches the reference in all trials (`trials.py`).

`auto` takes the first kernel of the table that qualifies; for experts on CUDA, the fastest.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from training.config import ParallelConfig
from training.errors import UserError
from training.kernels.attention.table import device_info, limits_on
from training.kernels.interface import KernelRequirements, Kernels
from training.kernels.table import TABLES, candidates
from training.kernels.trials import build_trials, time_experts

TIMED_DEVICE_TYPES = ("cuda",)  # expert kernels are chosen by time here, elsewhere by table order


class KernelChoice(NamedTuple):
    """The chosen kernels. `names` and `reasons` have the keys "attention", "experts" and "loss"."""

    kernels: Kernels
    names: dict[str, str]
    reasons: dict[str, str]  # why this kernel, and why not an earlier one of the table

    def as_text(self) -> dict[str, str]:
        """Return each choice as text: "flash (matches the reference)"."""
        return {option: f"{name} ({self.reasons[option]})" for option, name in self.names.items()}


def choose_kernels(
    config: ParallelConfig,
    requirements: KernelRequirements,
    *,
    device: torch.device,
    dtype: torch.dtype,
    previous: Mapping[str, str] | None = None,
) -> KernelChoice:
    """Choose kernels for everything that a model requires on this device.

    `previous` maps options to kernel names: `auto` tries these first, so that a resumed run repeats its bits. With
    `config.compile` a kernel must also compile. Raises UserError if a kernel named in `config` fails.
    """
    names, reasons, previous = {}, {}, previous or {}
    for option in TABLES:
        names[option], reasons[option] = _choose(option, config, requirements, device, dtype, previous.get(option))
    kernels = Kernels(**{option: TABLES[option][name] for option, name in names.items()})
    return KernelChoice(kernels, names, reasons)


def _choose(option, config, requirements, device, dtype, previous) -> tuple[str, str]:
    """Return (kernel name, reason) of one option. Raises UserError."""
    table, value = TABLES[option], getattr(config, option)
    names = candidates(option, device, dtype) if value == "auto" else [value]
    trials = build_trials(option, requirements, device, dtype, config.compile)
    is_timed = option == "experts" and device.type in TIMED_DEVICE_TYPES and bool(trials)
    passing, failures = [], {}
    for name in sorted(names, key=lambda name: name != previous):
        if failure := next(filter(None, (trial.failure(name, table) for trial in trials)), None):
            failures.setdefault(failure, []).append(name)
            continue
        passing.append(name)
        if name == previous or not is_timed:
            break
    notes = [f"{', '.join(failed)}: {failure}" for failure, failed in failures.items()]
    if not passing:
        raise UserError(f"parallel.{option}: {'; '.join(notes)}; use auto")
    name = passing[0]
    contenders = {name: table[name] for name in passing if name != "reference"}  # the reference is too slow to time
    if len(contenders) > 1:
        seconds = sorted((time, name) for name, time in time_experts(contenders, requirements, device, dtype).items())
        name = seconds[0][1]
        notes.append("fastest: " + ", ".join(f"{each} {1e3 * time:.2f} ms" for time, each in seconds))
    if notes:
        return name, "; ".join(notes)
    notes.append("matches the reference" if value == "auto" else "requested")
    if option == "attention" and not limits_on(name, device_info(device)).deterministic:
        notes.append("its gradients differ from run to run")
    if previous not in (None, name):
        notes.append(f"previously {previous}")
    return name, "; ".join(notes)
