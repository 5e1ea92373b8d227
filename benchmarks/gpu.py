"""Benchmark an accelerator: its peak rates, GPT-2 124M, a MoE beside its dense twin, memory, and a profile of a step.

    bash benchmarks/cuda.sh                        checks correctness first, then runs this
    python benchmarks/gpu.py --toy --device cpu   tests this file: the figures of so small a model mean nothing

Variants run one after the other, each alone in memory; a figure is the median over the rounds. MFU divides the FLOPs of
the active parameters by the rate of an 8192 x 8192 x 8192 matmul measured in the same run, not by a data sheet's.
"""

import argparse
import gc
import statistics
import tempfile
import traceback
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import step as steps
import torch
from common import Times, against, header, peak_gib, ratio, turns, used_gib
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from training import device as devices
from training.config import Config
from training.errors import UserError
from training.kernels.attention.table import ATTENTION_BACKENDS, auto_candidates, device_info, limits_on
from training.kernels.table import LOSS_KERNELS, candidates
from training.model import model_stats
from training.twin import twin

LARGE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024, "samples": 256, "vocab_size": 50304}
TOY = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "samples": 4, "vocab_size": 512}
GOAL_MFU, GOAL_NANOGPT, BAR_TWIN = 0.6, 1.1, 1.12
SHAPES_OF_EXPERTS = ((8, 2), (64, 8))  # experts, and those of a token: together as wide as the twin
# In the names of matmul and attention kernels.
PRODUCTS = ("mm", "gemm", "nvjet", "cutlass", "xmma", "flash", "fmha", "attention")
FUSED = ("triton_poi", "triton_red", "triton_per")  # in the names of kernels that the compiler fused
WAITS = "DtoH"  # in the names of copies to the host, for which it waits


def rate(work: Callable[[], object], amount: float, device: torch.device) -> float:
    """Return the amount per second, in the best of ten rounds."""
    return amount / min(turns({"it": work}, 10, device, warm=3)["it"])


