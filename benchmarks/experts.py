"""Benchmark a layer of experts beside a dense layer of the same FLOPs, and beside Transformers' experts.

    python benchmarks/experts.py --plot benchmarks/results/experts_memory.png | tee benchmarks/results/experts.txt

8 experts, top 2, SwiGLU, each half as wide as the dense layer: forward and backward in training, with gradients of all
weights and inputs. The layers take turns within one run; a figure is the median over the rounds, and a ratio is the
median of each round's ratio. Memory is the peak of a step in a fresh process beyond the memory in use before it.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import against, header, in_a_process, peak_gib, ratio, turns, used_gib
from torch import Tensor, nn

from training import device as devices
from training.config import MLPConfig, ModelConfig, MoEConfig, ParallelConfig
from training.kernels.choose import choose_kernels
from training.kernels.interface import ExpertsSpec, KernelRequirements
from training.kernels.table import EXPERT_KERNELS
from training.model.layers import FeedForwardContext
from training.model.mlp import MLP
from training.model.moe import MoE

BARS = {768: 1.15, 384: 1.3}  # by width: highest ratio of the layer's time to the dense layer's
BAR_RATE = 0.7  # on a GPU: lowest rate of FLOPs over the dense layer's
BAR_TRANSFORMERS = 1.4  # lowest ratio of Transformers' eager time to ours
MEMORY_TOKENS = [1024 * 2**i for i in range(7)]


def layers(width: int, device: torch.device, dtype: torch.dtype, only: str | None = None) -> dict[str, nn.Module]:
    """Build the compared layers by name, or one of them. "auto" uses the kernel that a run would choose."""
    model = ModelConfig(n_embd=width, n_head=1, bias=False)
    moe = MoEConfig(hidden=2 * width, activation="silu", gated=True)
    requirements = KernelRequirements(
        frozenset(), frozenset({ExpertsSpec(width, 2 * width, moe.n_experts, moe.top_k)}), False
    )
    choice = choose_kernels(ParallelConfig(), requirements, device=device, dtype=dtype)
    kernels = choice.kernels
    print(f"  auto: {choice.as_text()['experts']}")
    makers: dict[str, Callable[[], nn.Module]] = {
        "dense": lambda: MLP(MLPConfig(hidden=4 * width, activation="silu", gated=True), model, kernels),
        "auto": lambda: MoE(moe, model, kernels),
        "loop": lambda: MoE(moe, model, kernels._replace(experts=EXPERT_KERNELS["loop"])),
        "transformers, eager": lambda: transformers_layer(moe, width, "eager"),
        "transformers, grouped": lambda: transformers_layer(moe, width, "grouped_mm"),
    }
    built = {name: make() for name, make in makers.items() if only in (None, name)}
    for layer in built.values():
        generator = torch.Generator().manual_seed(0)
        for parameter in layer.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
        layer.to(device)
    for name, layer in built.items():
        if name.startswith("transformers"):
            layer.to(dtype)
    return built


def transformers_layer(moe: MoEConfig, width: int, implementation: str) -> nn.Module:
    """Build Qwen3-MoE's layer, which is the most similar to ours."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=width,
        moe_intermediate_size=moe.hidden,
        num_experts=moe.n_experts,
        num_experts_per_tok=moe.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    return Qwen3MoeSparseMoeBlock(config)


def output_of(layer: nn.Module, x_BTC: Tensor) -> Tensor:
    """Return the layer's output; as in training, the auxiliary loss is part of the graph."""
    if not isinstance(layer, MLP | MoE):
        y = layer(x_BTC)
        return y[0] if isinstance(y, tuple) else y
    y_BTC, routing = layer(x_BTC, FeedForwardContext(x_BTC[..., 0].numel()))
    return y_BTC if routing is None else y_BTC + routing.aux_loss.to(y_BTC.dtype)


def step(layer: nn.Module, x_BTC: Tensor, direction_BTC: Tensor) -> None:
    """Run a forward and a backward."""
    x_BTC = x_BTC.detach().requires_grad_()
    torch.autograd.backward(output_of(layer, x_BTC), direction_BTC)
    for parameter in layer.parameters():
        parameter.grad = None


