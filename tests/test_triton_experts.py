"""The experts' Triton kernels: run by the interpreter on a CPU, compiled for GPUs, chosen by time.

The tests also run this file as a program, `interpret FILE` or `compile FILE`, which writes its results to FILE.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, check_resumes_with, command, environment
from safetensors.torch import load_file, save_file

from training.config import ParallelConfig
from training.errors import UserError
from training.kernels.choose import choose_kernels
from training.kernels.experts import TORCH_EXPERTS, sort_by_expert
from training.kernels.interface import AttentionSpec, ExpertsSpec, KernelRequirements
from training.kernels.table import EXPERT_KERNELS

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
PLAIN = {int: "i32", float: "fp32"}
INPUTS = ("x", "up", "gate", "down", "weight")


class Case(NamedTuple):
    """A layer of experts and its tokens."""

    n_tokens: int
    top_k: int
    n_experts: int
    width: int
    hidden: int
    gated: bool = True
    chosen: tuple[int, ...] | None = None  # the only experts that get tokens; None: all

    def topk_ids_NK(self) -> torch.Tensor:
        scores = torch.rand(self.n_tokens, self.n_experts, generator=torch.Generator().manual_seed(0))
        if self.chosen is not None:
            scores[:, self.chosen] += 1
        return scores.topk(self.top_k).indices

    def inputs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        n, width, hidden, generator = self.n_experts, self.width, self.hidden, torch.Generator().manual_seed(1)
        shapes = [(self.n_tokens, width), (n, hidden, width), (n, hidden, width), (n, width, hidden)]
        tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        return [*tensors, torch.rand(self.n_tokens, self.top_k, generator=generator)]


# A block is up to 64 wide in fp32 and 128 in 16 bits, and a tile has 16 rows if experts get few tokens. Programs are
# reordered if there are more than 8 tiles and more than one block: the last case has 9 tiles.
CASES = {
    "of no multiples": Case(37, 2, 4, 40, 72),
    "one token": Case(1, 1, 3, 16, 24),
    "top 4, not gated": Case(11, 4, 5, 33, 17, gated=False),
    "all to one of many": Case(70, 1, 9, 16, 16, gated=False, chosen=(7,)),
    "empty experts": Case(20, 2, 6, 64, 32, chosen=(1, 4)),
    "one expert": Case(5, 1, 1, 32, 64),
    "wider than a block": Case(48, 2, 6, 136, 130, gated=False),
}
RUN = [(name, kind) for name in CASES for kind in ("fp32", "bf16") if (name, kind) != ("wider than a block", "fp32")]
RUN.append(("of no multiples", "fp16"))
AGAIN = ("empty experts", "fp32")


def outcome(kernel, case: Case, inputs: list[torch.Tensor], layer=None) -> dict[str, torch.Tensor]:
    """Return the result of a layer of experts and its gradients by name."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = (layer or experts_layer)(kernel, case.topk_ids_NK(), case.gated, *leaves)
    direction = torch.linspace(-1, 1, y.numel()).to(y.dtype).view_as(y)
    grads = torch.autograd.grad(y, leaves, direction, allow_unused=not case.gated)
    return {name: x for name, x in zip(("y", *INPUTS), (y.detach(), *grads), strict=True) if x is not None}


def experts_layer(kernel, topk_ids_NK, gated, x_NC, up, gate, down, weight_NK):
    dispatch = sort_by_expert(topk_ids_NK, len(up))
    h_RF, *gate_RF = kernel.up(x_NC, (up, gate) if gated else (up,), dispatch)
    return kernel.down(h_RF * gate_RF[0].tanh() if gated else h_RF.tanh(), down, weight_NK, dispatch)


# --- the other process -----------------------------------------------------------------------------