def ceilings(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """Print the highest rates that the device reaches; return those of a matmul, in FLOP/s."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    flops = rate(lambda: a @ b, 2 * n**3, device)
    source = torch.empty(n * n * 4, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copied = rate(lambda: target.copy_(source), 2 * source.numel(), device)
    print(f"ceilings: a product of {n}^3 {flops / 1e12:.1f} TFLOP/s, a copy {copied / 1e9:.0f} GB/s", flush=True)
    return flops


def flops_of(config) -> float:
    """Return the FLOPs of one token, forward and backward."""
    return model_stats(config.model).flops_per_token


def free_memory(device: torch.device) -> None:
    """Free the memory of the variant before."""
    torch._dynamo.reset()  # else all variants count towards the compiler's limit per function
    gc.collect()  # a compiled module is part of a cycle
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


class Variants:
    """Variants that are compared, one at a time in memory. One that cannot run here is printed with the reason."""

    def __init__(self, device: torch.device, rounds: int, n_tokens: int, ceiling: float):
        self.device, self.rounds, self.n_tokens, self.ceiling = device, rounds, n_tokens, ceiling
        self.times: Times = {}
        self.flops: dict[str, float] = {}
        self.failed = False

    def run(self, variants: dict[str, tuple[Callable[[], steps.Step], float]]) -> None:
        """Time each variant, given a function that builds it and its FLOPs per token, and print its line."""
        for name, (make, flops) in variants.items():
            self.flops[name] = flops
            try:
                self.times |= turns({name: make()}, self.rounds, self.device, warm=2)
                self.print_line(name)
            except UserError as error:  # a package or a kernel is missing
                print(f"    {name:<34} not here: {' '.join(str(error).split())[:110]}", flush=True)
            except Exception as error:
                print(f"    {name:<34} FAILED: {' '.join(str(error).split())[:110]}", flush=True)
                traceback.print_exc()
                self.failed = True
            finally:
                free_memory(self.device)

    def print_line(self, name: str) -> None:
        """Print tokens/s, best and worst time, MFU, and on CUDA the peak memory of a variant."""
        seconds = self.times[name]
        speed, spread = self.n_tokens / statistics.median(seconds), f"{min(seconds):.4f} to {max(seconds):.4f} s"
        gib = f"  {torch.cuda.max_memory_allocated() / 2**30:5.1f} GiB" if self.device.type == "cuda" else ""
        print(f"    {name:<34} {speed:10,.0f} tokens/s  ({spread})  MFU {self.mfu(name):6.1%}{gib}", flush=True)

    def mfu(self, name: str) -> float:
        """Return the MFU of a variant."""
        return self.n_tokens * self.flops[name] / statistics.median(self.times[name]) / self.ceiling

    def judge(self, one: str, other: str, bar: float, *, least: bool) -> None:
        """Print the ratio of two variants' times beside its bar."""
        if one in self.times and other in self.times:
            print(f"    {one} / {other}: {against(ratio(self.times, one, other), bar, least=least)}", flush=True)
        else:
            print(f"    {one} / {other}: not judged, as one is not there", flush=True)

    def judge_mfu(self, name: str, goal: float) -> None:
        """Print the MFU of a variant beside its goal."""
        if name in self.times:
            print(f"    MFU of {name}: {against(self.mfu(name), goal, least=True)}", flush=True)

    def fastest(self, prefix: str) -> str:
        """Return the variant with the shortest median time whose name starts with `prefix`."""
        medians = {name: statistics.median(seconds) for name, seconds in self.times.items() if name.startswith(prefix)}
        return min(medians, key=medians.__getitem__, default=prefix)


def dense(args: argparse.Namespace, folder: Path, device: torch.device) -> Iterator[tuple[str, tuple]]:
    """Yield GPT-2: plain; compiled with each attention back-end, each loss and Muon; Transformers' and nanoGPT's."""
    plain = steps.options(steps.GPT2, args, folder)
    flops = flops_of(plain)
    yield "this", (lambda: steps.ours(plain, device), flops)
    here = [
        name for name in ATTENTION_BACKENDS if name != "reference" and limits_on(name, device_info(device)) is not None
    ]
    for backend in here[: 1 if args.toy else None]:
        config = steps.options(steps.GPT2, args, folder, compile=True, attention=backend)
        yield f"this, compiled, {backend}", (lambda config=config: steps.ours(config, device), flops)
    for loss in LOSS_KERNELS:
        config = steps.options(steps.GPT2, args, folder, compile=not args.toy, loss=loss)
        yield f"this, compiled, loss {loss}", (lambda config=config: steps.ours(config, device), flops)
    muon = steps.options(steps.GPT2, args, folder, optim="muon", compile=not args.toy)
    yield "this, compiled, Muon", (lambda: steps.ours(muon, device), flops)
    yield "transformers, compiled", (lambda: steps.transformers_side(plain, device, compiled=not args.toy), flops)
    if args.nanogpt:
        yield "nanogpt, compiled", (lambda: steps.from_folder(args.nanogpt, plain, device, compiled=True), flops)


def experts(args: argparse.Namespace, folder: Path, device: torch.device) -> Iterator[tuple[str, tuple]]:
    """Yield a dense model and the 8 and the 64 experts that it is the twin of, by kernel; Transformers with 8 experts.

    Transformers keeps several copies of all logits, so it gets a quarter of the micro-batch.
    """

    def config_of(n_experts: int, top_k: int, **parallel: object) -> Config:
        ffn = steps.SWIGLU | {"n_experts": n_experts, "top_k": top_k, "hidden": 4 * args.n_embd // top_k}
        model = steps.LLAMA | {"blocks": [{"ffn": ffn}]}
        return steps.options(model, args, folder, compile=not args.toy, **parallel)

    eight = config_of(*SHAPES_OF_EXPERTS[0])
    dense = twin(eight)
    yield "twin", (lambda: steps.ours(dense, device), flops_of(dense))
    kernels = [name for name in candidates("experts", device, devices.DTYPES[args.precision]) if name != "reference"]
    for (n_experts, top_k), kernel in product(SHAPES_OF_EXPERTS, kernels):
        config = config_of(n_experts, top_k, experts=kernel)
        yield f"{n_experts} experts, {kernel}", (lambda config=config: steps.ours(config, device), flops_of(config))
    fewer = eight.model_copy(update={"micro_batch": max(1, args.micro_batch // 4)})
    yield "transformers, 8", (lambda: steps.transformers_side(fewer, device, compiled=False), flops_of(eight))


def memory(args: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """Print the micro-batch that fits, and the peak memory of a step with it."""
    before = used_gib(device)
    larger = argparse.Namespace(**vars(args) | {"micro_batch": "auto", "samples": 2 * args.samples})
    step = steps.ours(steps.options(steps.GPT2, larger, folder), device)
    step()
    fits = step.run.micro_batch
    print(
        f"memory: {fits} samples fit at a time; {peak_gib(step, device, before):.2f} GiB at the peak of a step",
        flush=True,
    )


def kernels(args: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """Print the kernels of a compiled step, the longest first, the host's waits, and the three largest gaps."""
    on_device = device.type == "cuda"
    step = steps.ours(steps.options(steps.GPT2, args, folder, compile=on_device), device)
    for _ in range(3):
        step()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_device) as profiler:
        (wall,) = turns({"step": step}, 1, device, warm=0)["step"]
    # An operation of the host has the time of its kernels as well: these alone are counted.
    where, which = (DeviceType.CUDA, "self_device_time_total") if on_device else (DeviceType.CPU, "self_cpu_time_total")
    averages = profiler.key_averages()
    time_and_count = {
        event.key: (getattr(event, which) / 1e6, event.count)
        for event in sorted(averages, key=lambda event: -getattr(event, which))
        if event.device_type == where and not event.is_user_annotation
    }
    busy = sum(seconds for seconds, _ in time_and_count.values())
    print(f"a step: {wall:.4f} s, of which {busy:.4f} s in kernels")
    for name, (seconds, count) in list(time_and_count.items())[:20]:
        print(f"    {seconds / wall:6.1%} {1e3 * seconds:9.3f} ms {count:5} x  {name[:80]}")
    waits = sum(event.count for event in averages if WAITS in event.key)
    print(f"    waits of the host: {waits} (one is whether the step is taken)")
    gaps = {
        name: seconds
        for name, (seconds, _) in time_and_count.items()
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
    parsed = parser.parse_args()
    device = devices.select_device(parsed.device)
    precision = devices.resolve_precision("auto", device)
    sizes = TOY if parsed.toy else LARGE
    args = argparse.Namespace(**vars(parsed) | sizes | {"precision": precision})
    print(header(device, "transformers"))
    ceiling = ceilings(device, devices.DTYPES[precision], 256 if parsed.toy else 8192)
    n_tokens = args.samples * args.n_positions
    with tempfile.TemporaryDirectory() as folder:
        variants = Variants(device, parsed.rounds, n_tokens, ceiling)
        for title, build in (("GPT-2 124M", dense), ("experts and their dense twin", experts)):
            print(f"{title}, {precision}, {n_tokens:,} tokens a step, {args.micro_batch} samples at a time")
            variants.run(dict(build(args, Path(folder), device)))
        # `auto` chooses a kernel whose gradients repeat their bits, which may not be the fastest one.
        deterministic = (f"this, compiled, {backend}" for backend in auto_candidates(device_info(device)))
        chosen = next((name for name in deterministic if name in variants.times), "this, compiled")
        for name in dict.fromkeys((variants.fastest("this, compiled"), chosen)):
            variants.judge_mfu(name, GOAL_MFU)
            variants.judge("nanogpt, compiled", name, GOAL_NANOGPT, least=True)
            variants.judge("transformers, compiled", name, 1.0, least=True)
        for n_experts, _ in SHAPES_OF_EXPERTS:
            variants.judge(variants.fastest(f"{n_experts} experts"), "twin", BAR_TWIN, least=False)
        for work in (memory, kernels):
            work(args, Path(folder), device)
            free_memory(device)
    if variants.failed:
        raise SystemExit("a line marked FAILED is a defect")


if __name__ == "__main__":
    main()
