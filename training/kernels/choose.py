"""The choice of kernels.

A kernel qualifies if its results and gradients match the reference in all trials (`trials.py`): small problems with the
model's shapes, dtype and masks. `auto` takes the first kernel of the table that qualifies; for experts on CUDA, the
fastest.

    choice = choose_kernels(config.parallel, kernel_requirements(config.model), device=device, dtype=torch.bfloat16)
    model = GPT(config.model, choice.kernels, torch.bfloat16)
    print(choice.names["attention"], choice.reasons["attention"])  # flash  matches the reference
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch

from training.config import ParallelConfig
from training.errors import UserError
from training.kernels.attention.table import device_info, limits_on
from training.kernels.interface import KernelRequirements, Kernels
from training.kernels.table import TABLES, candidates
from training.kernels.trials import Trial, build_trials, timing_trials

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
    previous: Mapping[str, str] = MappingProxyType({}),
) -> KernelChoice:
    """Choose kernels for everything that a model requires on this device.

    `previous` maps options to kernel names: `auto` tries these first, so that a resumed run repeats its bits. With
    `config.compile` a kernel must also compile. Raises UserError if a kernel named in `config` fails.
    """
    names, reasons = {}, {}
    for option in TABLES:
        trials = build_trials(option, requirements, device, dtype, config.compile)
        search = _Search(option, requirements, trials, device, dtype, previous.get(option))
        names[option], reasons[option] = search.choose(getattr(config, option))
    kernels = Kernels(**{option: TABLES[option][name] for option, name in names.items()})
    return KernelChoice(kernels, names, reasons)


@dataclass
class _Search:
    """The search for the kernel of one option."""

    option: str
    requirements: KernelRequirements
    trials: list[Trial]
    device: torch.device
    dtype: torch.dtype
    previous: str | None
    failures: dict[str, list[str]] = field(default_factory=dict)  # by reason: the kernels that failed for it

    def choose(self, value: str) -> tuple[str, str]:
        """Return (kernel name, reason). `value` of the option: a name or "auto". Raises UserError."""
        is_auto = value == "auto"
        names = candidates(self.option, self.device, self.dtype) if is_auto else [value]
        passing = self._passing(sorted(names, key=lambda name: name != self.previous))
        name = next(passing, None)
        if name is None:
            raise UserError(f"parallel.{self.option}: {self._failures_text()}; use auto")
        times = ""
        is_timed = self.option == "experts" and self.device.type in TIMED_DEVICE_TYPES
        if is_timed and self.trials and name != self.previous:
            name, times = self._fastest([name, *passing])
        if reason := "; ".join(filter(None, (self._failures_text(), times))):
            return name, reason
        notes = ["matches the reference" if is_auto else "requested"]
        if self.option == "attention" and not limits_on(name, device_info(self.device)).deterministic:
            notes.append("its gradients differ from run to run")
        if self.previous not in (None, name):
            notes.append(f"previously {self.previous}")
        return name, "; ".join(notes)

    def _passing(self, names: list[str]) -> Iterator[str]:
        """Yield the kernels that pass every trial, and record why the others fail."""
        for name in names:
            if failure := next(filter(None, (self._failure(trial, name) for trial in self.trials)), None):
                self.failures.setdefault(failure, []).append(name)
            else:
                yield name

    def _failure(self, trial: Trial, name: str) -> str | None:
        table = TABLES[self.option]
        return trial.failure(name, table[name], table["reference"], self.device, self.dtype)

    def _fastest(self, names: list[str]) -> tuple[str, str]:
        """Return (fastest expert kernel, times of all as text), summed over the model's expert layers."""
        contenders = [name for name in names if name != "reference"]  # the reference is too slow to time
        if len(contenders) < 2:
            return names[0], ""
        trials = timing_trials(self.requirements, self.device, self.dtype)
        kernels = {name: TABLES[self.option][name] for name in contenders}
        seconds = {
            name: sum(trial.seconds(kernel, self.device, self.dtype) for trial in trials)
            for name, kernel in kernels.items()
        }
        if self.device.type == "cuda":  # so that the run's memory statistics exclude the timing
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        ordered = sorted(seconds, key=seconds.__getitem__)
        return ordered[0], "fastest: " + ", ".join(f"{name} {1e3 * seconds[name]:.2f} ms" for name in ordered)

    def _failures_text(self) -> str:
        return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in self.failures.items())
