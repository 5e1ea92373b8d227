"""Measure how a step grows: time with context and number of experts, memory with tokens per micro-batch.

    python benchmarks/growth.py --plot benchmarks/results/growth.png | tee benchmarks/results/growth.txt

4 layers of width 256 on a CPU; times are medians of steps that take turns. The expected figures scale the first one:
forward and backward with the FLOPs per token, the optimizer with the number of parameters. Expected memory is the
estimate of `training.plan`, a share of which is fitted to runs.
"""

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
from training.model.stats import model_stats
from training.planning.memory import MemoryEstimator

CPU = torch.device("cpu")
PRECISION = devices.resolve_precision("auto", CPU)
CONTEXTS = [128, 256, 512, 1024, 2048, 4096]
EXPERTS = [1, 2, 4, 8, 16, 32, 64]
AT_A_TIME = [512, 1024, 2048, 4096, 8192, 16384]


class Point(NamedTuple):
    """A measured figure beside the expected one."""

    x: int
    measured: float
    expected: float


def config_of(args: argparse.Namespace, folder: Path, *, context: int = 128, experts: int = 0, at_a_time: int = 0):
    """Return a run's config: dense if `experts` is 0; `at_a_time` is tokens per micro-batch, 0: as many as fit."""
    sizes = {"n_layer": 4, "n_head": 4, "n_embd": args.width, "n_positions": context, "vocab_size": 4096}
    samples = max(args.tokens, at_a_time) // context
    options = argparse.Namespace(
        **sizes, samples=samples, micro_batch=at_a_time // context or "auto", precision=PRECISION, device="cpu"
    )
    ffn = {"type": "moe", "n_experts": experts, "top_k": min(2, experts), "hidden": args.width, "activation": "relu2"}
    return step.options(step.LLAMA | ({"blocks": [{"ffn": ffn}]} if experts else {}), options, folder)


def seconds(configs: Iterable[Config], n_steps: int) -> list[tuple[float, ...]]:
    """Return the median seconds of (forward and backward, optimizer) of each config's steps, which take turns."""
    steps = [step.ours(config, CPU) for config in configs]
    for one_step in steps:
        for _ in range(6):  # until most row counts of experts have occurred: oneDNN generates code for each new one
            one_step()
    times: list[list[tuple[float, ...]]] = [[] for _ in steps]
    for _ in range(n_steps):
        for one_step, its_times in zip(steps, times, strict=True):
            its_times.append(phases_of(one_step))
    return [tuple(map(statistics.median, zip(*its_times, strict=True))) for its_times in times]


def phases_of(one_step: step.Step) -> tuple[float, ...]:
    """Run a step; return the seconds of (forward and backward, optimizer)."""
    timer = one_step.run.log.timer
    timer.flush()
    before = dict(timer.seconds)
    one_step()
    timer.flush()
    return tuple(timer.seconds[phase] - before[phase] for phase in ("compute", "optimizer"))


def sizes_of(config: Config) -> tuple[int, int]:
    """Return (FLOPs per token, number of parameters)."""
    stats = model_stats(config.model)
    return stats.flops_per_token, stats.n_parameters


def times(configs: dict[int, Config], n_steps: int) -> Iterator[tuple[Point, Point]]:
    """Yield for each config the point of forward and backward, and that of the optimizer."""
    medians, sizes = seconds(configs.values(), n_steps), [sizes_of(config) for config in configs.values()]
    for x, measured, size in zip(configs, medians, sizes, strict=True):
        expected = [first * grown / base for first, base, grown in zip(medians[0], sizes[0], size, strict=True)]
        yield tuple(Point(x, *both) for both in zip(measured, expected, strict=True))


def print_points(title: str, points: list[Point], unit: str) -> None:
    """Print a line per point."""
    print(f"{title}: measured, expected, their ratio")
    for x, measured, expected in points:
        print(f"    {x:>6,}  {measured:8.3f} {unit}  {expected:8.3f} {unit}  {measured / expected:5.2f}", flush=True)


def peak(args: argparse.Namespace, folder: Path, at_a_time: int) -> float:
    """Return the peak GiB of a step in this fresh process, without its imports and what libraries allocate once."""
    narrow = argparse.Namespace(**vars(args) | {"width": 32})
    step.ours(config_of(narrow, folder, at_a_time=128), CPU)()
    before = used_gib(CPU)
    one_step = step.ours(config_of(args, folder, at_a_time=at_a_time), CPU)
    one_step()
    return peak_gib(one_step, CPU, before)


def memories(args: argparse.Namespace, folder: Path) -> Iterator[Point]:
    """Yield the peak GiB in fresh processes beside the estimate."""
    for n in args.at_a_time:
        config = config_of(args, folder, at_a_time=n)
        estimate = MemoryEstimator(config).estimate(n // config.model.n_positions)
        expected = (estimate.total - estimate.process - estimate.save_copy) / 2**30
        yield Point(n, in_a_process(__file__, *sys.argv[1:], "--peak", n), expected)


def draw(panels: dict[str, tuple[str, str, list[Point]]], path: Path) -> None:
    """Draw a panel for each title, with its axis names and points."""
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
    parser.add_argument("--steps", type=int, default=7, help="timed steps of each config (default %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="n_embd (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens per step (default %(default)s)")
    for name, values in (("contexts", CONTEXTS), ("experts", EXPERTS), ("at_a_time", AT_A_TIME)):
        parser.add_argument(f"--{name}", type=int, nargs="+", default=values, help="default %(default)s")
    parser.add_argument("--plot", type=Path, help="draw the figures into this PNG")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.peak:
            print(peak(args, folder, args.peak))
            return
        print(f"{header(CPU)}; {PRECISION}")
        by_context = dict(zip(args.contexts, [config_of(args, folder, context=n) for n in args.contexts], strict=True))
        by_experts = dict(zip(args.experts, [config_of(args, folder, experts=n) for n in args.experts], strict=True))
        context = [compute for compute, _ in times(by_context, args.steps)]
        print_points("forward and backward by context", context, "s")
        compute, optimizer = map(list, zip(*times(by_experts, args.steps), strict=True))
        print_points("forward and backward by experts", compute, "s")
        print_points("optimizer by experts", optimizer, "s")
        memory_gib = list(memories(args, folder))
        print_points("memory by tokens at a time", memory_gib, "GiB")
    if args.plot:
        name = f"{args.tokens:,} tokens, {PRECISION}"
        in_ms = [Point(x, 1e3 * measured, 1e3 * expected) for x, measured, expected in optimizer]
        panels = {
            f"Forward and backward of {name}": ("context (tokens)", "seconds a step", context),
            f"The same, with experts, {name}": ("experts", "seconds a step", compute),
            "Optimizer": ("experts", "milliseconds a step", in_ms),
            "Peak memory of a step": ("tokens at a time", "GiB", memory_gib),
        }
        draw(panels, args.plot)


if __name__ == "__main__":
    main()
