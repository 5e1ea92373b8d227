"""Compare a training step with Transformers, nanoGPT, nanoMoE, and a MoE's dense twin.

    python benchmarks/step.py --nanogpt PATH --nanomoe PATH | tee benchmarks/results/step.txt

One step is forward, backward, clipping and AdamW on a global batch: 6 layers of width 384, context 256. Our side is
the training loop's own step, with batches read from disk and metrics collected. The others hold one batch in memory,
compute under autocast and use fused AdamW. "large pages" sets PyTorch's THP_MEM_ALLOC_ENABLE=1; "kept memory" sets
MALLOC_MMAP_MAX_=0, so that glibc keeps freed memory, as our package does by default. PATHs are folders with nanoGPT's
and nanoMoE's `model.py`; without them these sides are left out.

Each side has a process of its own, so that allocator settings do not affect the others, and they take turns. A figure
is the median over rounds, a ratio the median of the ratios within each round. Memory is the peak of a later step in a
fresh process, without its imports.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path

import torch
from common import Times, Worker, against, header, in_a_process, line, peak_gib, ratio, seconds_of, used_gib
from torch import Tensor, nn
from training_run import TrainingRun

from training import device as devices
from training.config import Config
from training.model import GPT, init_weights
from training.twin import twin
from training.weights import hf

Step = Callable[[], object]
WARM = 12  # warm-up steps
SIZES = {"n_layer": 6, "n_head": 6, "n_embd": 384, "n_positions": 256}
GPT2 = {"position": "learned", "norm": "layernorm", "bias": True}
LLAMA = {"position": "rope", "norm": "rmsnorm", "bias": False}
ENVIRONMENT = {
    "large pages": {"THP_MEM_ALLOC_ENABLE": "1"},
    "kept memory": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)},
}
SWIGLU = {"type": "moe", "n_experts": 8, "top_k": 2, "hidden": 768, "activation": "silu", "gated": True}
GELU = {"type": "moe", "n_experts": 8, "top_k": 2, "hidden": 1536, "activation": "gelu"}


def samples(argument: str) -> int | str:
    """Parse a micro-batch."""
    return argument if argument == "auto" else int(argument)


def text(folder: Path) -> Path:
    """Write a text file, if it is missing, and return its path; its content does not affect speed."""
    path = folder / "text.txt"
    if not path.exists():
        path.write_text("".join(f"{n} and {n} are {n + n}.\n" for n in range(20000)))
    return path


def options(model: dict, args: argparse.Namespace, folder: Path, optim: str = "adamw", **parallel: object) -> Config:
    """Return a run's config; `model` and `parallel` are options of these sections, the sizes come from `args`."""
    sizes = {name: getattr(args, name) or value for name, value in SIZES.items()}
    return Config.model_validate(
        {
            "name": "run",
            "out_dir": str(folder / "runs"),
            "steps": 1000,
            "batch_tokens": args.samples * sizes["n_positions"],
            "micro_batch": args.micro_batch,
            "precision": args.precision,
            "model": sizes | {"vocab_size": args.vocab_size} | model,
            "data": {
                "sources": [{"paths": [str(text(folder))]}],
                "tokenizer": {"type": "byte"},
                "cache_dir": str(folder / "cache"),
            },
            "optim": {"type": optim},
            "eval": {"tokens": 1024, "prompts": []},
            "logging": {"tensorboard": False},
            "parallel": {"device": args.device} | parallel,
        }
    )


def ours(config: Config, device: torch.device) -> Step:
    """Return the training loop's own step; the run is its attribute `run`."""
    run = TrainingRun(config, device)

    def step() -> None:
        run.step()

    step.run = run
    return step