def interpret(path: str) -> None:
    """Save the outcomes of all cases, and of one of them a second time and compiled."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    multiply = InterpreterBuilder.create_dot

    def multiply_numbers(self, a, b, *rest):
        """Convert bf16 first: the interpreter stores its bits as integers, and would multiply the integers."""
        a, b = (self.create_fp_ext(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return multiply(self, a, b, *rest)

    InterpreterBuilder.create_dot = multiply_numbers
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    triton_kernel = EXPERT_KERNELS["triton"]
    outcomes = {
        (*run, "once"): outcome(triton_kernel, CASES[run[0]], CASES[run[0]].inputs(DTYPES[run[1]])) for run in RUN
    }
    case, inputs = CASES[AGAIN[0]], CASES[AGAIN[0]].inputs(DTYPES[AGAIN[1]])
    compiled = torch.compile(experts_layer, backend="aot_eager", fullgraph=True)
    outcomes[*AGAIN, "again"] = outcome(triton_kernel, case, inputs)
    outcomes[*AGAIN, "compiled"] = outcome(triton_kernel, case, inputs, compiled)
    flat = {"/".join((*key, name)): x.contiguous() for key, values in outcomes.items() for name, x in values.items()}
    save_file(flat, path)


class Launch(NamedTuple):
    """A stand-in for a kernel whose launch only compiles it."""

    kernel: object
    capability: int
    launches: list[dict]

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
        compiled = triton.compile(source, target=GPUTarget("cuda", self.capability, 32), options=options)
        ptx = compiled.asm["ptx"]
        self.launches.append(
            {"shared": compiled.metadata.shared} | {word: word in ptx for word in ("wgmma", "tf32", "atom")}
        )


def compile_for_gpus(path: str) -> None:
    """Save facts about the kernels of a forward and a backward, compiled for two kinds of GPU."""
    from training.kernels import triton_experts

    kernels, facts = (triton_experts._matmul_kernel, triton_experts._outer_kernel), {}
    for kind, capability in (("bf16", 90), ("fp32", 80)):
        case, launches = Case(256, 2, 4, 64, 128, gated=kind == "bf16"), facts.setdefault(kind, [])
        triton_experts._matmul_kernel, triton_experts._outer_kernel = (Launch(k, capability, launches) for k in kernels)
        outcome(EXPERT_KERNELS["triton"], case, case.inputs(DTYPES[kind]))
    Path(path).write_text(json.dumps(facts))


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
    """Wait for a process and return the path of its results."""
    errors = process.communicate(timeout=240)[1]
    assert process.returncode == 0, errors
    return process.args[-1]


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Start both processes, which run at the same time."""
    folder = tmp_path_factory.mktemp("triton")
    return {
        "interpret": other_process("interpret", folder / "results.safetensors", TRITON_INTERPRET="1"),
        "compile": other_process("compile", folder / "results.json", TRITON_CACHE_DIR=str(folder)),
    }


@pytest.fixture(scope="module")
def results(processes):
    """Return tensors by (case, dtype, run) and name."""
    tensors = {}
    for key, value in load_file(file_of(processes["interpret"])).items():
        *key, name = key.split("/")
        tensors.setdefault(tuple(key), {})[name] = value
    return tensors


# --- tests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), RUN)
def test_results_and_all_gradients_equal_the_reference(results, name, kind):
    case, dtype = CASES[name], DTYPES[kind]
    expected = outcome(TORCH_EXPERTS["reference"], case, [x.float() for x in case.inputs(dtype)])
    tensors = results[name, kind, "once"]
    assert tensors.keys() == expected.keys()
    for key, theirs in expected.items():
        ours = tensors[key]
        assert ours.dtype == (torch.float32 if key == "weight" else dtype)
        if dtype == torch.float32:
            atol = 1e-6 * theirs.abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=atol, msg=lambda m, key=key: f"{key}: {m}")
        assert (ours.float() - theirs).norm() <= ROUNDING.get(dtype, 2e-6) * theirs.norm(), key


def test_an_expert_without_tokens_has_a_zero_gradient(results):
    for kind in ("fp32", "bf16"):
        tensors = results["empty experts", kind, "once"]
        for matrix in ("up", "gate", "down"):
            assert tensors[matrix].flatten(1).abs().sum(1).bool().tolist() == [e in (1, 4) for e in range(6)]


@pytest.mark.parametrize("which", ["again", "compiled"])
def test_the_bits_repeat(results, which):
    for key, value in results[*AGAIN, "once"].items():
        assert torch.equal(value, results[*AGAIN, which][key]), key


def test_kernels_compile_for_gpus(processes):
    facts = json.loads(Path(file_of(processes["compile"])).read_text())
    assert {kind: len(launches) for kind, launches in facts.items()} == {"bf16": 9, "fp32": 6}
    for launch in (*facts["bf16"], *facts["fp32"]):
        assert launch["shared"] <= 99 * 1024  # the minimum of devices of capability 8 or more
        assert not launch["atom"]
    assert all(launch["wgmma"] for launch in facts["bf16"])
    assert not any(launch["tf32"] for launch in facts["fp32"])  # TF32 has 10 bits of mantissa


