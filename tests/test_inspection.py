"""Figures by layer, traces of a running job, and runs that stop early."""

import gzip
import json
import math
import shutil

import pytest
import torch
from conftest import rows, tensors, write_config

from training import device
from training.config import Config
from training.train import train

LOGGING = {"every": 1, "tensorboard": False, "histogram_every": 1}
ADAMW_AND_MORE = [{}, {"type": "muon"}]


def blocks_of(model) -> list[torch.Tensor]:
    """Return the weights of each block as one vector in float64."""
    return [torch.cat([p.detach().double().flatten() for p in block.parameters()]) for block in model.blocks]


@pytest.mark.parametrize("optim", ADAMW_AND_MORE, ids=["adamw", "muon"])
def test_the_figures_of_a_layer_are_those_of_its_tensors(build_run, optim):
    run = build_run(logging=LOGGING, optim=optim)
    gradients, streams = [], [[] for _ in run.model.blocks]
    update = run.optimizer.step
    hooks = [
        block.register_forward_hook(lambda _m, _i, out, into=into: into.append(out[0].detach().double()))
        for block, into in zip(run.model.blocks, streams, strict=True)
    ]

    def step(*args, **kwargs):
        gradients[:] = [
            torch.cat([p.grad.double().flatten() for p in block.parameters() if p.grad is not None])
            for block in run.model.blocks
        ]
        update(*args, **kwargs)

    run.optimizer.step = step
    before = blocks_of(run.model)
    run.train_step()
    for hook in hooks:
        hook.remove()
    (row,) = run.rows()
    after, layers = blocks_of(run.model), row["layers"]
    factor = min(1.0, run.config.optim.grad_clip / (row["grad_norm"] + 1e-6))
    expected = {
        "grad_norm": [float(gradient.norm()) / factor for gradient in gradients],
        "weight_norm": [float(weights.norm()) for weights in before],
        "update_ratio": [float((b - a).norm() / b.norm()) for b, a in zip(before, after, strict=True)],
        "residual_rms": [float(torch.cat(stream).square().mean().sqrt()) for stream in streams],
    }
    assert layers.keys() == expected.keys()
    for name, values in expected.items():
        assert layers[name] == pytest.approx(values, rel=1e-4), name
    assert row["learning_rates"]["embedding"] == pytest.approx(row["learning_rate"])


def test_figures_come_at_their_interval_and_leave_the_run_as_it_is(run):
    with_figures, without = (
        run(name=name, logging=LOGGING | {"histogram_every": every}) for name, every in (("a", 4), ("b", 100))
    )
    assert [row["step"] for row in rows(with_figures) if "layers" in row] == [4, 8]
    plain = [{k: v for k, v in row.items() if k not in ("layers", "learning_rates")} for row in rows(with_figures)]
    assert plain == rows(without) and tensors(with_figures, 8) == tensors(without, 8)
    page = (with_figures / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "Inside the layers" in page
    assert "Inside the layers" not in (without / "report.html").read_text()


def test_without_memory_for_a_copy_the_update_ratio_is_left_out(build_run, monkeypatch):
    monkeypatch.setattr(device, "free_memory_bytes", lambda _: 0)
    run = build_run(logging=LOGGING)
    run.train_step()
    assert run.rows()[0]["layers"].keys() == {"grad_norm", "weight_norm", "residual_rms"}


def test_the_figures_of_two_ranks_are_those_of_one(processes, options, tmp_path):
    """In each layout: replicated, sharded, and experts split."""
    found = {}
    layouts = [("one", {}, 1), ("both", {}, 2), ("shard", {"shard": 2}, 2), ("expert", {"expert": 2}, 2)]
    for name, mesh, n_ranks in layouts:
        changes = {"name": name, "micro_batch": 2, "steps": 2, "logging": LOGGING}
        config = Config.model_validate(options(**changes, parallel={"device": "cpu", "mesh": mesh}))
        path = write_config(tmp_path / f"{name}.yaml", config.model_dump(mode="json"))
        done = processes.run("training.train:main", "--config", str(path), n_ranks=n_ranks)
        assert done.returncode == 0, done.stderr
        found[name] = rows(config.run_dir)[-1]["layers"]
    for layers in found.values():
        for key, values in found["one"].items():
            assert layers[key] == pytest.approx(values, rel=2e-3), key


def test_a_trace_is_recorded_on_demand_and_at_its_step(config, capsys):
    run = config(logging=LOGGING | {"trace_at": [2]}, eval={"every": None, "tokens": 256})
    assert train(run) == 0
    path = run.run_dir / "traces/step-00000002.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) > 3
    output = capsys.readouterr().out
    assert f"trace: {path}" in output and "% compute" in output and "operations: " in output
    plain = config(name="plain", logging=LOGGING, eval={"every": None, "tokens": 256})
    assert train(plain) == 0
    assert rows(run.run_dir) == rows(plain.run_dir)

    (run.run_dir / "trace").touch()  # what `touch` does while it runs
    shutil.rmtree(run.run_dir / "checkpoints/step-00000008")
    assert train(run.model_copy(update={"logging": plain.logging})) == 0
    assert not (run.run_dir / "trace").exists() and (run.run_dir / "traces/step-00000007.json.gz").exists()


def losing(monkeypatch, losses: list[float]) -> None:
    """Let the evaluations have these losses, one after another; the last one repeats."""
    from training import engine

    evaluate, seen = engine.evaluate, []

    def scripted(setup, tokenizer):
        seen.append(1)
        return evaluate(setup, tokenizer) | {"val_loss": losses[min(setup.state.step // 2, len(losses)) - 1]}

    monkeypatch.setattr(engine, "evaluate", scripted)


def test_a_run_out_of_patience_stops_with_its_best_model_and_stays_stopped(config, monkeypatch, capsys):
    losing(monkeypatch, [3.0, 2.0, 2.5, 2.2, 1.0])
    small = config(steps=20, eval={"every": 2, "tokens": 256, "patience": 2}, checkpoint={"every": 3})
    assert train(small) == 0
    summary = json.loads((small.run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["best_step"], summary["model_step"], summary["stopped_early"]) == (8, 4, 4, True)
    assert "eval.patience: no lower loss in 2 evaluations; stopped early at step 8" in capsys.readouterr().out
    model = (small.run_dir / "model/model.safetensors").read_bytes()
    assert train(small) == 0
    assert len(rows(small.run_dir)) == 8 and (small.run_dir / "model/model.safetensors").read_bytes() == model
    assert train(small.model_copy(update={"eval": small.eval.model_copy(update={"patience": 3})})) == 0
    assert len(rows(small.run_dir)) == 16  # best at step 10
    assert math.isclose(json.loads((small.run_dir / "summary.json").read_text())["best_val_loss"], 1.0)


def test_a_killed_run_stops_where_it_would_have_stopped(config, monkeypatch, at_step, run):
    losing(monkeypatch, [3.0, 2.0, 2.5, 2.2, 2.1])
    changes = {"steps": 20, "eval": {"every": 2, "tokens": 256, "patience": 2}, "checkpoint": {"every": 3}}
    whole = run(name="whole", **changes)
    at_step.send(7)
    assert train(config(name="cut", **changes)) == 128 + 15
    at_step.clear()
    cut = run(name="cut", **changes)
    assert rows(cut) == rows(whole) and tensors(cut, 8) == tensors(whole, 8)
