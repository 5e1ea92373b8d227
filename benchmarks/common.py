"""Helpers of the benchmarks: header, turns, ratios, and measurements in fresh processes."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from training import device as devices

Times = dict[str, list[float]]  # seconds of each round, by side


def header(device: torch.device, *packages: str) -> str:
    """Return machine, commit and versions on one line."""
    here = Path(__file__).parent
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, cwd=here, capture_output=True, text=True).stdout
    versions = [f"torch {torch.__version__}", *(f"{name} {__import__(name).__version__}" for name in packages)]
    units = " with bf16 units" if device.type == "cpu" and devices.has_bf16_units(device) else ""
    machine = f"{devices.device_name(device)}{units}; Python {platform.python_version()}, {', '.join(versions)}"
    return f"{machine}; commit {commit.strip() or 'unknown'}"


def waiting(device: torch.device) -> Callable[[], None]:
    """Return a function that waits until the device has finished its work."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def turns(sides: dict[str, Callable[[], object]], rounds: int, device: torch.device, warm: int = 1) -> Times:
    """Return the seconds of each side's calls. Sides take turns; the first `warm` rounds are not counted."""
    times: Times = {name: [] for name in sides}
    for turn in range(-warm, rounds):
        for name, side in sides.items():
            seconds = seconds_of(side, device)
            if turn >= 0:
                times[name].append(seconds)
    return times


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call, from an idle device to an idle device."""
    wait = waiting(device)
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


class Worker:
    """A side in a process of its own. It prints "ready", then for each line on stdin "took" and the seconds."""

    def __init__(self, script: str, *arguments: object, env: dict[str, str]):
        command = [sys.executable, script, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | env
        )
        self._answer("ready")

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()  # ends the process
        self.process.wait()

    def seconds(self) -> float:
        """Run one step; return its seconds."""
        print(file=self.process.stdin, flush=True)
        return float(self._answer("took"))

    def _answer(self, word: str) -> str:
        """Return the rest of the next line that begins with `word`."""
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        raise SystemExit(f"a process ended early: {' '.join(map(str, self.process.args))}")


def ratio(times: Times, one: str, other: str) -> float:
    """Return the median over rounds of one side's time over the other's."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def line(name: str, seconds: list[float], n_tokens: int) -> str:
    """Return a line with a side's median, minimum and maximum over the rounds."""
    median = statistics.median(seconds)
    rate, spread = n_tokens / median, f"{min(seconds):.3f} to {max(seconds):.3f}"
    return f"    {name:<26} {median:8.3f} s  ({spread})  {rate:10,.0f} tokens/s"


def against(value: float, bar: float, *, least: bool) -> str:
    """Return a figure beside its bar, which it should reach (`least`) or not exceed."""
    met = value >= bar if least else value <= bar
    return f"{value:.4g} (bar: at {'least' if least else 'most'} {bar:g}, {'met' if met else 'MISSED'})"


def in_a_process(script: str, *arguments: object, env: dict[str, str] | None = None) -> object:
    """Run a script in a fresh process; return its last line, parsed as JSON."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}))
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def peak_gib(work: Callable[[], object], device: torch.device, before: float) -> float:
    """Return the peak GiB during `work`, minus `before` (an earlier `used_gib`)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() / 2**30 - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    work()
    return resident_gib("VmHWM") - before


def used_gib(device: torch.device) -> float:
    """Return GiB in use: of the device's allocator, or of this process."""
    return torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else resident_gib()


def resident_gib(field: str = "VmRSS") -> float:
    """Return GiB of this process: VmRSS now, VmHWM at the peak."""
    text = Path("/proc/self/status").read_text().partition(f"{field}:")[2]
    return int(text.split()[0]) / 2**20
