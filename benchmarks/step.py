"""A training step beside what a user would take instead: Transformers, nanoGPT, nanoMoE, and a MoE's dense twin.

    python benchmarks/step.py --nanogpt PATH --nanomoe PATH | tee benchmarks/results/step.txt

One step is forward, backward, clipping and AdamW on a global batch, of 6 layers, 384 wide, context 256. Ours is the
loop's own step, its batches read from disk, its metrics kept. The others hold one batch in memory, compute under
autocast, and have fused AdamW. "large pages" is PyTorch's own THP_MEM_ALLOC_ENABLE=1, "kept memory" glibc told by
MALLOC_MMAP_MAX_=0 to keep what is freed, as ours does by itself: who knows of them may set them. PATHs are folders with
their `model.py`; without, they are left out. Each side has a process of its own, so that none has what another asked
of the allocator, and they take turns; a figure is the median over the rounds, and so is a ratio of two figures of one
round. Memory is the peak of a later step in a fresh process, beyond what its imports took.
"""

from __future__ import annotations

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

from training import device as devices
from training.config import Config
from training.data import prepare
from training.distributed.world import World
from training.engine.build import begin
from training.engine.step import train_step
from training.model import GPT
from training.twin import twin
from training.weights import hf

Step = Callable[[], object]
WARM = 12  # steps before those that count
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
    """A micro-batch as it is written."""
    return argument if argument == "auto" else int(argument)


def text(folder: Path) -> Path:
    """A file to learn from; which one does not matter to speed."""
    path = folder / "text.txt"
    if not path.exists():
        path.write_text("".join(f"{n} and {n} are {n + n}.\n" for n in range(20000)))
    return path


def options(model: dict, asked: argparse.Namespace, folder: Path, optim: str = "adamw", **parallel: object) -> Config:
    """A run of ours: `model` is what its section holds beside the sizes, `parallel` what its section holds."""
    sizes = {name: getattr(asked, name) or value for name, value in SIZES.items()}
    return Config.model_validate(
        {
            "name": "run",
            "out_dir": str(folder / "runs"),
            "steps": 1000,
            "batch_tokens": asked.samples * sizes["n_positions"],
            "micro_batch": asked.micro_batch,
            "precision": asked.precision,
            "model": sizes | {"vocab_size": asked.vocab_size} | model,
            "data": {
                "sources": [{"paths": [str(text(folder))]}],
                "tokenizer": {"type": "byte"},
                "cache_dir": str(folder / "cache"),
            },
            "optim": {"type": optim},
            "eval": {"tokens": 1024, "prompts": []},
            "logging": {"tensorboard": False},
            "parallel": {"device": asked.device} | parallel,
        }
    )


def ours(config: Config, device: torch.device) -> Step:
    """The loop's own step."""
    with redirect_stdout(sys.stderr):
        run = begin(config, prepare(config.data), World(0, 1, device), "never")
    run.close()

    def step() -> None:
        train_step(run)
        if run.step % config.logging.every == 0:
            run.metrics.fetch()

    step.run = run
    return step


