"""The loss in Triton: run by the interpreter on a CPU, compiled for GPUs, chosen.

The tests also run this file as a program, `interpret FILE` or `compile FILE`, which writes its results to FILE.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from test_triton_experts import Launch, file_of, other_process

from training.config import ParallelConfig
from training.errors import UserError
from training.kernels.choose import choose_kernels
from training.kernels.interface import KernelRequirements, LossSpec
from training.kernels.loss import chunked_cross_entropy
from training.kernels.table import LOSS_KERNELS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHUNK_BYTES = (12, 2**28)  # three tokens per chunk
TOLERANCE = {"fp32": 1e-6, "bf16": 1e-2, "fp16": 2e-3}


class Case(NamedTuple):
    """Tokens, some without a target, and a vocabulary."""

    n_tokens: int
    n_vocab: int
    softcap: float | None = None
    factor: float = 1.0  # of the logits
    n_padding: int = 0  # rows beyond the vocabulary

    def inputs(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        sizes = (self.n_tokens, self.n_vocab + self.n_padding)
        x, w = (torch.randn(n, 16, generator=generator).to(dtype) for n in sizes)
        targets = torch.randint(0, self.n_vocab, (self.n_tokens,), generator=generator)
        targets[1::3] = -1
        targets[0] = self.n_vocab - 1
        return x * self.factor, w, targets


# A program processes 8192 logits per step.
CASES = {
    "less than a block": Case(5, 50),
    "one token": Case(1, 3),
    "a block": Case(4, 8192),
    "blocks and a part": Case(7, 17001),
    "soft-capped": Case(7, 9000, softcap=4.0),
    "beyond exp": Case(6, 60, factor=100.0),
    "padded": Case(5, 8190, softcap=4.0, n_padding=9),  # the last block is all padding
}
RUN = [(name, kind) for name in CASES for kind in ("fp32", "bf16") if (name, kind) != ("beyond exp", "bf16")]
RUN.append(("blocks and a part", "fp16"))


def outcome(loss, case: Case, inputs, *, gradient: bool = True) -> dict[str, torch.Tensor]:
    """Return the loss and its gradients by name."""
    x, w, targets = inputs
    if not gradient:
        with torch.no_grad():
            return {"loss": loss(x, w, targets, case.softcap, case.n_vocab)}
    leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
    total = loss(*leaves, targets, case.softcap, case.n_vocab)
    grads = torch.autograd.grad(total, leaves)
    return {"loss": total.detach(), "x": grads[0], "w": grads[1]}


def in_float64(x, w, targets, softcap, n_vocab):
    logits = x @ w[:n_vocab].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")


# --- the other process -----------------------------------------------------------------------------


def interpret(path: str) -> None:
    """Save the outcomes of all cases in chunks of three tokens, and of one without gradients."""
    from training.kernels import loss
    from training.kernels.triton_loss import triton_logits_backward

    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    loss.CHUNK_BYTES, ours = {"cpu": CHUNK_BYTES}, partial(chunked_cross_entropy, triton_logits_backward)
    outcomes = {run: outcome(ours, CASES[run[0]], CASES[run[0]].inputs(DTYPES[run[1]])) for run in RUN}
    name = "blocks and a part"
    outcomes[name, "again"] = outcome(ours, CASES[name], CASES[name].inputs(torch.float32))
    outcomes[name, "alone"] = outcome(ours, CASES[name], CASES[name].inputs(torch.float32), gradient=False)
    save_file({"/".join((*key, name)): x.contiguous() for key, of in outcomes.items() for name, x in of.items()}, path)


def compile_for_gpus(path: str) -> None:
    """Save facts about the kernel, compiled for two kinds of GPU, with and without soft-cap and gradient."""
    from training.kernels import triton_loss

    kernel, facts = triton_loss._loss_kernel, []
    for kind, capability in (("bf16", 90), ("fp32", 80)):
        triton_loss._loss_kernel = Launch(kernel, capability, facts)
        for softcap in (None, 15.0):
            x, w, targets = Case(8, 50304).inputs(DTYPES[kind])
            for gradient in (False, True):
                triton_loss.triton_logits_backward(x @ w.T, targets, softcap, 50257, gradient=gradient)
    Path(path).write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Start both processes, which run at the same time."""
    folder = tmp_path_factory.mktemp("triton")
    return {
        "interpret": other_process("interpret", folder / "results.safetensors", __file__, TRITON_INTERPRET="1"),
        "compile": other_process("compile", folder / "results.json", __file__, TRITON_CACHE_DIR=str(folder)),
    }


