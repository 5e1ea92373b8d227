"""The micro-batch that fits, and what happens where it no longer does."""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, rows, tensors, write_config
from safetensors.torch import load_file
from trajectory import out_of_memory_at

from training import checkpoint
from training import device as devices
from training.engine import micro_batch as fit
from training.engine.step import train_step
from training.errors import UserError

CPU = torch.device("cpu")


def weights(run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.model.state_dict().items()}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def halved(build_run):
    """Weights after four steps, of which the last two were made with half the micro-batch."""
    run = build_run(name="halved")
    for step in range(4):
        run.micro_batch = 4 if step < 2 else 2
        train_step(run)
    return weights(run)


@pytest.mark.parametrize("micro_batch", [0, 1])
@pytest.mark.parametrize("where", ["model", "second block", "backward"])
def test_a_batch_whose_memory_ran_out_is_begun_again_in_halves(build_run, halved, capsys, micro_batch, where):
    run = build_run(name="failing")
    for step in range(4):
        if step == 2 and where == "backward":
            run.model.blocks[0].register_full_backward_pre_hook(raise_at(micro_batch))
        elif step == 2:
            out_of_memory_at(run.model if where == "model" else run.model.blocks[1], micro_batch)
        train_step(run)
    assert equal(weights(run), halved)
    assert (run.micro_batch, run.back_offs) == (2, 1)
    said = [line for line in capsys.readouterr().err.splitlines() if "memory" in line]
    assert said == ["step 3: out of memory; the same batch again, 2 samples at a time from here"]


def raise_at(call: int):
    calls = iter(range(100))

    def fail(*_):
        if next(calls) == call:
            raise torch.OutOfMemoryError("out of memory, by the test")

    return fail


def test_metrics_of_a_batch_begun_again_count_once(build_run):
    whole, failing = build_run(name="whole"), build_run(name="failing")
    out_of_memory_at(failing.model.blocks[1], 1)
    for run in (whole, failing):
        train_step(run)
    (ours,), (theirs,) = failing.metrics.fetch(), whole.metrics.fetch()
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
    assert ours["expert_load"] == theirs["expert_load"]


def test_after_one_sample_at_a_time_blocks_are_computed_again_and_then_it_ends_in_a_line(build_run, capsys):
    run = build_run(micro_batch=1)
    out_of_memory_at(run.model, 0)
    train_step(run)
    assert run.layout.activation_checkpointing == "full"
    said = "step 1: out of memory; the same batch again, with parallel.recompute: full from here"
    assert said in capsys.readouterr().err
    whole = build_run(name="whole", micro_batch=1)
    train_step(whole)
    assert equal(weights(run), weights(whole))
    out_of_memory_at(run.model, 0)
    with pytest.raises(UserError, match=r"step 2: not one sample of 32 tokens fits into [\d.]+ GiB; use a smaller"):
        train_step(run)