def theirs(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], config: Config, device: torch.device) -> Step:
    """Return a step as users of Transformers or nanoGPT write it."""
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    n_positions = config.model.n_positions
    shape = (config.batch_tokens // n_positions, n_positions + 1)
    text = torch.randint(0, 256, shape, generator=generator).to(device)
    tokens_BT, targets_BT = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    micro_batch = len(text) if config.micro_batch == "auto" else config.micro_batch
    dtype = devices.DTYPES[config.precision]
    cast = partial(torch.autocast, device.type, dtype) if dtype != torch.float32 else nullcontext

    def step() -> None:
        for tokens_bT, targets_bT in zip(tokens_BT.split(micro_batch), targets_BT.split(micro_batch), strict=True):
            with cast():
                loss = loss_of(tokens_bT, targets_bT) * (len(tokens_bT) / len(text))
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def transformers_side(config: Config, device: torch.device, *, compiled: bool = False) -> Step:
    """Return a step of Transformers' class for this model: the class that our export opens as."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    vocab_size = config.model.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        weights = init_weights(GPT(config.model), 0).state_dict()
        hf.write_model(Path(folder), weights, config.model, vocab_size - 1)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        assert not getattr(model.config, name, 0)
    called = torch.compile(model) if compiled else model

    def loss_of(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:  # noqa: ARG001 (Transformers shifts the labels itself)
        return called(tokens_BT, labels=tokens_BT, use_cache=False).loss

    return theirs(model, loss_of, config, device)


def from_folder(path: Path, config: Config, device: torch.device, *, compiled: bool, **more: object) -> Step:
    """Return a step of nanoGPT's or nanoMoE's model, from the folder with its `model.py`."""
    sys.path.insert(0, str(path))
    for name in ("model", "manager"):
        sys.modules.pop(name, None)
    from model import GPT, GPTConfig

    sizes = {name: getattr(config.model, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "bias")}
    with redirect_stdout(sys.stderr):
        model = GPT(GPTConfig(block_size=config.model.n_positions, dropout=0.0, **sizes, **more))
    sys.path.remove(str(path))
    called = torch.compile(model) if compiled else model

    def loss_of(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return called(tokens_BT, targets_BT)[1]

    return theirs(model, loss_of, config, device)


def dense_sides(args: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Callable[[], Step]]:
    """Return the sides that train GPT-2 unchanged."""
    config = options(GPT2, args, folder)
    sides = {
        "this": lambda: ours(config, device),
        "this, compiled": lambda: ours(options(GPT2, args, folder, compile=True), device),
        "transformers": lambda: transformers_side(config, device),
    }
    if args.nanogpt:
        sides["nanogpt"] = lambda: from_folder(args.nanogpt, config, device, compiled=False)
        sides["nanogpt, compiled"] = lambda: from_folder(args.nanogpt, config, device, compiled=True)
        if device.type == "cpu":
            for name in ENVIRONMENT:
                sides[f"nanogpt, compiled, {name}"] = sides["nanogpt, compiled"]
    return sides


def moe_sides(args: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Callable[[], Step]]:
    """Return the sides with experts in every layer: SwiGLU as in Transformers, and wide GELU as in nanoMoE."""
    experts = LLAMA | {"blocks": [{"ffn": SWIGLU}]}
    config = options(experts, args, folder)
    sides = {
        "this": lambda: ours(config, device),
        "this, compiled": lambda: ours(options(experts, args, folder, compile=True), device),
        "its dense twin": lambda: ours(twin(config), device),
        "transformers": lambda: transformers_side(config, device),
    }
    if args.nanomoe:
        wide = options(LLAMA | {"position": "learned", "norm": "layernorm", "blocks": [{"ffn": GELU}]}, args, folder)
        shipped = {"n_exp": 8, "top_k": 2, "stride": 1, "use_aux_loss": True, "use_router_z_loss": True}
        sides["this, as nanomoe"] = lambda: ours(wide, device)
        sides["nanomoe"] = lambda: from_folder(args.nanomoe, wide, device, compiled=False, **shipped)
    return sides


SIDES = {"dense": dense_sides, "moe": moe_sides}
# Ratios of one side's time to another's: (one, other, bar, True if at least the bar, False if at most).
BARS = {
    "dense": [
        ("transformers", "this", 1.8, True),
        ("transformers", "this, compiled", 1.8, True),
        ("nanogpt, compiled", "this, compiled", 1.2, True),
        ("nanogpt, compiled, large pages", "this, compiled", 1.2, True),
        ("nanogpt, compiled, kept memory", "this, compiled", 1.2, True),
    ],
    "moe": [
        ("this", "its dense twin", 1.25, False),
        ("transformers", "this", 1.5, True),
        ("nanomoe", "this, as nanomoe", 4.0, True),
    ],
}


def sides_of(kind: str, args: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Callable]:
    """Return the sides of a comparison, without compiled ones under --uncompiled."""
    sides = SIDES[kind](args, folder, device)
    return {name: make for name, make in sides.items() if not (args.uncompiled and "compiled" in name)}


def compare(kind: str, args: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """Print each side's time, and the ratios beside their bars."""
    n_tokens = args.samples * (args.n_positions or SIZES["n_positions"])
    print(f"{kind}, {args.precision}, vocabulary {args.vocab_size:,}, {n_tokens:,} tokens, {args.rounds} rounds")
    times: Times = {name: [] for name in sides_of(kind, args, folder, device)}
    with ExitStack() as at_end:
        workers = {
            name: at_end.enter_context(Worker(__file__, *sys.argv[1:], "--side", kind, name, env=environment(name)))
            for name in times
        }
        for _ in range(args.rounds):
            for name, worker in workers.items():
                times[name].append(worker.seconds())
    for name, seconds in times.items():
        print(line(name, seconds, n_tokens))
    for one, other, bar, least in BARS[kind]:
        if one in times and other in times:
            print(f"    {one} / {other}: {against(ratio(times, one, other), bar, least=least)}", flush=True)


def environment(side: str) -> dict[str, str]:
    """Return the environment variables of a side."""
    return ENVIRONMENT.get(side.rpartition(", ")[2], {})


def take_turns(step: Step, device: torch.device) -> None:
    """Run warm-up steps, then a step for every line on stdin; print its seconds. Runs in a side's process.

    During warm-up the kept memory still grows, and oneDNN generates code for each new row count of an expert.
    """
    for _ in range(WARM):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        print("took", seconds_of(step, device), flush=True)


def memory(kind: str, args: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """Print each side's peak memory, each in a process of its own."""
    names = sides_of(kind, args, folder, device)
    peaks = {name: in_a_process(__file__, *sys.argv[1:], "--peak", kind, name, env=environment(name)) for name in names}
    print(f"{kind}: GiB at the peak of a step: {', '.join(f'{name} {gib:.2f}' for name, gib in peaks.items())}")
    if kind == "dense":
        print(
            f"    this / transformers: {against(peaks['this'] / peaks['transformers'], 0.5, least=False)}", flush=True
        )


def peak_of(kind: str, name: str, args: argparse.Namespace, folder: Path, device: torch.device) -> float:
    """Return the peak GiB of a side's step, in this fresh process."""
    before = used_gib(device)
    step = SIDES[kind](args, folder, device)[name]()
    for _ in range(WARM):
        step()
    return peak_gib(step, device, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIDES, help="run one comparison")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default %(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="samples per step (default %(default)s)")
    parser.add_argument("--micro_batch", type=samples, default="auto", help="our micro-batch (default %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=50304, help="default %(default)s")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"default {value}")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="default %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default %(default)s)")
    parser.add_argument("--nanogpt", type=Path, help="folder with nanoGPT's model.py")
    parser.add_argument("--nanomoe", type=Path, help="folder with nanoMoE's model.py")
    parser.add_argument("--uncompiled", action="store_true", help="skip compiled sides")
    parser.add_argument("--no_memory", action="store_true", help="skip peak memory")
    for what in ("--peak", "--side"):
        parser.add_argument(what, nargs=2, metavar=("KIND", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = devices.select_device(args.device)
    args.precision = devices.resolve_precision(args.precision, device)
    with tempfile.TemporaryDirectory() as folder:
        if args.peak:
            print(peak_of(*args.peak, args, Path(folder), device))
            return
        if args.side:
            kind, name = args.side
            take_turns(sides_of(kind, args, Path(folder), device)[name](), device)
            return
        print(header(device, "transformers"))
        for kind in SIDES if args.only is None else [args.only]:
            compare(kind, args, Path(folder), device)
            if not args.no_memory:
                memory(kind, args, Path(folder), device)


if __name__ == "__main__":
    main()