def theirs(model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], config: Config, device: torch.device) -> Step:
    """A step as their users write it."""
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)
    generator = torch.Generator().manual_seed(0)
    sections = config.model
    shape = (config.batch_tokens // sections.n_positions, sections.n_positions + 1)
    text = torch.randint(0, 256, shape, generator=generator).to(device)
    tokens_BT, targets_BT = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    at_a_time = len(text) if config.micro_batch == "auto" else config.micro_batch
    dtype = devices.DTYPES[config.precision]
    cast = partial(torch.autocast, device.type, dtype) if dtype != torch.float32 else nullcontext

    def step() -> None:
        for tokens_bT, targets_bT in zip(tokens_BT.split(at_a_time), targets_BT.split(at_a_time), strict=True):
            with cast():
                loss = loss_of(tokens_bT, targets_bT) * (len(tokens_bT) / len(text))
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    return step


def transformers_side(config: Config, device: torch.device, *, compiled: bool = False) -> Step:
    """The class that Transformers has for this model: the one that our export of it opens as."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    vocab_size = config.model.vocab_size
    with tempfile.TemporaryDirectory() as folder:
        weights = GPT(config.model).init_weights(0).state_dict()
        hf.write_model(Path(folder), weights, config.model, vocab_size - 1)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).train()
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        assert not getattr(model.config, name, 0)
    called = torch.compile(model) if compiled else model

    def loss_of(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:  # noqa: ARG001 (it shifts by itself)
        return called(tokens_BT, labels=tokens_BT, use_cache=False).loss

    return theirs(model, loss_of, config, device)


def from_folder(path: Path, config: Config, device: torch.device, *, compiled: bool, **more: object) -> Step:
    """nanoGPT's model, or nanoMoE's, from the folder with its `model.py`."""
    sys.path.insert(0, str(path))
    for name in ("model", "manager"):
        sys.modules.pop(name, None)
    from model import GPT, GPTConfig

    section = config.model
    sizes = {name: getattr(section, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size", "bias")}
    with redirect_stdout(sys.stderr):
        model = GPT(GPTConfig(block_size=section.n_positions, dropout=0.0, **sizes, **more))
    sys.path.remove(str(path))
    called = torch.compile(model) if compiled else model

    def loss_of(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return called(tokens_BT, targets_BT)[1]

    return theirs(model, loss_of, config, device)


def dense_sides(asked: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Callable[[], Step]]:
    """GPT-2 as it is, everywhere."""
    config = options(GPT2, asked, folder)
    sides = {
        "this": lambda: ours(config, device),
        "this, compiled": lambda: ours(options(GPT2, asked, folder, compile=True), device),
        "transformers": lambda: transformers_side(config, device),
    }
    if asked.nanogpt:
        sides["nanogpt"] = lambda: from_folder(asked.nanogpt, config, device, compiled=False)
        sides["nanogpt, compiled"] = lambda: from_folder(asked.nanogpt, config, device, compiled=True)
        if device.type == "cpu":
            for name in ENVIRONMENT:
                sides[f"nanogpt, compiled, {name}"] = sides["nanogpt, compiled"]
    return sides


def moe_sides(asked: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Callable[[], Step]]:
    """Experts in every layer, SwiGLU as Transformers has them; those of nanoMoE are GELU, four times as wide."""
    experts = LLAMA | {"blocks": [{"ffn": SWIGLU}]}
    config = options(experts, asked, folder)
    sides = {
        "this": lambda: ours(config, device),
        "this, compiled": lambda: ours(options(experts, asked, folder, compile=True), device),
        "its dense twin": lambda: ours(twin(config), device),
        "transformers": lambda: transformers_side(config, device),
    }
    if asked.nanomoe:
        wide = options(LLAMA | {"position": "learned", "norm": "layernorm", "blocks": [{"ffn": GELU}]}, asked, folder)
        shipped = {"n_exp": 8, "top_k": 2, "stride": 1, "use_aux_loss": True, "use_router_z_loss": True}
        sides["this, as nanomoe"] = lambda: ours(wide, device)
        sides["nanomoe"] = lambda: from_folder(asked.nanomoe, wide, device, compiled=False, **shipped)
    return sides


SIDES = {"dense": dense_sides, "moe": moe_sides}
# Of what is compared: one side's time over another's, its bar, and whether that is the least or the most.
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


def sides_of(kind: str, asked: argparse.Namespace, folder: Path, device: torch.device) -> dict[str, Callable]:
    """Those that are asked for."""
    found = SIDES[kind](asked, folder, device)
    return {name: make for name, make in found.items() if not (asked.uncompiled and "compiled" in name)}


def compare(kind: str, asked: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """Print each side's time, and the ratios that have bars."""
    n_tokens = asked.samples * (asked.n_positions or SIZES["n_positions"])
    print(f"{kind}, {asked.precision}, vocabulary {asked.vocab_size:,}, {n_tokens:,} tokens, {asked.rounds} rounds")
    times: Times = {name: [] for name in sides_of(kind, asked, folder, device)}
    with ExitStack() as at_end:
        workers = {
            name: at_end.enter_context(Worker(__file__, *sys.argv[1:], "--side", kind, name, env=environment(name)))
            for name in times
        }
        for _ in range(asked.rounds):
            for name, worker in workers.items():
                times[name].append(worker.seconds())
    for name, seconds in times.items():
        print(line(name, seconds, n_tokens))
    for one, other, bar, least in BARS[kind]:
        if one in times and other in times:
            print(f"    {one} / {other}: {against(ratio(times, one, other), bar, least=least)}", flush=True)


def environment(side: str) -> dict[str, str]:
    """What a side's users would have set."""
    return ENVIRONMENT.get(side.rpartition(", ")[2], {})


def take_turns(step: Step, device: torch.device) -> None:
    """In a process of a side: a step for every line that comes, and its seconds.

    The first do not count: until then kept memory grows, and numbers of an expert's rows are new, each of which has a
    program written for it.
    """
    for _ in range(WARM):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        print("took", seconds_of(step, device), flush=True)


def memory(kind: str, asked: argparse.Namespace, folder: Path, device: torch.device) -> None:
    """Print each side's peak, found in a process of its own."""
    names = sides_of(kind, asked, folder, device)
    peaks = {name: in_a_process(__file__, *sys.argv[1:], "--peak", kind, name, env=environment(name)) for name in names}
    print(f"{kind}: GiB at the peak of a step: {', '.join(f'{name} {gib:.2f}' for name, gib in peaks.items())}")
    if kind == "dense":
        print(
            f"    this / transformers: {against(peaks['this'] / peaks['transformers'], 0.5, least=False)}", flush=True
        )


def peak_of(kind: str, name: str, asked: argparse.Namespace, folder: Path, device: torch.device) -> float:
    """GiB of a side, in this fresh process."""
    before = used_gib(device)
    step = SIDES[kind](asked, folder, device)[name]()
    for _ in range(WARM):
        step()
    return peak_gib(step, device, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIDES, help="one of the comparisons")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each side (default %(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="of the global batch (default %(default)s)")
    parser.add_argument("--micro_batch", type=samples, default="auto", help="of ours (default %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=50304, help="default %(default)s")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"default {value}")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="default %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu (default %(default)s)")
    parser.add_argument("--nanogpt", type=Path, help="folder with nanoGPT's model.py")
    parser.add_argument("--nanomoe", type=Path, help="folder with nanoMoE's model.py")
    parser.add_argument("--uncompiled", action="store_true", help="leave out what compiles")
    parser.add_argument("--no_memory", action="store_true", help="leave the peaks out")
    for what in ("--peak", "--side"):
        parser.add_argument(what, nargs=2, metavar=("KIND", "SIDE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    device = devices.select_device(asked.device)
    asked.precision = devices.resolve_precision(asked.precision, device)
    with tempfile.TemporaryDirectory() as folder:
        if asked.peak:
            print(peak_of(*asked.peak, asked, Path(folder), device))
            return
        if asked.side:
            kind, name = asked.side
            take_turns(sides_of(kind, asked, Path(folder), device)[name](), device)
            return
        print(header(device, "transformers"))
        for kind in SIDES if asked.only is None else [asked.only]:
            compare(kind, asked, Path(folder), device)
            if not asked.no_memory:
                memory(kind, asked, Path(folder), device)


if __name__ == "__main__":
    main()
