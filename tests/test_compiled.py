"""Compiled blocks compute the same, and equal blocks are compiled once."""

import pytest
import torch
from conftest import rows
from torch._dynamo.utils import counters

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
    sizes = {"n_layer": 12, "n_head": 2, "n_embd": 16, "n_positions": 32, "blocks": [{"ffn": FFN[ffn]}]}
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
