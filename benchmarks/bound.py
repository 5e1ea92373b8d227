"""Measure a training step against the sum of its matrix products alone, for a Mixture of Experts and its dense twin.

    python benchmarks/bound.py | tee benchmarks/results/bound.txt

A profiler lists the products of one step with their shapes, Muon's included. Each is then timed alone, as one batch
and one by one, in both layouts of its second factor, and its shortest time counts. A product of experts counts as one
product per expert, with equal rows. The bars: the step takes at most 1.15 (dense) and 1.25 (experts) times the sum.
The operations that take most of the rest are listed; a product of attention is one of them.
"""

import argparse
import statistics
import tempfile
import timeit
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from common import against, header, seconds_of
from torch.profiler import ProfilerActivity, profile
from training_run import TrainingRun

from training.options import cli
from training.twin import twin

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
BARS = {"dense": 1.15, "experts": 1.25}
PRODUCTS = dict.fromkeys(("aten::mm", "aten::bmm", "aten::_grouped_mm"), 0)  # by operator: index of the first factor
PRODUCTS |= dict.fromkeys(("aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::baddbmm_"), 1)
Shape = tuple[int, int, int, int]  # products of this shape in one call; rows, inner width and columns of each


def product(name: str, shapes: list[list[int]], n_experts: int) -> Shape:
    """Return the shape of one call of an operator of PRODUCTS."""
    one, other = shapes[PRODUCTS[name] :][:2]
    if name == "aten::_grouped_mm" and len(other) == 2:  # gradients of the experts' matrices: the rows are summed over
        return n_experts, one[0], one[1] // n_experts, other[1]
    if name == "aten::_grouped_mm":
        return n_experts, one[0] // n_experts, *other[1:]
    return (one[0] if len(one) == 3 else 1), *one[-2:], other[-1]


def seconds_alone(shape: Shape, dtype: torch.dtype, rounds: int) -> float:
    """Return the shortest time of the products of this shape."""
    n, rows, inner, columns = shape
    one, other, out = (torch.randn(n, *size).to(dtype) for size in ((rows, inner), (inner, columns), (rows, columns)))
    turned = other.mT.contiguous().mT
    each = torch.mm if n == 1 else torch.bmm
    one, other, turned, out = (x.squeeze(0) if n == 1 else x for x in (one, other, turned, out))
    calls = [partial(each, one, second, out=out) for second in (other, turned)]
    if n > 1:
        calls += [partial(one_by_one, one, second, out) for second in (other, turned)]
    return min(min(timeit.repeat(call, number=1, repeat=rounds)) for call in calls)


def one_by_one(one: torch.Tensor, other: torch.Tensor, out: torch.Tensor) -> None:
    """Multiply the matrices of two stacks."""
    for a, b, c in zip(one, other, out, strict=True):
        torch.mm(a, b, out=c)


def measure(run: TrainingRun, n_experts: int, rounds: int) -> tuple[float, float, Counter[str]]:
    """Return the seconds of a step, those of its products alone, and the seconds of its other operations by name."""
    device = run.setup.model.world.device
    for _ in range(3):
        run.step()
    step = statistics.median(seconds_of(run.step, device) for _ in range(rounds))
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        run.step()
    shapes = Counter(
        product(event.name, event.input_shapes, n_experts)
        for event in trace.events()
        if event.name in PRODUCTS and (event.cpu_parent is None or event.cpu_parent.name not in PRODUCTS)
    )
    dtype = run.setup.model.model.dtype
    alone = sum(count * seconds_alone(shape, dtype, rounds) for shape, count in shapes.items())
    others = Counter({event.key: event.self_cpu_time_total / 1e6 for event in trace.key_averages()})
    for name in PRODUCTS:
        del others[name]
    return step, alone, others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(CONFIG), help="YAML file of the experts' run (default: the quickstart)")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps (default %(default)s)")
    parser.add_argument("--cache_dir", default="data_cache", help="folder of the token shards (default %(default)s)")
    args = parser.parse_args()
    print(header(torch.device("cpu")))
    with tempfile.TemporaryDirectory() as folder:
        options = {"data.cache_dir": args.cache_dir, "out_dir": folder, "logging.tensorboard": "false"}
        config = cli.load_config(args.config, options)
        experts = next(block.ffn.n_experts for block in config.model.blocks if block.ffn.type == "moe")
        for name, one in {"dense": twin(config), "experts": config}.items():
            step, alone, others = measure(TrainingRun(one, torch.device("cpu")), experts, args.rounds)
            print(f"{name}: a step takes {1e3 * step:.0f} ms, its matrix products alone {1e3 * alone:.0f} ms")
            print(f"  their ratio: {against(step / alone, BARS[name], least=False)}")
            for operation, seconds in others.most_common(8):
                print(f"  {operation:44} {1e3 * seconds:6.1f} ms")


if __name__ == "__main__":
    main()
