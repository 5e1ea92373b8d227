"""Compiled blocks compute the same, and equal blocks are compiled once."""

import re

import pytest
import torch
from conftest import rows, write_config
from torch._dynamo.utils import counters

from training.errors import UserError
from training.kernels.compiler import compiled

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore:The .grad attribute:UserWarning")
FFN = {"dense": {}, "experts": {"type": "moe", "n_experts": 4, "hidden": 24}}


def n_programs() -> int:
    """Return the number of compiled programs so far, including the trials of kernels."""
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def by_aot_eager(monkeypatch):
    """Compile by AOTAutograd, without Inductor's kernels: the same programs in a tenth of the time."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile_module(block, backend="aot_eager"))


def check_same_losses(run, **options) -> None:
    """Train plainly and compiled, and compare."""
    torch._dynamo.reset()
    plain, before = run(name="plain", **options), n_programs()
    compiled = run(name="compiled", **options, parallel={"compile": True})
    assert n_programs() > before
    for ours, theirs in zip(rows(compiled), rows(plain), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("missing", ["compiler", "cache"])
def test_a_compiler_that_is_missing_is_one_line_at_the_start(options, call, tmp_path, monkeypatch, missing):
    """PyTorch's own error is 100 lines, at the first step, and its exit status would mean to start again."""
    path, where = write_config(tmp_path / "run.yaml", options(parallel={"compile": True})), tmp_path / "cache"
    if missing == "cache":
        where.write_text("a file")
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(where))
    with torch._inductor.config.patch({} if missing == "cache" else {"cpp.cxx": ("no-such-compiler",)}):
        done = call("train", "--config", str(path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    problem = {
        "compiler": "InvalidCxxCompiler: No working C.. compiler found .* install g.. or clang, or set CXX",
        "cache": f"{where}: File exists; set TORCHINDUCTOR_CACHE_DIR to a folder that can be written",
    }
    assert re.search(f"^error: parallel.compile: {problem[missing]}.*, or set parallel.compile: false$", done.stderr)


def fails(_graph, _inputs):
    """A back-end whose compiler does not find a header."""
    raise RuntimeError("C++ compile error\n\nOutput:\nx.cpp:1:10: fatal error: Python.h: no such file\nended")


HEADER = "x.cpp:1:10: fatal error: Python.h: no such file; mend it, or set parallel.compile: false"


def test_an_error_of_the_compiler_is_its_own_line_and_no_reason_to_start_again():
    class Failing(torch.nn.Module):
        def compile(self):
            super().compile(backend=fails)

        def forward(self, x):
            return x.sin()

    model = Failing()
    with pytest.raises(UserError) as caught, compiled(model):
        model(torch.ones(2))
    assert (str(caught.value), caught.value.status) == (
        f"parallel.compile: the model does not compile here: {HEADER}",
        2,
    )


@pytest.mark.soak
def test_a_run_whose_blocks_do_not_compile_ends_with_status_2(options, call, tmp_path, monkeypatch):
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda block: compile_module(block, backend=fails))
    torch._dynamo.reset()
    done = call("train", "--config", str(write_config(tmp_path / "run.yaml", options(parallel={"compile": True}))))
    assert (done.returncode, done.stderr.splitlines()[-1].partition("here: ")[2]) == (2, HEADER)
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("by_aot_eager")
def test_compiled_blocks_compute_the_same(run):
    check_same_losses(run, steps=3)


@pytest.mark.parametrize("ffn", ["dense", pytest.param("experts", marks=pytest.mark.soak)])
def test_blocks_compiled_by_inductor_compute_the_same(run, ffn):
    """One kind of block, and no evaluation before the end: Inductor's kernels take 10 s each on a CPU."""
    model = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32, "blocks": [{"ffn": FFN[ffn]}]}
    check_same_losses(run, model=model, steps=3, eval={"every": None, "tokens": 64, "prompts": []})


@pytest.mark.usefixtures("by_aot_eager")
@pytest.mark.parametrize("ffn", FFN)
def test_equal_blocks_are_compiled_once_without_a_graph_break(ffn, build_run):
    """One program each for training, evaluation, and the smaller last batch of an evaluation; none runs in Python."""
    sizes = {
        "n_layer": 12,
        "n_head": 2,
        "n_embd": 16,
        "n_positions": 32,
        "bigram_rows": 100,
        "blocks": [{"ffn": FFN[ffn], "short_conv": 4}],
    }
    run = build_run(model=sizes, parallel={"compile": True}, eval={"tokens": 32 * 7, "prompts": ["def "]})
    torch._dynamo.reset()
    counters.clear()
    programs = []
    for _ in range(4):
        run.train_step()
        run.evaluate()
        run.sample()
        programs.append(n_programs())
    assert programs == [programs[0]] * 4 and 2 <= programs[0] <= 3
    # An earlier test's finalizer may be a frame without a program, so compare the counts of frames.
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    assert not counters["graph_break"] and not counters["recompile_limit"]