def test_another_error_is_no_lack_of_memory(build_run):
    run = build_run()
    run.model.register_forward_pre_hook(lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        train_step(run)


def test_a_tensor_beyond_all_memory_is_known_as_that():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert devices.is_out_of_memory(raised.value)
    assert not devices.is_out_of_memory(RuntimeError("expected a float"))


def test_auto_takes_the_whole_share_where_that_fits(build_run):
    run = build_run(micro_batch="auto")
    assert run.micro_batch == 8
    assert run.fits == {fit.place(run): {"micro_batch": 8, "recompute": "none"}}


def test_auto_tries_the_worst_routing_and_leaves_the_model_as_it_was(build_run):
    asked, found = build_run(name="asked", micro_batch=8), build_run(name="found", micro_batch="auto")
    assert equal(weights(asked), weights(found))
    for run in (asked, found):
        train_step(run)
    assert equal(weights(asked), weights(found))
    assert all(p.grad is None for p in found.model.parameters())

    routed = []
    found.model.blocks[0].ffn.register_forward_hook(lambda _m, _i, out: routed.append(out[1].topk_ids_NK))
    fit._fitting(found, 2)
    assert len(routed) == 2 and all((topk_ids_NK.sort().values == torch.tensor([0, 1])).all() for topk_ids_NK in routed)


@pytest.mark.parametrize(("gib", "fits"), [(1.9, 8), (1.3, 4), (1.05, 4), (0.95, 3), (0.85, 2), (0.7, 1)])
def test_auto_is_what_the_memory_holds(build_run, monkeypatch, gib, fits):
    """Of peaks of 0.6, 0.7, 0.8 GiB, nine tenths of the memory are used, in equal parts of the 8 samples."""
    run = build_run()
    monkeypatch.setattr(fit, "_peak", lambda _run, n: (round((0.5 + 0.1 * n) * 2**30), 0))
    monkeypatch.setattr(devices, "available_memory_bytes", lambda _device: gib * 2**30)
    assert fit._fitting(run, 8) == fits


def test_a_memory_too_small_for_one_sample_is_a_line(build_run, monkeypatch):
    monkeypatch.setattr(devices, "available_memory_bytes", lambda _device: 2**24)
    with pytest.raises(UserError, match=r"not one sample of 32 tokens fits into 0\.0 GiB, needs"):
        build_run(micro_batch="auto")


def test_what_was_found_is_remembered_for_its_place(run, build_run, monkeypatch):
    folder = run(name="small", micro_batch="auto", steps=8)
    state = json.loads((folder / "checkpoints/step-00000008/state.json").read_text())
    assert [known["micro_batch"] for known in state["micro_batch"].values()] == [8]
    monkeypatch.setattr(fit, "_fitting", lambda *_: 2)
    assert build_run(micro_batch="auto").micro_batch == 8
    assert build_run(micro_batch="auto", parallel={"device": "cpu", "recompute": "full"}).micro_batch == 2


def test_one_rank_without_memory_halves_on_all(options, tmp_path):
    outcomes = {}
    for name, failing in (("whole", ""), ("failing", "1:3")):
        path = write_config(tmp_path / f"{name}.yaml", options(name=name, micro_batch=2, parallel={"device": "cpu"}))
        done = command(
            "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            str(ROOT / "tests" / "trajectory.py"), str(tmp_path), str(path),
            env={"OUT_OF_MEMORY": failing},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        outcomes[name] = (
            json.loads((tmp_path / f"{name}.json").read_text()),
            load_file(tmp_path / f"{name}.safetensors"),
        )
        assert ("step 2: out of memory; the same batch again, 1 sample at a time" in done.stderr) == bool(failing)
    (ours, our_weights), (theirs, their_weights) = outcomes["failing"], outcomes["whole"]
    assert ours["tokens"] == theirs["tokens"]
    for name, tensor in our_weights.items():
        assert (tensor - their_weights[name]).abs().max() < 1e-6 * 8


LIMITED = """
import resource
from pathlib import Path
from training import cli, loop
from training.train import train
config = cli.load_config({path!r})
before = loop.train_step
def limited(run):
    if run.step == 2:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
        run.micro_batch = 128  # more than there was memory for so far, which stays the process's own
    before(run)
loop.train_step = limited
raise SystemExit(train(config))
"""


BUILT = """
import resource
from pathlib import Path
from training import cli, run
from training.train import main
before = run.restore
def limited(*arguments):
    before(*arguments)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
run.restore = limited
raise SystemExit(main(["--config", {path!r}]))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux, to limit a process's memory")
def test_where_memory_is_out_once_the_model_is_built_there_is_a_line_and_checkpoints_are_whole(options, run, tmp_path):
    """A real limit, from the moment on that the weights are restored; with memory again it goes on exactly."""
    wide = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 1024, "blocks": [{"ffn": {"type": "moe"}}, {}]}
    changes = {"model": wide, "batch_tokens": 2**12, "micro_batch": 4, "steps": 4, "checkpoint": {"every": 2}}
    folder = run(**changes)
    before = tensors(folder, 4), rows(folder)
    shutil.rmtree(folder / "checkpoints/step-00000004")
    path = write_config(tmp_path / "built.yaml", options(**changes))
    done = command("-c", BUILT.format(path=str(path)))
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "not one sample of 1024 tokens fits" in line and "use a smaller model.n_positions" in line
    assert checkpoint.corruption(folder / "checkpoints/step-00000002") is None
    run(**changes)
    assert (tensors(folder, 4), rows(folder)) == before


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux, to limit a process's memory")
def test_where_the_system_gives_no_more_memory_fewer_samples_go_at_a_time(options, run, tmp_path):
    """A real limit, from the third step on; saves, rows and the model are made within it."""
    wide = {"n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 128, "blocks": [{"ffn": {"type": "moe"}}, {}]}
    changes = {"model": wide, "batch_tokens": 2**14, "micro_batch": 32, "steps": 4, "checkpoint": {"every": 2}}
    path = write_config(tmp_path / "limited.yaml", options(name="limited", **changes))
    done = command("-c", LIMITED.format(path=str(path)))
    assert done.returncode == 0, done.stderr
    assert "step 3: out of memory; the same batch again, 64 samples at a time from here" in done.stderr
    ours, theirs = (load_file(run_ / "model/model.safetensors") for run_ in (tmp_path / "runs/limited", run(**changes)))
    assert all((tensor - theirs[name]).abs().max() < 1e-5 for name, tensor in ours.items())


FAULTS = """
import resource, torch
from training import device as devices
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**26)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
cpu = torch.device("cpu")
anew = [faults() for _ in range(2)]
devices.keep_freed_memory(cpu)
kept = [faults() for _ in range(20)]  # at first small things lie between what is freed
devices.reset_peak_memory(cpu)
after = [faults() for _ in range(20)]
devices.release_freed_memory(cpu)
print(anew[-1], kept[-1], after[0], after[-1], *[faults() for _ in range(2)])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")
def test_freed_memory_is_used_again_without_a_page_fault_until_a_peak_is_looked_for_or_it_is_scarce():
    done = command("-c", FAULTS)
    assert done.returncode == 0, done.stderr
    anew, kept, after, kept_again, *handed_back = map(int, done.stdout.split())
    assert max(kept, kept_again) < anew / 10, done.stdout
    assert min(after, *handed_back) > anew / 2, done.stdout
