"""A run that trains for longer in its own folder, and runs that branch off from another one."""

import hashlib
import json
import shlex
import signal
from pathlib import Path

import pytest
from conftest import rows, tensors, write_config
from test_restart import names

from training.errors import UserError
from training.train import train

CONSTANT = {"type": "constant", "warmup_steps": 2}
WSD = {"type": "wsd", "warmup_steps": 2, "decay_steps": 4}


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


# --- in place ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule", [CONSTANT, {"type": "inverse_sqrt", "warmup_steps": 2}, WSD], ids=lambda schedule: schedule["type"]
)
def test_a_run_with_more_steps_is_the_run_that_had_them_from_the_start(run, config, at_step, schedule):
    """wsd is stopped on its plateau, at the step where its decay would begin."""
    through = run(name="through", steps=12, schedule=schedule)
    if schedule["type"] == "wsd":
        at_step.send(4, signal.SIGTERM)
        assert train(config(schedule=schedule)) == 128 + signal.SIGTERM
        at_step.clear()
        short = config().run_dir
    else:
        short = run(schedule=schedule)
        old_model = (short / "model/model.safetensors").read_bytes()
        assert summary_of(short)["steps"] == 8
        at_step.die(10)
        with pytest.raises(KeyboardInterrupt):
            run(schedule=schedule, steps=12)
        at_step.clear()
        assert (short / "model/model.safetensors").read_bytes() == old_model and summary_of(short)["steps"] == 8
    run(schedule=schedule, steps=12)
    assert tensors(short, 12) == tensors(through, 12)
    assert rows(short) == rows(through)
    assert (short / "model/model.safetensors").read_bytes() == (through / "model/model.safetensors").read_bytes()
    assert summary_of(short)["steps"] == 12


def test_a_run_in_its_decay_goes_on_from_a_kept_checkpoint_before_it(run, capsys):
    saves = {"every": 2, "keep": 9}
    through = run(name="through", steps=14, schedule=WSD, checkpoint=saves)
    short = run(steps=10, schedule=WSD, checkpoint=saves)
    capsys.readouterr()
    run(steps=14, schedule=WSD, checkpoint=saves)
    line = f"{short}: its learning rate decayed from step 7 on; going on from step-00000006, before that; later ones"
    assert line in capsys.readouterr().out
    assert names(short)[-2:] == ["undone-0-step-00000008", "undone-0-step-00000010"]
    assert tensors(short, 14) == tensors(through, 14) and rows(short) == rows(through)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"schedule": WSD}, "steps: 8 -> 12; its learning rate was another one from step 5 on"),
        ({"schedule": {"warmup_steps": 2}}, "steps: 8 -> 12; its learning rate was another one from step 4 on"),
        ({"schedule": {"type": "wsd", "warmup": 0.25, "decay": 0.5}}, "small/config.yaml has its warm-up and decay in"),
        ({"schedule": WSD, "seed": 1}, "seed: 0 -> 1; steps: 8 -> 12; its learning rate was another one"),
    ],
)
def test_more_steps_that_would_change_what_was_done_are_refused_with_the_way_out(finished, config, changes, reason):
    options = {"checkpoint": {"every": None, "keep_best": False}, "schedule": changes["schedule"]}
    folder = finished(**options)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        train(config(**options | changes, steps=12))
    assert reason in str(error.value) and f"with --branch {folder} to go on from" in str(error.value)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_warm_up_is_not_a_plateau_to_go_back_to(finished, config):
    """Cosine has the rates of a longer cosine in its warm-up: a checkpoint there would throw away all else."""
    options = {"schedule": {"warmup_steps": 4}, "checkpoint": {"every": 2, "keep": 9}}
    finished(**options)
    with pytest.raises(UserError, match="from step 6 on"):
        train(config(**options, steps=12))


def test_a_schedule_may_change_where_it_has_not_begun_to_differ(run, config, at_step):
    through = run(name="through", schedule=WSD)
    at_step.send(4, signal.SIGTERM)
    assert train(config(schedule=CONSTANT, steps=20)) == 128 + signal.SIGTERM
    at_step.clear()
    folder = run(schedule=WSD)
    assert tensors(folder, 8) == tensors(through, 8)


# --- branches ----------------------------------------------------------------------------------------


def branch_of(config, path: Path, **changes) -> Path:
    """Train a branch; return its folder."""
    options = config(**changes)
    assert train(options, branch=str(path)) == 0
    return options.run_dir


