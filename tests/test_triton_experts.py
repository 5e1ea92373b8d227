"""The experts' Triton kernels: as the interpreter runs them on a CPU, as they compile for GPUs, when they are taken.

Run as a program, this file is the other process of its tests: `interpret` or `compile`, and a file for what is found.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, command, environment, goes_on_with
from safetensors.torch import load_file, save_file

from training.config import ParallelConfig
from training.errors import UserError
from training.kernels.choose import choose_kernels
from training.kernels.experts import REFERENCE, sort_by_expert
from training.kernels.interface import AttentionSpec, ExpertsSpec, KernelRequirements
from training.kernels.table import EXPERT_KERNELS

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
PLAIN = {int: "i32", float: "fp32"}
INPUTS = ("x", "up", "gate", "down", "weight")


class Case(NamedTuple):
    """Tokens and their experts."""

    n_tokens: int
    top_k: int
    n_experts: int
    width: int
    hidden: int
    gated: bool = True
    favourites: tuple[int, ...] | None = None  # the others get nothing

    def topk_ids_NK(self) -> torch.Tensor:
        like = torch.rand(self.n_tokens, self.n_experts, generator=torch.Generator().manual_seed(0))
        if self.favourites is not None:
            like[:, self.favourites] += 1
        return like.topk(self.top_k).indices

    def inputs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        n, width, hidden, generator = self.n_experts, self.width, self.hidden, torch.Generator().manual_seed(1)
        shapes = [(self.n_tokens, width), (n, hidden, width), (n, hidden, width), (n, width, hidden)]
        made = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        return [*made, torch.rand(self.n_tokens, self.top_k, generator=generator)]


# A block is up to 64 wide in fp32 and 128 in 16 bits, and a tile has 16 rows where experts get so few. Of more than 8
# tiles (there are 9) and more than one block there is an order: the last case.
CASES = {
    "of no multiples": Case(37, 2, 4, 40, 72),
    "one token": Case(1, 1, 3, 16, 24),
    "top 4, not gated": Case(11, 4, 5, 33, 17, gated=False),
    "all to one of many": Case(70, 1, 9, 16, 16, gated=False, favourites=(7,)),
    "empty experts": Case(20, 2, 6, 64, 32, favourites=(1, 4)),
    "one expert": Case(5, 1, 1, 32, 64),
    "wider than a block": Case(48, 2, 6, 136, 130, gated=False),
}
RUN = [(name, kind) for name in CASES for kind in ("fp32", "bf16") if (name, kind) != ("wider than a block", "fp32")]
RUN.append(("of no multiples", "fp16"))
AGAIN = ("empty experts", "fp32")


def outcome(kernel, case: Case, inputs: list[torch.Tensor], layer=None) -> dict[str, torch.Tensor]:
    """The result of a layer of experts and its gradient by each input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = (layer or experts_layer)(kernel, case.topk_ids_NK(), case.gated, *leaves)
    direction = torch.linspace(-1, 1, y.numel()).to(y.dtype).view_as(y)
    grads = torch.autograd.grad(y, leaves, direction, allow_unused=not case.gated)
    return {name: x for name, x in zip(("y", *INPUTS), (y.detach(), *grads), strict=True) if x is not None}


def experts_layer(kernel, topk_ids_NK, gated, x_NC, up, gate, down, weight_NK):
    rows = sort_by_expert(topk_ids_NK, len(up))
    h_RF, *gate_RF = kernel.up(x_NC, (up, gate) if gated else (up,), rows)
    return kernel.down(h_RF * gate_RF[0].tanh() if gated else h_RF.tanh(), down, weight_NK, rows)


# --- the other process -----------------------------------------------------------------------------


