"""Averaged weights in whole runs: their figures, resumes, ranks, the final model and exports."""

import json

import pytest
import torch
from conftest import rows, tensors, write_config
from safetensors.torch import load_file

from training.engine.load_run import load_run, mean_of_checkpoints
from training.errors import UserError
from training.train import train

AVERAGED = {
    "optim": {"type": "adamw", "learning_rate": 1e-2, "average": {"decay": 0.5}},
    "checkpoint": {"every": 1, "keep": 9},
}


def weights_of(folder, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/step-{step:08d}/model.safetensors")


def average_of(folder, step: int) -> dict[str, torch.Tensor]:
    """Return the stored average of a checkpoint."""
    state = load_file(folder / f"checkpoints/step-{step:08d}/optimizer.safetensors")
    return {key.removesuffix("/average"): tensor for key, tensor in state.items() if key.endswith("/average")}


def test_a_run_averages_its_weights_from_the_end_of_warm_up_and_evaluates_both(run, build_run):
    folder = run(**AVERAGED)
    assert average_of(folder, 2) == {}  # the warm-up has two steps
    expected = weights_of(folder, 3)
    for step in range(4, 9):
        expected = {name: (value + weights_of(folder, step)[name]) / 2 for name, value in expected.items()}
    average = average_of(folder, 8)
    assert set(average) == {name for name in expected if "selection_bias" not in name and not name.endswith("load")}
    assert all(torch.allclose(tensor, expected[name], atol=1e-6) for name, tensor in average.items())
    evaluated = [row for row in rows(folder) if "val_loss" in row]
    assert all(row["averaged_val_loss"] != row["val_loss"] for row in evaluated) and len(evaluated) == 2
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["averaged_val_loss"] == evaluated[-1]["averaged_val_loss"]
    alone = build_run(name="alone", **AVERAGED)
    alone.model.load_state_dict(weights_of(folder, 8) | average)
    assert alone.evaluate()["val_loss"] == pytest.approx(summary["averaged_val_loss"], rel=1e-6)
    plain = run(name="plain", **AVERAGED | {"optim": {"type": "adamw", "learning_rate": 1e-2}})
    assert all(torch.equal(tensor, weights_of(plain, 8)[name]) for name, tensor in weights_of(folder, 8).items())


def test_a_stopped_run_resumes_to_the_same_average(run, config, at_step):
    through = run(name="through", **AVERAGED)
    at_step.send(5)
    stopped = config(name="stopped", **AVERAGED)
    assert train(stopped) != 0
    assert train(stopped) == 0
    assert rows(stopped.run_dir) == rows(through) and tensors(stopped.run_dir, 8) == tensors(through, 8)
    assert any(
        key.endswith("/average") for key in load_file(through / "checkpoints/step-00000008/optimizer.safetensors")
    )


def test_ranks_compute_the_same_average(processes, options, run, tmp_path):
    alone = run(name="alone", **AVERAGED)
    for name, mesh in {"copies": {}, "shards": {"shard": 2, "expert": 2}}.items():
        path = write_config(tmp_path / f"{name}.yaml", options(name=name, parallel={"mesh": mesh}, **AVERAGED))
        ended = processes.run("training.train:main", "--config", str(path), n_ranks=2)
        assert ended.returncode == 0, ended.stderr
        folder = tmp_path / "runs" / name
        ours, theirs = average_of(folder, 8), average_of(alone, 8)
        assert ours.keys() == theirs.keys()
        assert all((tensor - theirs[key]).abs().max() < 1e-5 for key, tensor in ours.items())
        losses = [[row["averaged_val_loss"] for row in rows(each) if "val_loss" in row] for each in (folder, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert all((a - weights_of(alone, 8)[key]).abs().max() < 1e-5 for key, a in weights_of(folder, 8).items())


def test_the_average_may_decide_the_best_step_and_be_the_final_model(run, capsys):
    optim = AVERAGED["optim"] | {"average": {"decay": 0.5, "final": True}}
    evaluation = {"every": 2, "tokens": 512, "best": "average"}
    folder = run(**AVERAGED | {"optim": optim, "eval": evaluation})
    output = capsys.readouterr().out
    assert "average     of the weights, decay 0.5, from step 3 on; the final model has it" in output
    losses = {row["step"]: row["averaged_val_loss"] for row in rows(folder) if "averaged_val_loss" in row}
    summary = json.loads((folder / "summary.json").read_text())
    assert list(losses) == [4, 6, 8] and summary["best_of"] == "average"
    assert (summary["best_val_loss"], summary["best_step"]) == min((loss, step) for step, loss in losses.items())
    final, average = load_file(folder / "model/model.safetensors"), average_of(folder, 8)
    stored = {tensor.numpy().tobytes() for tensor in final.values()}
    assert sum(tensor.numpy().tobytes() in stored for tensor in average.values()) > len(average) // 2
    trained = {tensor.numpy().tobytes() for tensor in weights_of(folder, 8).values()}
    assert len(stored & trained) < len(stored) // 2


def test_without_an_average_none_can_be_best_or_exported(run, call, config):
    with pytest.raises(UserError, match=r"eval\.best: average needs optim\.average"):
        train(config(eval={"best": "average"}))
    folder = run()
    done = call("export", "--run", str(folder), "--average", "ema")
    assert done.returncode == 2 and done.stderr.startswith(f"error: --average ema: {folder} has no averaged weights")
    done = call("export", "--run", str(folder), "--average", "9")
    assert done.stderr == f"error: --average 9: {folder} has 2 checkpoints; checkpoint.keep sets how many are kept\n"
    for wrong in ("0", "-1", "x", "1.5"):
        assert (
            "neither a number of checkpoints nor ema"
            in call("export", "--run", str(folder), f"--average={wrong}").stderr
        )


def test_exports_hold_the_average_or_the_mean_of_checkpoints(run, call, tmp_path):
    model = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}
    folder = run(model=model, **AVERAGED)
    loaded = load_run(str(folder))
    assert all(torch.equal(tensor, average_of(folder, 8)[name]) for name, tensor in loaded.averages.items())
    mean, steps = mean_of_checkpoints(str(folder), 3)
    assert steps == [6, 7, 8]
    for name, tensor in mean.items():
        expected = torch.stack([weights_of(folder, step)[name].double() for step in steps]).mean(dim=0)
        assert torch.allclose(tensor.double(), expected, rtol=0, atol=1e-7), name
    for what, line, weights in (
        ("ema", "step 8, averaged weights", loaded.averages),
        ("3", "mean of steps 6, 7, 8", mean),
    ):
        out = tmp_path / what
        done = call("export", "--run", str(folder), "--out", str(out), "--average", what)
        assert done.returncode == 0 and f"{out}: gpt2, fp32, {line}\n" in done.stdout
        written = load_file(out / "model.safetensors")
        assert torch.equal(
            written["transformer.wte.weight"], weights["wte.weight"][: len(written["transformer.wte.weight"])]
        )