# --- the choice ------------------------------------------------------------------------------------

REQUIREMENTS = KernelRequirements(frozenset({AttentionSpec(2, 2, 8, 8)}), frozenset({ExpertsSpec(32, 64)}), False)


def choice(previous=None, **options) -> str:
    """Return the choice of experts as text."""
    chosen = choose_kernels(
        ParallelConfig(**options), REQUIREMENTS, device=CPU, dtype=torch.float32, previous=previous or {}
    )
    assert chosen.kernels.experts is EXPERT_KERNELS[chosen.names["experts"]]
    return chosen.as_text()["experts"]


def slow_down(kernel):
    def up(*inputs):
        time.sleep(0.02)
        return kernel.up(*inputs)

    return kernel._replace(up=up)


@pytest.fixture
def timing_on_cpu(monkeypatch):
    """Treat the CPU as if kernels were timed on it."""
    monkeypatch.setattr("training.kernels.choose.TIMED_DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr("training.kernels.trials.TIMED_TOKENS", 64)


def test_without_triton_the_package_imports_and_a_cpu_skips_it():
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
        "grouped (matches the reference)",
        "grouped (matches the reference; previously triton)",
    ], done.stderr


def test_naming_it_on_a_cpu_is_one_line():
    with pytest.raises(UserError, match=r"^parallel.experts: triton: needs a CUDA device; use auto$"):
        choice(experts="triton")


@pytest.mark.usefixtures("timing_on_cpu")
def test_the_fastest_of_the_matching_kernels_is_chosen(monkeypatch):
    monkeypatch.setitem(EXPERT_KERNELS, "grouped", slow_down(EXPERT_KERNELS["grouped"]))
    assert choice().startswith("loop (fastest: loop ")
    monkeypatch.setitem(EXPERT_KERNELS, "loop", slow_down(slow_down(EXPERT_KERNELS["loop"])))
    assert choice().startswith("grouped (fastest: grouped ")


@pytest.mark.usefixtures("timing_on_cpu")
def test_a_resumed_run_keeps_the_slower_kernel(monkeypatch):
    monkeypatch.setitem(EXPERT_KERNELS, "grouped", slow_down(EXPERT_KERNELS["grouped"]))
    assert choice({"experts": "grouped"}) == "grouped (matches the reference)"
    assert choice({"experts": "triton"}).startswith("loop (fastest: ")


@pytest.mark.usefixtures("timing_on_cpu")
def test_kernels_that_are_named_or_wrong_are_not_timed(monkeypatch):
    right = EXPERT_KERNELS["loop"]
    monkeypatch.setitem(EXPERT_KERNELS, "loop", slow_down(right))
    assert choice(experts="loop") == "loop (requested)"
    monkeypatch.setitem(
        EXPERT_KERNELS, "grouped", right._replace(up=lambda x, w, dispatch: right.up(x, w[::-1], dispatch))
    )
    assert choice().startswith("loop (grouped: differs from the reference by ")


def test_on_a_cpu_the_order_of_the_table_decides(monkeypatch):
    monkeypatch.setitem(EXPERT_KERNELS, "grouped", slow_down(EXPERT_KERNELS["grouped"]))
    assert choice() == "grouped (matches the reference)"


@pytest.mark.usefixtures("timing_on_cpu")
def test_a_resumed_run_keeps_its_kernel_even_if_another_is_faster_now(run, monkeypatch, capsys):
    plain = EXPERT_KERNELS["grouped"]
    monkeypatch.setitem(EXPERT_KERNELS, "grouped", slow_down(plain))
    folder = run()
    assert "experts     loop (fastest: loop " in capsys.readouterr().out
    monkeypatch.setitem(EXPERT_KERNELS, "grouped", plain)
    monkeypatch.setitem(EXPERT_KERNELS, "loop", slow_down(EXPERT_KERNELS["loop"]))
    check_resumes_with("experts loop", run, folder, capsys)


if __name__ == "__main__":
    part, path = sys.argv[1:]
    {"interpret": interpret, "compile": compile_for_gpus}[part](path)