def interpret(path: str) -> None:
    """Outcomes of all cases, one of them twice, and once more compiled."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    from training.kernels.triton_experts import TRITON

    multiply = InterpreterBuilder.create_dot

    def multiply_numbers(self, a, b, *rest):
        """The interpreter keeps bf16 as the integers of its bits, and would multiply those."""
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    InterpreterBuilder.create_dot = multiply_numbers
    torch.use_deterministic_algorithms(True)  # what is not written is NaN
    found = {(*run, "once"): outcome(TRITON, CASES[run[0]], CASES[run[0]].inputs(DTYPES[run[1]])) for run in RUN}
    case, inputs = CASES[AGAIN[0]], CASES[AGAIN[0]].inputs(DTYPES[AGAIN[1]])
    compiled = torch.compile(experts_layer, backend="aot_eager", fullgraph=True)
    found[*AGAIN, "again"] = outcome(TRITON, case, inputs)
    found[*AGAIN, "compiled"] = outcome(TRITON, case, inputs, compiled)
    flat = {"/".join((*key, name)): x.contiguous() for key, values in found.items() for name, x in values.items()}
    save_file(flat, path)


class Launch(NamedTuple):
    """In place of a kernel: a launch compiles what it would launch, and changes nothing."""

    kernel: object
    capability: int
    found: list[dict]

    def __getitem__(self, grid):
        return self

    def __call__(self, *values, num_warps: int, num_stages: int = 3, **constants) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constexprs, hints = {}, {}, {}
        for i, name in enumerate(self.kernel.arg_names):
            value = constants[name] if name in constants else values[i]
            if name in constants or value is None or (isinstance(value, int) and value == 1):
                signature[name], constexprs[i,] = "constexpr", value
            else:
                kinds = {v: k for k, v in DTYPES.items()} | {torch.int64: "i64", torch.int32: "i32"}
                signature[name] = f"*{kinds[value.dtype]}" if isinstance(value, torch.Tensor) else PLAIN[type(value)]
                if not isinstance(value, int | float) or value % 16 == 0:
                    hints[i,] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constexprs, hints)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        made = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        ptx = made.asm["ptx"]
        self.found.append({"shared": made.metadata.shared} | {word: word in ptx for word in ("wgmma", "tf32", "atom")})


def compile_for_gpus(path: str) -> None:
    """What the kernels of a forward and a backward become on GPUs of two kinds."""
    from training.kernels import triton_experts

    kernels, found = (triton_experts._rows_kernel, triton_experts._outer_kernel), {}
    for kind, capability in (("bf16", 90), ("fp32", 80)):
        case, launches = Case(256, 2, 4, 64, 128, gated=kind == "bf16"), found.setdefault(kind, [])
        triton_experts._rows_kernel, triton_experts._outer_kernel = (Launch(k, capability, launches) for k in kernels)
        outcome(triton_experts.TRITON, case, case.inputs(DTYPES[kind]))
    Path(path).write_text(json.dumps(found))


def other_process(part: str, path, file: str = __file__, **variables: str) -> subprocess.Popen:
    pytest.importorskip("triton", minversion="3.7", reason="needs Triton 3.7 or later")
    return subprocess.Popen(
        [sys.executable, file, part, str(path)],
        cwd=ROOT,
        env=environment() | variables,
        stderr=subprocess.PIPE,
        text=True,
    )


def file_of(process: subprocess.Popen) -> str:
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors
    return process.args[-1]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Both at a time."""
    folder = tmp_path_factory.mktemp("triton")
    return {
        "interpret": other_process("interpret", folder / "found.safetensors", TRITON_INTERPRET="1"),
        "compile": other_process("compile", folder / "found.json", TRITON_CACHE_DIR=str(folder)),
    }


@pytest.fixture(scope="module")
def interpreted(processes):
    """Tensors by (case, type, which run) and name."""
    found = {}
    for key, value in load_file(file_of(processes["interpret"])).items():
        *key, name = key.split("/")
        found.setdefault(tuple(key), {})[name] = value
    return found


# --- tests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), RUN)
def test_results_and_all_gradients_equal_the_reference(interpreted, name, kind):
    case, dtype = CASES[name], DTYPES[kind]
    expected = outcome(REFERENCE, case, [x.float() for x in case.inputs(dtype)])
    found = interpreted[name, kind, "once"]
    assert found.keys() == expected.keys()
    for key, theirs in expected.items():
        ours = found[key]
        assert ours.dtype == (torch.float32 if key == "weight" else dtype)
        if dtype == torch.float32:
            atol = 1e-6 * theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
        assert (ours.float() - theirs).norm() <= ROUNDING.get(dtype, 2e-6) * theirs.norm(), key


def test_an_expert_without_tokens_has_a_zero_gradient(interpreted):
    for kind in ("fp32", "bf16"):
        found = interpreted["empty experts", kind, "once"]
        for matrix in ("up", "gate", "down"):
            assert found[matrix].flatten(1).abs().sum(1).bool().tolist() == [e in (1, 4) for e in range(6)]


@pytest.mark.parametrize("which", ["again", "compiled"])
def test_the_same_bits_every_time(interpreted, which):
    for key, value in interpreted[*AGAIN, "once"].items():
        assert torch.equal(value, interpreted[*AGAIN, which][key]), key


