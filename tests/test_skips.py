"""All ranks skip an update with NaN, Inf or a spike, and nothing of it stays."""

import json
import math
import random
import shutil
from copy import deepcopy
from functools import partial

import pytest
import torch
from conftest import poison_loss, rows, tensors, write_config
from safetensors.torch import load_file

from training import checkpoint, engine
from training.engine.guard import MAX_CONSECUTIVE, MIN_WINDOW, WINDOW
from training.engine.state import TrainState
from training.errors import UserError
from training.train import train


def spoil_gradient(name, value):
    def spoil(run, _):
        return dict(run.model.named_parameters())[name].register_hook(
            lambda gradient: gradient.index_fill(0, torch.tensor([1]), value)
        )

    return spoil


SPOILED = {
    "loss nan": lambda run, _: poison_loss(run.model, math.nan),
    "loss inf": lambda run, _: poison_loss(run.model, math.inf),
    "a row of a gradient": spoil_gradient("wte.weight", math.nan),
    "an expert": spoil_gradient("blocks.0.ffn.experts.up", math.inf),
}


def everything(run) -> dict[str, torch.Tensor]:
    return {**run.model.state_dict(), **run.optimizer.state_dict()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(build_run, spoil, optimizer, capsys):
    run = build_run(optim={"type": optimizer})
    for _ in range(2):
        run.train_step()
    before = {name: tensor.clone() for name, tensor in everything(run).items()}
    hook = spoil(run, math.nan)
    run.train_step()
    hook.remove()
    after = everything(run)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(p.grad is None for p in run.model.parameters())
    run.train_step()
    assert not torch.equal(before["wte.weight"], run.model.wte.weight)
    assert (run.state.step, run.state.guard.n_skipped, run.state.guard.consecutive) == (4, 1, 0)
    assert [row["skipped_steps"] for row in run.rows()] == [0, 0, 1, 1]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert line.startswith("step 3: ") and line.endswith("; update skipped")


def test_a_skipped_step_does_not_affect_the_other_steps(build_run):
    """A run that skips step 3 equals one without it, with the same learning rates in the other steps."""
    run, other = build_run(name="run"), build_run(name="other")
    for step in range(4):
        hook = poison_loss(run.model, math.nan) if step == 2 else None
        run.train_step()
        if hook is not None:
            hook.remove()
            other.state.step += 1
        else:
            other.train_step()
    ours, theirs = everything(run), everything(other)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_ten_skipped_steps_in_a_row_end_the_run_with_their_rows_and_no_checkpoint(config, tmp_path, at_step):
    at_step.poison(range(6, 41))
    with pytest.raises(
        UserError, match=rf"step 15: the last {MAX_CONSECUTIVE} losses or gradients were NaN or infinite"
    ):
        train(config(steps=40, checkpoint={"every": 3}, eval={"every": None, "tokens": 64}))
    folder = tmp_path / "runs/small"
    assert [step for step, _ in checkpoint.list_checkpoints(folder / "checkpoints")] == [3], (
        "no checkpoint of skipped steps"
    )
    for _, path in checkpoint.list_checkpoints(folder / "checkpoints"):
        loaded = checkpoint.load(path)
        assert all(tensor.isfinite().all() for tensor in [*loaded.model.values(), *loaded.optimizer.values()])
    log = rows(folder)
    assert [row["skipped_steps"] for row in log] == [0] * 5 + list(range(1, 11))
    assert [row["loss"] is None for row in log] == [False] * 5 + [True] * 10


def test_a_run_whose_last_step_was_skipped_ends_well(config, tmp_path, at_step, capsys):
    at_step.poison([8])
    assert train(config(logging={"every": 1, "tensorboard": True})) == 0
    folder = tmp_path / "runs/small"
    for text in [(folder / "summary.json").read_text(), *(folder / "metrics.jsonl").read_text().splitlines()]:
        assert "NaN" not in text
        json.loads(text, parse_constant=pytest.fail)
    assert json.loads((folder / "checkpoints/step-00000008/state.json").read_text(), parse_constant=pytest.fail)
    assert json.loads((folder / "summary.json").read_text())["skipped_steps"] == 1
    output = capsys.readouterr().out
    assert "step 8/8  loss nan" in output and "1 step was skipped" in output


def test_a_resumed_run_keeps_its_skip_counts(build_run):
    run = build_run()
    hook = poison_loss(run.model, math.nan)
    for _ in range(3):
        run.train_step()
    hook.remove()
    run.save()
    run.close()
    again = build_run()
    assert (again.state.step, again.state.guard.n_skipped, again.state.guard.consecutive) == (3, 3, 3)


def test_a_resumed_run_keeps_every_count_and_both_windows(build_run):
    run = build_run(skip_spikes=3.0, precision="fp16")
    run.state.guard.n_skipped, run.state.guard.consecutive, run.state.guard.consecutive_spikes = 7, 4, 3
    run.state.guard.losses.extend(range(100, 140))
    run.state.guard.norms.extend(range(200, 240))
    run.state.loss_scale.scale, run.state.loss_scale.good_steps = 2.0**7, 11
    before = deepcopy((run.state.guard, run.state.loss_scale))
    run.save()
    run.close()
    again = build_run(skip_spikes=3.0, precision="fp16")
    for ours, theirs in zip((again.state.guard, again.state.loss_scale), before, strict=True):
        for name, value in vars(theirs).items():
            assert getattr(ours, name) == value, name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_evaluation_that_alone_is_not_finite_ends_the_run_and_is_not_saved(config, tmp_path, monkeypatch, value):
    """Every training loss is finite; the validation loss is not."""
    evaluate = engine.evaluate

    def spoiled(setup, tokenizer):
        hook = poison_loss(setup.model.model, value)
        figures = evaluate(setup, tokenizer)
        hook.remove()
        return figures

    monkeypatch.setattr(engine, "evaluate", spoiled)
    with pytest.raises(UserError, match=rf"^step 4: val_loss is {value}, and nothing more is saved; lower"):
        train(config())
    folder = tmp_path / "runs/small"
    assert [step for step, _ in checkpoint.list_checkpoints(folder / "checkpoints")] == [3]
    log = rows(folder)
    assert [row["step"] for row in log] == [1, 2, 3, 4] and all(row["loss"] is not None for row in log)
    assert log[-1]["val_loss"] is None and log[-1]["skipped_steps"] == 0


def test_a_step_that_is_nan_on_one_rank_is_skipped_by_all(processes, options, build_run, tmp_path):
    alike = {"micro_batch": 2, "parallel": {"device": "cpu"}}
    path = write_config(tmp_path / "poisoned.yaml", options(name="poisoned", **alike))
    ranks = {"POISON": "1:3", "STOP_AT": "2"}
    done = processes.run("trajectory:main", str(tmp_path), str(path), n_ranks=2, env=ranks)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("step 2: loss is nan; update skipped") == 1
    poisoned, run = load_file(tmp_path / "poisoned.safetensors"), build_run(name="one", **alike)
    run.train_step()
    assert all((tensor - run.model.state_dict()[name]).abs().max() < 1e-6 for name, tensor in poisoned.items())
    run.train_step()
    assert run.state.guard.n_skipped == 0
    assert any((tensor - run.model.state_dict()[name]).abs().max() > 1e-6 for name, tensor in poisoned.items())


def test_a_spike_is_skipped_and_a_new_level_is_soon_accepted():
    guard, noise = TrainState.new().guard, random.Random(0)
    reason_to_skip = partial(guard.reason_to_skip, spike_limit=6.0)
    level = 3.0
    for _ in range(MIN_WINDOW):
        assert reason_to_skip(level + noise.gauss(0, 0.1), 1 + noise.gauss(0, 0.1)) is None
    assert reason_to_skip(level + 0.3, 1.2) is None
    assert reason_to_skip(level + 3, 1.0).startswith("loss is 6, after a mean of")
    assert reason_to_skip(level, 5.0).startswith("grad_norm is 5, after a mean of")
    assert reason_to_skip(level - 3, 0.1) is None, "a lower loss is no spike"
    assert guard.n_skipped == 2
    reasons = [reason_to_skip(level + 50, 1.0) for _ in range(MAX_CONSECUTIVE + 1)]
    assert all(reasons[:MAX_CONSECUTIVE]) and reasons[MAX_CONSECUTIVE] is None
    assert reason_to_skip(level + 50, 1.0) is None, "the new level is no spike"


@pytest.mark.parametrize("spike_limit", [3.0, None])
def test_the_window_of_spikes_is_part_of_the_state_while_spikes_are_skipped(tmp_path, spike_limit):
    state, path = TrainState.new(), tmp_path / "state.json"
    state.config = {"skip_spikes": spike_limit}
    for step in range(2 * WINDOW):
        state.guard.reason_to_skip(3 + math.sin(step), 1.0, 3.0)
    path.write_text(json.dumps(state.to_json()))
    counts = {"total": 0, "in_a_row": 0, "spikes": 0}
    assert json.loads(path.read_text())["skips"].keys() == counts.keys() | ({"losses", "norms"} if spike_limit else ())
    again = TrainState.load(path)
    if spike_limit is None:  # another run's windows would be stale when spikes are skipped again
        state.guard.losses, state.guard.norms = [], []
    assert again == state
    assert len(again.guard.losses) == (WINDOW if spike_limit else 0)


def test_a_run_with_skipped_spikes_resumes_to_the_same_bits(run, config):
    spiky = {
        "steps": 60,
        "skip_spikes": 1.0,
        "batch_tokens": 32,
        "eval": {"every": None, "tokens": 64},
        "checkpoint": {"every": 30},
    }
    through = run(name="through", **spiky)
    skipped = rows(through)[-1]["skipped_steps"]
    assert 0 < skipped < 30
    run(name="stopped", **spiky)
    shutil.rmtree(through.with_name("stopped") / "checkpoints/step-00000060")
    train(config(name="stopped", **spiky))
    assert rows(through.with_name("stopped")) == rows(through)
    assert tensors(through.with_name("stopped"), 60) == tensors(through, 60)
