"""What an accelerator makes of us: its ceilings, GPT-2 124M, a MoE beside its twin, memory, and where a step goes.

    bash benchmarks/cuda.sh                        correctness first, then this
    python benchmarks/gpu.py --toy --device cpu   at a size at which the figures say nothing

Sides run one after the other, each with the memory to itself; a figure is the median over its rounds. MFU counts the
FLOPs of active parameters against the 8192 x 8192 x 8192 product measured in the same run, not against a data sheet.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import step as steps
import torch
from common import Times, against, header, peak_gib, ratio, turns, used_gib
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from training import device as devices
from training.errors import UserError
from training.kernels.attention.table import ATTENTION_BACKENDS, auto_candidates, device_info, limits_on
from training.kernels.table import LOSS_KERNELS
from training.model import model_stats
from training.twin import twin

LARGE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "samples": 256, "vocab_size": 50304}
TOY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "samples": 4, "vocab_size": 512}
GOAL_MFU, GOAL_NANOGPT, BAR_TWIN = 0.6, 1.25, 1.25
PRODUCTS = ("mm", "gemm", "nvjet", "cutlass", "xmma", "flash", "fmha", "attention")  # in the names of kernels
FUSED = ("triton_poi", "triton_red", "triton_per")  # a compiler's, named after all that is in them
WAITS = "DtoH"  # in the names of copies to the host, which waits for them


def rate(work: Callable[[], object], amount: float, device: torch.device) -> float:
    """So much a second, of the best of ten."""
    return amount / min(turns({"it": work}, 10, device, warm=3)["it"])


def ceilings(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """Print what the device does at most; returns FLOP/s of a product."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    flops = rate(lambda: a @ b, 2 * n**3, device)
    source = torch.empty(n * n * 4, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = rate(lambda: target.copy_(source), 2 * source.numel(), device)
    print(f"ceilings: a product of {n}^3 {flops / 1e12:.1f} TFLOP/s, a copy {copied / 1e9:.0f} GB/s", flush=True)
    return flops


def flops_of(config) -> float:
    """Of a token, forward and backward."""
    return model_stats(config.model).flops_per_token


def forget(device: torch.device) -> None:
    """Free what the side before has left."""
    torch._dynamo.reset()  # else the programs of all sides count towards the limit of one function's
    gc.collect()  # a compiled module is part of a cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Sides:
    """What is compared, one at a time in memory; what cannot run here says why and is left out."""

    def __init__(self, device: torch.device, rounds: int, n_tokens: int, ceiling: float):
        self.device, self.rounds, self.n_tokens, self.ceiling = device, rounds, n_tokens, ceiling
        self.times: Times = {}
        self.flops: dict[str, float] = {}
        self.failed = False

    def run(self, sides: dict[str, tuple[Callable[[], steps.Step], float]]) -> None:
        """Time each, given how it is made and a token's FLOPs; print its line."""
        for name, (make, flops) in sides.items():
            self.flops[name] = flops
            try:
                self.times |= turns({name: make()}, self.rounds, self.device, warm=2)
                self.tell(name)
            except UserError as error:  # a package, or a kernel, that is not here
                print(f"    {name:<34} not here: {' '.join(str(error).split())[:110]}", flush=True)
            except Exception as error:
                print(f"    {name:<34} FAILED: {' '.join(str(error).split())[:110]}", flush=True)
                traceback.print_exc()
                self.failed = True
            finally:
                forget(self.device)

    def tell(self, name: str) -> None:
        """A side's line: tokens/s, best and worst time, the share of the ceiling, and on CUDA its peak of memory."""
        seconds = self.times[name]
        speed, spread = self.n_tokens / statistics.median(seconds), f"{min(seconds):.4f} to {max(seconds):.4f} s"
        gib = f"  {torch.cuda.max_memory_allocated() / 2**30:5.1f} GiB" if self.device.type == "cuda" else ""
        print(f"    {name:<34} {speed:10,.0f} tokens/s  ({spread})  MFU {self.mfu(name):6.1%}{gib}", flush=True)

    def mfu(self, name: str) -> float:
        """A side's share of the ceiling."""
        return self.n_tokens * self.flops[name] / statistics.median(self.times[name]) / self.ceiling

    def judge(self, one: str, other: str, bar: float, *, least: bool) -> None:
        """A ratio of two sides' times beside its bar."""
        if one in self.times and other in self.times:
            print(f"    {one} / {other}: {against(ratio(self.times, one, other), bar, least=least)}", flush=True)
        else:
            print(f"    {one} / {other}: not judged, as one is not there", flush=True)

    def judge_mfu(self, name: str, goal: float) -> None:
        """A side's share of the ceiling beside its goal."""
        if name in self.times:
            print(f"    MFU of {name}: {against(self.mfu(name), goal, least=True)}", flush=True)

    def fastest(self, of: str) -> str:
        """The side with the shortest median, of those whose names begin so."""
        medians = {name: statistics.median(found) for name, found in self.times.items() if name.startswith(of)}
        return min(medians, key=medians.__getitem__, default=of)


def dense(asked: argparse.Namespace, folder: Path, device: torch.device) -> Iterator[tuple[str, tuple]]:
    """GPT-2 as it is: plain, compiled, by attention back-end, by loss, with Muon; Transformers and nanoGPT compiled."""
    plain = steps.options(steps.GPT2, asked, folder)
    flops = flops_of(plain)
    yield "this", (lambda: steps.ours(plain, device), flops)
    here = [
        name for name in ATTENTION_BACKENDS if name != "reference" and limits_on(name, device_info(device)) is not None
    ]
    for backend in here[: 1 if asked.toy else None]:
        config = steps.options(steps.GPT2, asked, folder, compile=True, attention=backend)
        yield f"this, compiled, {backend}", (lambda config=config: steps.ours(config, device), flops)
    for loss in LOSS_KERNELS:
        config = steps.options(steps.GPT2, asked, folder, compile=not asked.toy, loss=loss)
        yield f"this, compiled, loss {loss}", (lambda config=config: steps.ours(config, device), flops)
    muon = steps.options(steps.GPT2, asked, folder, optim="muon", compile=not asked.toy)
    yield "this, compiled, Muon", (lambda: steps.ours(muon, device), flops)
    yield "transformers, compiled", (lambda: steps.transformers_side(plain, device, compiled=not asked.toy), flops)
    if asked.nanogpt:
        yield "nanogpt, compiled", (lambda: steps.from_folder(asked.nanogpt, plain, device, compiled=True), flops)


def experts(asked: argparse.Namespace, folder: Path, device: torch.device) -> Iterator[tuple[str, tuple]]:
    """8 experts, 2 a token, in every layer, the twin, and Transformers, a quarter of the samples at a time."""
    hidden = 2 * asked.n_embd
    config = steps.options(
        steps.LLAMA | {"blocks": [{"ffn": steps.SWIGLU | {"hidden": hidden}}]}, asked, folder, compile=not asked.toy
    )
    for name, one in (("MoE", config), ("twin", twin(config))):
        yield name, (lambda one=one: steps.ours(one, device), flops_of(one))
    fewer = config.model_copy(update={"micro_batch": max(1, asked.micro_batch // 4)})  # of all logits it has several
    yield "transformers", (lambda: steps.transformers_side(fewer, device, compiled=False), flops_of(config))


def memory(asked: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """Print the micro-batch that fits, and the peak of a step with it."""
    before = used_gib(device)
    larger = argparse.Namespace(**vars(asked) | {"micro_batch": "auto", "samples": 2 * asked.samples})
    step = steps.ours(steps.options(steps.GPT2, larger, folder), device)
    step()
    fits = step.run.micro_batch
    print(
        f"memory: {fits} samples fit at a time; {peak_gib(step, device, before):.2f} GiB at the peak of a step",
        flush=True,
    )


def kernels(asked: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """Print the kernels of a compiled step, the longest first, what the host waited for, and the three largest gaps."""
    on_device = device.type == "cuda"
    step = steps.ours(steps.options(steps.GPT2, asked, folder, compile=on_device), device)
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_device) as found:
        (wall,) = turns({"step": step}, 1, device, warm=0)["step"]
    # An operation of the host has the time of its kernels as well: these alone are counted.
    where, which = (DeviceType.CUDA, "self_device_time_total") if on_device else (DeviceType.CPU, "self_cpu_time_total")
    averages = found.key_averages()
    taken = {
        event.key: (getattr(event, which) / 1e6, event.count)
        for event in sorted(averages, key=lambda event: -getattr(event, which))
        if event.device_type == where and not event.is_user_annotation
    }
    busy = sum(seconds for seconds, _ in taken.values())
    print(f"a step: {wall:.4f} s, of which {busy:.4f} s in kernels")
    for name, (seconds, count) in list(taken.items())[:20]:
        print(f"    {seconds / wall:6.1%} {1e3 * seconds:9.3f} ms {count:5} x  {name[:80]}")
    waits = sum(event.count for event in averages if WAITS in event.key)
    print(f"    waits of the host: {waits} (one is whether the step is taken)")
    gaps = {
        name: seconds
        for name, (seconds, _) in taken.items()
        if name.startswith(FUSED) or not any(x in name.lower() for x in PRODUCTS)
    }
    gaps["nothing runs"] = wall - busy
    largest = sorted(gaps, key=gaps.__getitem__, reverse=True)[:3]
    print(f"    the largest gaps: {', '.join(f'{name[:60]} {gaps[name] / wall:.1%}' for name in largest)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="a small model")
    parser.add_argument("--device", default="cuda", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--micro_batch", type=int, default=64, help="default %(default)s")
    parser.add_argument("--nanogpt", type=Path, help="folder with nanoGPT's model.py")
    given = parser.parse_args()
    device = devices.select_device(given.device)
    precision = devices.resolve_precision("auto", device)
    sizes = TOY if given.toy else LARGE
    asked = argparse.Namespace(**vars(given) | sizes | {"precision": precision})
    print(header(device, "transformers"))
    ceiling = ceilings(device, devices.DTYPES[precision], 256 if given.toy else 8192)
    n_tokens = asked.samples * asked.n_positions
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(device, given.rounds, n_tokens, ceiling)
        for title, some in (("GPT-2 124M", dense), ("8 experts, 2 a token", experts)):
            print(f"{title}, {precision}, {n_tokens:,} tokens a step, {asked.micro_batch} samples at a time")
            sides.run(dict(some(asked, Path(folder), device)))
        # `auto` takes a kernel whose gradients are the same bits every time; which may not be the fastest.
        repeatable = (f"this, compiled, {backend}" for backend in auto_candidates(device_info(device)))
        taken = next((name for name in repeatable if name in sides.times), "this, compiled")
        for name in dict.fromkeys((sides.fastest("this, compiled"), taken)):
            sides.judge_mfu(name, GOAL_MFU)
            sides.judge("nanogpt, compiled", name, GOAL_NANOGPT, least=True)
            sides.judge("transformers, compiled", name, 1.0, least=True)
        sides.judge("MoE", "twin", BAR_TWIN, least=False)
        for work in (memory, kernels):
            work(asked, Path(folder), device)
            forget(device)
    if sides.failed:
        raise SystemExit("what is marked FAILED is a defect")


if __name__ == "__main__":
    main()
