"""The largest micro-batch that fits in memory, and out-of-memory errors after the start."""

import json
import platform
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import BuiltRun, command, rows, tensors, write_config
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from trajectory import out_of_memory_at

from training import checkpoint
from training import device as devices
from training.errors import UserError
from training.model import GPT
from training.model.moe import MoE

GIB = 2**30


def weights(run: BuiltRun) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def halved(build_run):
    """Weights after four steps; the last two have half the micro-batch."""
    run = build_run(name="halved")
    for step in range(4):
        run.micro_batch.size = 4 if step < 2 else 2
        run.train_step()
    return weights(run)


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("where", ["model", "second block", "backward"])
def test_a_batch_that_ran_out_of_memory_is_repeated_in_halves(build_run, halved, capsys, call, where):
    run = build_run(name="failing")
    for step in range(4):
        if step == 2 and where == "backward":
            run.model.blocks[0].register_full_backward_pre_hook(raise_at(call))
        elif step == 2:
            out_of_memory_at(run.model if where == "model" else run.model.blocks[1], call)
        run.train_step()
    assert equal(weights(run), halved)
    assert (run.micro_batch.size, run.micro_batch.n_out_of_memory) == (2, 1)
    lines = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert lines == ["step 3: out of memory; repeating the batch with micro_batch 2"]


def raise_at(call: int):
    calls = iter(range(100))

    def fail(*_):
        if next(calls) == call:
            raise torch.OutOfMemoryError("out of memory, by the test")

    return fail


def test_metrics_of_a_repeated_batch_count_once(build_run):
    whole, failing = build_run(name="whole"), build_run(name="failing")
    out_of_memory_at(failing.model.blocks[1], 1)
    for run in (whole, failing):
        run.train_step()
    (ours,), (theirs,) = failing.rows(), whole.rows()
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["expert_load"] == theirs["expert_load"]


def test_after_a_micro_batch_of_one_comes_activation_checkpointing_and_then_an_error_of_one_line(build_run, capsys):
    run = build_run(micro_batch=1)
    out_of_memory_at(run.model, 0)
    run.train_step()
    assert run.sharded.activation_checkpointing == "full"
    assert "step 1: out of memory; repeating the batch with parallel.recompute: full" in capsys.readouterr().err
    whole = build_run(name="whole", micro_batch=1)
    whole.train_step()
    assert equal(weights(run), weights(whole))
    out_of_memory_at(run.model, 0)
    with pytest.raises(UserError, match=r"step 2: not one sample of 32 tokens fits into [\d.]+ GiB; use a smaller"):
        run.train_step()


def test_another_error_does_not_count_as_out_of_memory(build_run):
    run = build_run()
    run.model.register_forward_pre_hook(lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        run.train_step()


def test_a_tensor_larger_than_all_memory_is_out_of_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert devices.is_out_of_memory(raised.value)
    assert not devices.is_out_of_memory(RuntimeError("expected a float"))


def test_auto_takes_all_samples_if_they_fit(build_run):
    run = build_run(micro_batch="auto")
    assert run.micro_batch.size == 8
    assert list(run.state.micro_batches.values()) == [{"micro_batch": 8, "recompute": "none"}]


def test_auto_tries_the_worst_routing_and_leaves_the_model_unchanged(build_run):
    routed = []
    hook = register_module_forward_hook(
        lambda module, _, out: routed.append(out[1].topk_ids_NK) if isinstance(module, MoE) else None
    )
    try:
        auto = build_run(name="auto", micro_batch="auto")
    finally:
        hook.remove()
    assert len(routed) == 2 and all((topk_ids_NK.sort().values == torch.tensor([0, 1])).all() for topk_ids_NK in routed)
    configured = build_run(name="configured", micro_batch=8)
    assert equal(weights(configured), weights(auto))
    for run in (configured, auto):
        run.train_step()
    assert equal(weights(configured), weights(auto))
    assert all(p.grad is None for p in auto.model.parameters())


@pytest.fixture
def memory(monkeypatch):
    """Set the device's memory; forwards of 1, 2, 3 samples have peaks of 0.6, 0.7, 0.8 GiB."""
    last = [0]
    hook = register_module_forward_pre_hook(
        lambda module, inputs: last.append(len(inputs[0].tokens_BT)) if isinstance(module, GPT) else None
    )
    monkeypatch.setattr(devices, "reset_peak_memory", lambda _: last.append(0))
    monkeypatch.setattr(devices, "peak_memory_bytes", lambda _: round((0.5 + 0.1 * last[-1]) * GIB))
    yield lambda gib: monkeypatch.setattr(devices, "available_memory_bytes", lambda _: gib * GIB)
    hook.remove()


@pytest.mark.parametrize(("gib", "fits"), [(1.9, 8), (1.3, 4), (1.05, 4), (0.95, 3), (0.85, 2), (0.7, 1)])
def test_auto_uses_nine_tenths_of_the_memory_in_equal_parts(build_run, memory, gib, fits):
    memory(gib)
    assert build_run(micro_batch="auto").micro_batch.size == fits


def test_a_memory_too_small_for_one_sample_is_an_error_of_one_line(build_run, memory):
    memory(0.01)
    with pytest.raises(UserError, match=r"not one sample of 32 tokens fits into 0\.0 GiB, needs 0\.6 GiB"):
        build_run(micro_batch="auto")


def test_a_micro_batch_is_remembered_for_its_hardware_and_options(run, build_run, memory):
    memory(1.9)
    folder = run(name="small", micro_batch="auto", steps=8)
    state = json.loads((folder / "checkpoints/step-00000008/state.json").read_text())
    assert [known["micro_batch"] for known in state["micro_batch"].values()] == [8]
    memory(0.85)
    assert build_run(micro_batch="auto").micro_batch.size == 8
    assert build_run(micro_batch="auto", parallel={"device": "cpu", "recompute": "full"}).micro_batch.size == 2


def test_one_rank_out_of_memory_halves_the_micro_batch_of_all(processes, options, tmp_path):
    outcomes = {}
    for name, failing in (("whole", ""), ("failing", "1:3")):
        path = write_config(tmp_path / f"{name}.yaml", options(name=name, micro_batch=2, parallel={"device": "cpu"}))
        words, variables = [str(tmp_path), str(path)], {"OUT_OF_MEMORY": failing}
        done = processes.run("trajectory:main", *words, n_ranks=2, env=variables)
        assert done.returncode == 0, done.stderr
        outcomes[name] = (
            json.loads((tmp_path / f"{name}.json").read_text()),
            load_file(tmp_path / f"{name}.safetensors"),
        )
        assert ("step 2: out of memory; repeating the batch with micro_batch 1" in done.stderr) == bool(failing)
    (ours, our_weights), (theirs, their_weights) = outcomes["failing"], outcomes["whole"]
    assert ours["tokens"] == theirs["tokens"]
    for name, tensor in our_weights.items():
        assert (tensor - their_weights[name]).abs().max() < 1e-6 * 8


needs_linux = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="needs Linux, to limit a process's memory"
)


