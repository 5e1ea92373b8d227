"""How a step grows: its time with the context and with the number of experts, its memory with the tokens at a time.

    python benchmarks/growth.py --plot benchmarks/results/growth.png | tee benchmarks/results/growth.txt

4 layers of 256 on a CPU; times are medians of steps that take turns. Beside each figure stands what arithmetic makes of
the first one of its line: forward and backward grow with the FLOPs of a token, the optimizer with the parameters.
Memory stands beside what `training.plan` foretells, a share of which was fitted to runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import step
import torch
from common import header, in_a_process, peak_gib, used_gib

from training import device as devices
from training.config import Config
from training.model import GPT
from training.planning import memory

CPU = torch.device("cpu")
PRECISION = devices.resolve_precision("auto", CPU)
CONTEXTS = [128, 256, 512, 1024, 2048, 4096]
EXPERTS = [1, 2, 4, 8, 16, 32, 64]
AT_A_TIME = [512, 1024, 2048, 4096, 8192, 16384]


class Point(NamedTuple):
    """A measured figure and what was to be expected."""

    x: int
    measured: float
    expected: float


def config_of(asked: argparse.Namespace, folder: Path, *, context: int = 128, experts: int = 0, at_a_time: int = 0):
    """A run of ours. Without experts it is dense; `at_a_time` counts tokens, all that fit where it is 0."""
    sizes = {"n_layer": 4, "n_head": 4, "n_embd": asked.width, "n_positions": context, "vocab_size": 4096}
    samples = max(asked.tokens, at_a_time) // context
    about = argparse.Namespace(
        **sizes, samples=samples, micro_batch=at_a_time // context or "auto", precision=PRECISION, device="cpu"
    )
    ffn = {"type": "moe", "n_experts": experts, "top_k": min(2, experts), "hidden": asked.width, "activation": "relu2"}
    return step.options(step.LLAMA | ({"blocks": [{"ffn": ffn}]} if experts else {}), about, folder)


def seconds(configs: Iterable[Config], n_steps: int) -> list[tuple[float, ...]]:
    """Of a step of each, which take turns: medians of (forward and backward, optimizer), by the run's own timer."""
    steps = [step.ours(config, CPU) for config in configs]
    for taken in steps:
        for _ in range(6):  # until numbers of an expert's rows have come before
            taken()
    found: list[list[tuple[float, ...]]] = [[] for _ in steps]
    for _ in range(n_steps):
        for taken, of_it in zip(steps, found, strict=True):
            of_it.append(phases_of(taken))
    return [tuple(map(statistics.median, zip(*of_it, strict=True))) for of_it in found]


def phases_of(taken: step.Step) -> tuple[float, ...]:
    """Seconds of (forward and backward, optimizer) of one step."""
    timer = taken.run.timer
    timer.flush()
    before = dict(timer.seconds)
    taken()
    timer.flush()
    return tuple(timer.seconds[phase] - before[phase] for phase in ("compute", "optimizer"))


def sizes_of(config: Config) -> tuple[int, int]:
    """(FLOPs of a token, parameters)."""
    with torch.device("meta"):
        model = GPT(config.model)
    return model.flops_per_token(), model.n_parameters()[0]


def times(configs: dict[int, Config], n_steps: int) -> Iterator[tuple[Point, Point]]:
    """Of each config the seconds of forward and backward, and of the optimizer."""
    found, sizes = seconds(configs.values(), n_steps), [sizes_of(config) for config in configs.values()]
    for x, of_it, size in zip(configs, found, sizes, strict=True):
        expected = [first * grown / base for first, base, grown in zip(found[0], sizes[0], size, strict=True)]
        yield tuple(Point(x, *both) for both in zip(of_it, expected, strict=True))


def tell(title: str, points: list[Point], unit: str) -> None:
    """A line a point."""
    print(f"{title}: measured, expected, their ratio")
    for x, measured, expected in points:
        print(f"    {x:>6,}  {measured:8.3f} {unit}  {expected:8.3f} {unit}  {measured / expected:5.2f}", flush=True)


def peak(asked: argparse.Namespace, folder: Path, at_a_time: int) -> float:
    """GiB of this fresh process in a step, over what its imports took."""
    before = used_gib(CPU)
    taken = step.ours(config_of(asked, folder, at_a_time=at_a_time), CPU)
    taken()
    return peak_gib(taken, CPU, before)


def memories(asked: argparse.Namespace, folder: Path) -> Iterator[Point]:
    """GiB, in fresh processes; and as foretold."""
    for n in asked.at_a_time:
        config = config_of(asked, folder, at_a_time=n)
        foretold = memory.estimate(config, n // config.model.n_positions)
        expected = (foretold.total - foretold.process - foretold.copy) / 2**30
        yield Point(n, in_a_process(__file__, *sys.argv[1:], "--peak", n), expected)


def draw(panels: dict[str, tuple[str, str, list[Point]]], path: Path) -> None:
    """A panel for each title: names of its axes, and its points."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(2, 2, figsize=(10, 7.6), layout="constrained")
    for axes, (title, (x_name, y_name, points)) in zip(all_axes.flat, panels.items(), strict=True):
        x, measured, expected = zip(*points, strict=True)
        axes.plot(x, measured, marker="o", label="measured")
        axes.plot(x, expected, "--", color="grey", label="expected")
        axes.set_xscale("log", base=2)
        axes.set(title=title, xlabel=x_name, ylabel=y_name, ylim=(0, None))
        axes.set_xticks(x, [f"{n:,}" for n in x])
        axes.grid(alpha=0.25)
        axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7, help="of each that are timed (default %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="channels (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="of a step (default %(default)s)")
    for name, values in (("contexts", CONTEXTS), ("experts", EXPERTS), ("at_a_time", AT_A_TIME)):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=values, help="default %(default)s")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if asked.peak:
            print(peak(asked, folder, asked.peak))
            return
        print(f"{header(CPU)}; {PRECISION}")
        by_context = dict(
            zip(asked.contexts, [config_of(asked, folder, context=n) for n in asked.contexts], strict=True)
        )
        by_experts = dict(zip(asked.experts, [config_of(asked, folder, experts=n) for n in asked.experts], strict=True))
        context = [compute for compute, _ in times(by_context, asked.steps)]
        tell("forward and backward by context", context, "s")
        compute, optimizer = map(list, zip(*times(by_experts, asked.steps), strict=True))
        tell("forward and backward by experts", compute, "s")
        tell("optimizer by experts", optimizer, "s")
        memory_gib = list(memories(asked, folder))
        tell("memory by tokens at a time", memory_gib, "GiB")  # as `training.plan` foretells, whose share was fitted
    if asked.plot:
        name = f"{asked.tokens:,} tokens, {PRECISION}"
        in_ms = [Point(x, 1e3 * measured, 1e3 * expected) for x, measured, expected in optimizer]
        panels = {
            f"Forward and backward of {name}": ("context (tokens)", "seconds a step", context),
            f"The same, with experts, {name}": ("experts", "seconds a step", compute),
            "Optimizer": ("experts", "milliseconds a step", in_ms),
            "Peak memory of a step": ("tokens at a time", "GiB", memory_gib),
        }
        draw(panels, asked.plot)


if __name__ == "__main__":
    main()