def test_a_branch_without_changes_is_its_parent(finished, config):
    parent = finished()
    branch = branch_of(config, parent / "checkpoints/step-00000006", name="branch")
    assert tensors(branch, 8) == tensors(parent, 8)
    assert rows(branch) == rows(parent)
    copied, own = ((folder / "metrics.jsonl").read_text().splitlines() for folder in (branch, parent))
    assert copied[:6] == own[:6] and copied[7] != own[7]  # the times
    assert summary_of(branch)["time"]["redone"] == summary_of(parent)["time"]["redone"] == 0


def test_a_branch_changes_the_learning_rate_from_its_step_on_and_keeps_its_lineage(finished, config, capsys):
    parent = finished()
    optim = {"type": "adamw", "learning_rate": 1e-4}
    changes = {"optim.learning_rate": [config().optim.learning_rate, 1e-4], "steps": [8, 10]}
    branch = branch_of(config, parent / "checkpoints/step-00000006", name="branch", optim=optim, steps=10)
    assert rows(branch)[:6] == rows(parent)[:6] and len(rows(branch)) == 10
    assert rows(branch)[6]["loss"] == rows(parent)[6]["loss"]  # before the first update with the other rate
    assert rows(branch)[7]["loss"] != rows(parent)[7]["loss"]
    assert max(row["learning_rate"] for row in rows(branch)[6:]) <= 1e-4
    (ancestor,) = summary_of(branch)["lineage"]
    manifest = parent / "checkpoints/step-00000006/manifest.json"
    assert ancestor.pop("checkpoint_sha256") == checkpoint_hash(manifest)
    assert ancestor == {"run": str(parent), "step": 6, "changes": changes}
    assert json.loads((branch / "run.json").read_text())["facts"]["lineage"] == summary_of(branch)["lineage"]
    header = f"{parent} at step 6 (optim.learning_rate: "
    assert header in capsys.readouterr().out and header in (branch / "report.html").read_text()

    second = branch_of(config, branch, name="second", optim=optim, steps=12, seed=3)
    first, last = summary_of(second)["lineage"]
    assert first == summary_of(branch)["lineage"][0]
    assert (last["run"], last["step"], last["changes"]) == (str(branch), 10, {"seed": [0, 3], "steps": [10, 12]})
    assert rows(second)[:10] == rows(branch) and len(rows(second)) == 12


def checkpoint_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_tensorboard_and_the_report_show_the_parents_curve(run, config, at_step):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    parent = run(name="parent", logging={"every": 2, "histogram_every": 4})
    at_step.die(7)
    logged = {"name": "branch", "optim": {"learning_rate": 1e-4}, "logging": {"every": 1, "histogram_every": 4}}
    with pytest.raises(KeyboardInterrupt):
        branch_of(config, parent / "checkpoints/step-00000006", **logged)
    at_step.clear()
    branch = branch_of(config, parent / "checkpoints/step-00000006", **logged)
    losses = [(row["step"], pytest.approx(row["loss"])) for row in rows(branch)]
    accumulator = events.EventAccumulator(str(branch / "tensorboard"))
    accumulator.Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("train/loss")] == losses
    assert f"went from {rows(parent)[0]['loss']:.2f} to" in (branch / "report.html").read_text()
    assert [row["step"] for row in rows(branch)] == list(range(1, 9))


@pytest.mark.parametrize("step", [7, 8])
def test_a_killed_branch_resumes_by_the_same_command(finished, config, at_step, step):
    """Before its first checkpoint, of step 7, it needs its parent again; after that, no longer."""
    parent = finished()
    path, options = parent / "checkpoints/step-00000006", {"optim": {"learning_rate": 1e-4}, "checkpoint": {"every": 1}}
    through = branch_of(config, path, **options, name="through")
    at_step.die(step)
    with pytest.raises(KeyboardInterrupt):
        branch_of(config, path, **options, name="branch")
    at_step.clear()
    if step == 8:
        parent.rename(parent.with_name("moved"))
    branch = branch_of(config, path, **options, name="branch")
    assert tensors(branch, 8) == tensors(through, 8) and rows(branch) == rows(through)
    assert summary_of(branch)["lineage"] == summary_of(through)["lineage"]