@needs_linux
def test_out_of_memory_after_the_weights_are_loaded_is_one_line_and_checkpoints_stay_complete(
    processes, options, run, tmp_path
):
    """The system limits memory once the weights are loaded; without the limit the run resumes exactly."""
    wide = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 1024, "blocks": [{"ffn": {"type": "moe"}}, {}]}
    changes = {"model": wide, "batch_tokens": 2**12, "micro_batch": 4, "steps": 4, "checkpoint": {"every": 2}}
    folder = run(**changes)
    before = tensors(folder, 4), rows(folder)
    shutil.rmtree(folder / "checkpoints/step-00000004")
    path = write_config(tmp_path / "built.yaml", options(**changes))
    done = processes.run("trajectory:main_with_limited_memory", "--config", str(path), env={"LIMIT_AT": "load"})
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    # With recomputation a sample may fit into what is mapped already; then the copy for the checkpoint does not.
    sample = "not one sample of 1024 tokens fits.*use a smaller model.n_positions"
    assert re.search(rf"{sample}|checkpoints/step-0000000\d: the checkpoint could not be saved: ", line), line
    assert checkpoint.corruption(folder / "checkpoints/step-00000002") is None
    run(**changes)
    assert (tensors(folder, 4), rows(folder)) == before


@needs_linux
def test_the_micro_batch_shrinks_if_the_system_limits_memory(processes, options, run, tmp_path):
    """The system limits memory from step 3; saves, rows and the final model fit into the limit."""
    wide = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 128, "blocks": [{"ffn": {"type": "moe"}}, {}]}
    changes = {"model": wide, "batch_tokens": 2**14, "micro_batch": 32, "steps": 4, "checkpoint": {"every": 2}}
    path = write_config(tmp_path / "limited.yaml", options(name="limited", **changes))
    done = processes.run("trajectory:main_with_limited_memory", "--config", str(path), env={"LIMIT_AT": "step 3"})
    assert done.returncode == 0, done.stderr
    assert "step 3: out of memory; repeating the batch with micro_batch 64" in done.stderr
    ours, theirs = (load_file(run_ / "model/model.safetensors") for run_ in (tmp_path / "runs/limited", run(**changes)))
    assert all((tensor - theirs[name]).abs().max() < 1e-5 for name, tensor in ours.items())


FAULTS = """
import resource, torch
from training import device as devices
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
cpu = torch.device("cpu")
torch.ones(2**22)  # once it is freed, glibc by itself puts tensors up to its size on the heap
devices.release_freed_memory(cpu)
before = resident()
tensors = [torch.ones(2**20) for _ in range(50)]
del tensors[:-1]  # the last one would lie at the heap's end
n_bytes = resident() - before
new = [faults() for _ in range(2)]
devices.keep_freed_memory(cpu)
kept = [faults() for _ in range(20)]  # at first small blocks lie between the freed ones
devices.reset_peak_memory(cpu)
after = [faults() for _ in range(20)]
devices.release_freed_memory(cpu)
print(new[-1], kept[-1], after[0], after[-1], *[faults() for _ in range(2)], n_bytes)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has an option to keep freed memory")
def test_freed_memory_is_reused_without_page_faults_until_it_is_released():
    """The search for the peak releases it, and so does scarce memory."""
    done = command("-c", FAULTS)
    assert done.returncode == 0, done.stderr
    new, kept, after, kept_again, *released, n_bytes = map(int, done.stdout.split())
    assert max(kept, kept_again) < new / 10, done.stdout
    assert min(after, *released) > new / 2, done.stdout
    assert n_bytes < 2**25, "one tensor keeps the memory of others"