def inputs(width: int, n_tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return random tokens, and the gradient of the result."""
    generator = torch.Generator().manual_seed(1)
    x, direction = (torch.randn(n_tokens // 256, 256, width, generator=generator) for _ in range(2))
    return x.to(device, dtype), direction.to(device, dtype)


def compare(width: int, n_tokens: int, rounds: int, device: torch.device, dtype: torch.dtype) -> None:
    """Print each layer's time, and the ratios beside their bars."""
    print(f"{width} channels, {n_tokens} tokens, {str(dtype).removeprefix('torch.')}, {rounds} rounds")
    sides = layers(width, device, dtype)
    x, direction = inputs(width, n_tokens, device, dtype)
    times = turns({name: partial(step, layer, x, direction) for name, layer in sides.items()}, rounds, device)
    for name, seconds in times.items():
        milliseconds = [1e3 * t for t in seconds]
        print(
            f"    {name:22} {statistics.median(milliseconds):8.1f} ms  ({min(milliseconds):.1f} to "
            f"{max(milliseconds):.1f}), {ratio(times, name, 'dense'):.2f} of the dense layer's"
        )
    ours, theirs = ratio(times, "auto", "dense"), ratio(times, "transformers, eager", "auto")
    rate = BAR_RATE if device.type == "cuda" else None
    for value, name, bar, least in (
        (ours, "of the dense layer's time", BARS.get(width), False),
        (1 / ours, "of the dense layer's rate of FLOPs, routing included", rate, True),
        (theirs, "of our time in Transformers' eager experts", BAR_TRANSFORMERS, True),
    ):
        text = f"{value:.4g}" if bar is None else against(value, bar, least=least)
        print(f"    {name}: {text}", flush=True)


def peak_of(name: str, width: int, n_tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak MiB of a second step, when caches are filled, beyond the memory in use before the first."""
    layer, tensors = layers(width, device, dtype, only=name)[name], inputs(width, n_tokens, device, dtype)
    step(layer, *inputs(width, 256, device, dtype))
    return 1024 * peak_gib(partial(step, layer, *tensors), device, used_gib(device))


def memory(path: Path, width: int, device: torch.device, precision: str) -> None:
    """Print and plot the peak memory of a step against the number of tokens."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    print(f"peak memory of a step, MiB, {width} channels: {', '.join(f'{n:,}' for n in MEMORY_TOKENS)} tokens")
    for name in ("dense", "auto", "transformers, eager"):
        options = ("--device", device.type, "--dtype", precision, "--peak", name, width)
        peaks = [in_a_process(__file__, *options, n) for n in MEMORY_TOKENS]
        print(f"    {name:22} {'  '.join(f'{mib:8.0f}' for mib in peaks)}", flush=True)
        axes.plot(MEMORY_TOKENS, peaks, marker="o", label="this" if name == "auto" else name)
    axes.set(
        xlabel="tokens",
        ylabel="MiB",
        xscale="log",
        yscale="log",
        title=f"Peak memory of a step: a layer of 8 experts, {width} channels",
    )
    axes.set_xticks(MEMORY_TOKENS, [f"{n // 1024}k" for n in MEMORY_TOKENS], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=list(BARS), help="channels (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=4096, help="multiple of 256 (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each layer (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default %(default)s)")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="default %(default)s")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--plot", type=Path, help="draw memory against tokens into this PNG")
    parser.add_argument("--peak", nargs=3, metavar=("LAYER", "WIDTH", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tokens < 256 or args.tokens % 256:
        parser.error(f"--tokens: {args.tokens} is no multiple of 256")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = devices.select_device(args.device)
    dtype = devices.DTYPES[devices.resolve_precision(args.dtype, device)]
    if args.peak:
        name, width, n_tokens = args.peak
        print(peak_of(name, int(width), int(n_tokens), device, dtype))
        return
    print(header(device, "transformers"))
    devices.keep_freed_memory(device)  # as a run does
    for width in args.width:
        compare(width, args.tokens, args.rounds, device, dtype)
    if args.plot:
        memory(args.plot, 384, device, args.dtype)


if __name__ == "__main__":
    main()