@pytest.fixture(scope="module")
def results(processes):
    """Return tensors by (case, dtype or run) and name."""
    tensors = {}
    for key, value in load_file(file_of(processes["interpret"])).items():
        case, kind, name = key.split("/")
        tensors.setdefault((case, kind), {})[name] = value
    return tensors


# --- tests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), RUN)
def test_the_loss_and_its_gradients_equal_the_reference(results, name, kind, monkeypatch):
    x, w, targets = CASES[name].inputs(DTYPES[kind])
    monkeypatch.setattr("training.kernels.loss.CHUNK_BYTES", {"cpu": CHUNK_BYTES})
    rounded = outcome(LOSS_KERNELS["chunked"], CASES[name], (x.float(), w.float(), targets))
    for key, exact in outcome(in_float64, CASES[name], (x.double(), w.double(), targets)).items():
        error = (results[name, kind][key] - exact).norm()
        float32_error = (rounded[key] - exact).norm()  # some CPUs' products of three rows are ten times less exact
        assert error <= TOLERANCE[kind] * exact.norm() + 2 * float32_error, key
    assert not results[name, kind]["x"][targets < 0].any()


def test_the_bits_repeat_with_and_without_gradients(results):
    once = results["blocks and a part", "fp32"]
    assert all(torch.equal(value, once[key]) for key, value in results["blocks and a part", "again"].items())
    assert torch.equal(results["blocks and a part", "alone"]["loss"], once["loss"])


def test_the_kernel_compiles_for_gpus(processes):
    facts = json.loads(Path(file_of(processes["compile"])).read_text())
    assert len(facts) == 8
    for launch in facts:
        assert launch["shared"] <= 99 * 1024
        assert not launch["atom"]


def choice(previous: str | None = None, **options) -> str:
    """Return the choice of the loss as text."""
    chosen = choose_kernels(
        ParallelConfig(**options),
        KernelRequirements(frozenset(), frozenset(), False, frozenset({LossSpec(8, 300, 5.0)})),
        device=torch.device("cpu"),
        dtype=torch.float32,
        previous={"loss": previous} if previous else {},
    )
    assert chosen.kernels.loss is LOSS_KERNELS[chosen.names["loss"]]
    return chosen.as_text()["loss"]


def test_a_cpu_skips_it():
    assert choice() == "chunked (matches the reference)"
    assert choice("triton") == "chunked (matches the reference; previously triton)"
    assert choice(loss="reference") == "reference (requested)"
    with pytest.raises(UserError, match=r"^parallel.loss: triton: needs a CUDA device; use auto$"):
        choice(loss="triton")


@pytest.mark.parametrize("wrong", ["loss", "x", "w", "softcap", "counted", "padding"])
def test_a_loss_that_differs_from_the_reference_is_not_chosen(wrong, monkeypatch):
    right = LOSS_KERNELS["chunked"]

    def differs(x, w, targets, softcap, n_vocab):
        if wrong == "softcap":
            return right(x, w, targets, None, n_vocab)
        if wrong == "counted":
            return right(x, w, targets.clamp(min=0), softcap, n_vocab)
        if wrong == "loss":
            return 1.01 * right(x, w, targets, softcap, n_vocab)
        if wrong == "padding":
            return right(x, w, targets, softcap)
        x, w = x.detach() + 0 * x if wrong == "x" else x, w.detach() + 0 * w if wrong == "w" else w
        return right(x, w, targets, softcap, n_vocab)

    monkeypatch.setitem(LOSS_KERNELS, "chunked", differs)
    assert choice().startswith("reference (chunked: differs from the reference by ")


if __name__ == "__main__":
    part, path = sys.argv[1:]
    {"interpret": interpret, "compile": compile_for_gpus}[part](path)