def test_kernels_compile_for_gpus_that_are_not_here(processes):
    found = json.loads(Path(file_of(processes["compile"])).read_text())
    assert {kind: len(launches) for kind, launches in found.items()} == {"bf16": 9, "fp32": 6}
    for launch in (*found["bf16"], *found["fp32"]):
        assert launch["shared"] <= 99 * 1024  # the least that a device of capability 8 or more has
        assert not launch["atom"]
    assert all(launch["wgmma"] for launch in found["bf16"])
    assert not any(launch["tf32"] for launch in found["fp32"])  # whose products have 10 bits


# --- when it is taken ------------------------------------------------------------------------------

NEEDS = KernelRequirements(frozenset({AttentionSpec(2, 2, 8, 8)}), frozenset({ExpertsSpec(32, 64)}), False)


def choice(before=None, **options) -> str:
    kernels, why = choose_kernels(
        ParallelConfig(**options), NEEDS, device=CPU, dtype=torch.float32, previous=before or {}
    )
    assert kernels.experts is EXPERT_KERNELS[why["experts"].split()[0]]
    return why["experts"]


def slowed(kernel):
    def up(*inputs):
        time.sleep(0.02)
        return kernel.up(*inputs)

    return kernel._replace(up=up)


@pytest.fixture
def timed(monkeypatch):
    """A CPU is treated as a GPU is."""
    monkeypatch.setattr("training.kernels.choose.TIMED_ON", ("cpu",))
    monkeypatch.setattr("training.kernels.choose.TIMED_TOKENS", 64)


def test_without_triton_the_package_imports_and_a_cpu_passes_it_over():
    program = """if True:
        import sys
        sys.modules["triton"] = None
        import training.train
        sys.path.insert(0, "tests")
        from test_triton_experts import choice
        print(choice(), choice({"experts": "triton"}), sep="\\n")
        assert "training.kernels.triton_experts" not in sys.modules
    """
    done = command("-c", program)
    assert done.stdout.splitlines() == [
        "grouped (ran, and equals the reference)",
        "grouped (ran, and equals the reference; it was triton before)",
    ], done.stderr


def test_asking_for_it_on_a_cpu_is_one_line():
    with pytest.raises(UserError, match=r"^parallel.experts: triton: it runs on CUDA devices; use auto$"):
        choice(experts="triton")


@pytest.mark.usefixtures("timed")
def test_of_kernels_that_agree_the_fastest_is_taken(monkeypatch):
    monkeypatch.setitem(EXPERT_KERNELS, "grouped", slowed(EXPERT_KERNELS["grouped"]))
    assert choice().startswith("loop (the fastest: loop ")
    monkeypatch.setitem(EXPERT_KERNELS, "loop", slowed(slowed(EXPERT_KERNELS["loop"])))
    assert choice().startswith("grouped (the fastest: grouped ")


@pytest.mark.usefixtures("timed")
def test_a_run_goes_on_with_the_slower_one(monkeypatch):
    monkeypatch.setitem(EXPERT_KERNELS, "grouped", slowed(EXPERT_KERNELS["grouped"]))
    assert choice({"experts": "grouped"}) == "grouped (ran, and equals the reference)"
    assert choice({"experts": "triton"}).startswith("loop (the fastest: ")


@pytest.mark.usefixtures("timed")
def test_what_was_asked_for_and_what_is_wrong_is_not_timed(monkeypatch):
    right = EXPERT_KERNELS["loop"]
    monkeypatch.setitem(EXPERT_KERNELS, "loop", slowed(right))
    assert choice(experts="loop") == "loop (asked for)"
    monkeypatch.setitem(EXPERT_KERNELS, "grouped", right._replace(up=lambda x, w, rows: right.up(x, w[::-1], rows)))
    assert choice().startswith("loop (grouped: it differs from the reference by ")


def test_on_a_cpu_the_order_decides(monkeypatch):
    monkeypatch.setitem(EXPERT_KERNELS, "grouped", slowed(EXPERT_KERNELS["grouped"]))
    assert choice() == "grouped (ran, and equals the reference)"


@pytest.mark.usefixtures("timed")
def test_a_restart_repeats_the_bits_whatever_is_faster_then(run, monkeypatch, capsys):
    plain = EXPERT_KERNELS["grouped"]
    monkeypatch.setitem(EXPERT_KERNELS, "grouped", slowed(plain))
    folder = run()
    assert "experts     loop (the fastest: loop " in capsys.readouterr().out
    monkeypatch.setitem(EXPERT_KERNELS, "grouped", plain)
    monkeypatch.setitem(EXPERT_KERNELS, "loop", slowed(EXPERT_KERNELS["loop"]))
    goes_on_with("experts     loop", run, folder, capsys)


if __name__ == "__main__":
    part, path = sys.argv[1:]
    {"interpret": interpret, "compile": compile_for_gpus}[part](path)