def test_a_branch_may_read_other_text(finished, config, options):
    parent = finished()
    sources = options()["data"]["sources"][:1]
    branch = branch_of(
        config, parent / "checkpoints/step-00000006", name="b", data=options()["data"] | {"sources": sources}
    )
    assert "data.sources.1.paths.0" in summary_of(branch)["lineage"][0]["changes"]
    assert rows(branch)[6]["loss"] != rows(parent)[6]["loss"]


def test_a_branch_may_have_a_larger_batch_from_its_step_on(finished, config):
    parent = finished()
    stages = [{"from_tokens": 0, "batch_tokens": 256}, {"from_tokens": 6 * 256, "batch_tokens": 512}]
    path, changes = parent / "checkpoints/step-00000006", {"batch_tokens": None, "batch_schedule": stages}
    branch = branch_of(config, path, name="branch", **changes)
    assert [row["tokens"] for row in rows(branch)] == [256 * n for n in (1, 2, 3, 4, 5, 6, 8, 10)]


def test_what_cannot_branch_is_one_line(finished, config, options, tmp_path):
    parent = finished()
    path = parent / "checkpoints/step-00000006"
    model = options()["model"]
    data = options()["data"]
    keeps = f"--branch {path}: a branch keeps the model, the type of the optimizer and the batches before it, but "
    for changes, problem in (
        ({"model": model | {"n_layer": 3}}, f"{keeps}model.n_layer: 2 -> 3; leave"),
        ({"model": model | {"rope_theta": 5.0}}, f"{keeps}model.rope_theta: 10000.0 -> 5.0; leave"),
        ({"optim": {"type": "lion"}}, f"{keeps}optim.type: adamw -> lion; leave"),
        ({"batch_tokens": 512}, f"{keeps}batch_tokens: 256 -> 512; leave"),
        (
            {"data": data | {"tokenizer": {"type": "bpe", "vocab_size": 257}}},
            f"--branch {path}: data.tokenizer gives other tokens than {parent / 'tokenizer'}",
        ),
        (
            {"steps": 6},
            f"--branch {path}: it is at step 6, and steps is 6; they count from its beginning, "
            "so give more, such as --steps 12",
        ),
        ({"name": "small"}, f"--branch {path}: a run cannot branch off from itself; choose another --name"),
    ):
        with pytest.raises(UserError) as error:
            train(config(**{"name": "branch"} | changes), branch=str(path))
        assert str(error.value).startswith(problem)
    assert not (parent.parent / "branch").exists()
    with pytest.raises(UserError, match="elsewhere: not a checkpoint, or a run with a checkpoint"):
        train(config(name="branch"), branch=str(tmp_path / "elsewhere"))
    finished(name="other")
    with pytest.raises(UserError, match="holds a run that is no branch; choose another --name"):
        train(config(name="other"), branch=str(path))
    branch_of(config, path, name="branch")
    with pytest.raises(UserError, match=f"holds a branch of {parent}; choose another --name"):
        train(config(name="branch"), branch=str(parent.parent / "other"))


def test_a_flag_for_two_starts_is_one_line(call, options, tmp_path):
    path = write_config(tmp_path / "c.yaml", options())
    done = call("train", "--config", str(path), "--branch", "a", "--resume", "b")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith("error: --branch: leave")


def test_a_branch_of_a_run_from_init_from_needs_no_folder(finished, run, config):
    first = finished(name="first")
    parent = run(name="parent", model={}, init_from=str(first / "model"))
    first.rename(first.with_name("elsewhere"))
    branch = branch_of(config, parent, name="branch", model={}, init_from=str(first / "model"), steps=10)
    assert rows(branch)[:8] == rows(parent)


# --- the printed command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "ends"),
    [
        ({"schedule": CONSTANT}, "--steps 16"),
        ({"schedule": WSD, "checkpoint": {"every": 2, "keep": 4}}, "--steps 16"),
        ({"schedule": WSD, "checkpoint": {"every": None, "keep_best": False}}, "--name small-longer"),
        ({}, "--name small-longer"),
    ],
    ids=["constant", "wsd with a checkpoint", "wsd", "cosine"],
)
def test_the_printed_command_trains_for_longer(run, call, changes, ends):
    folder = run(**changes)
    printed = summary_of(folder)["next"][-1]
    assert printed.endswith(ends)
    _python, _m, module, *arguments = shlex.split(printed)
    done = call(module.removeprefix("training."), *arguments)
    assert done.returncode == 0, done.stderr
    last = folder if "--branch" not in arguments else folder.with_name("small-longer")
    assert summary_of(last)["steps"] == 16 and len(rows(last)) == 16
