"""Whole runs: their results do not depend on how they are executed, and they resume after any stop."""

import json
import shutil
import signal

import pytest
import torch
from conftest import command, rows, tensors, write_config
from launched import ForkedRanks, wait_for_rows
from torch.utils._python_dispatch import TorchDispatchMode

from training.config import Config
from training.errors import UserError
from training.train import train


def names_in(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def losses(folder) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in rows(folder)]


def test_a_run_leaves_the_files_it_promises(run):
    folder = run(logging={"every": 2, "tensorboard": True, "histogram_every": 4})
    written = rows(folder)
    assert [row["step"] for row in written] == list(range(1, 9))
    assert [row["step"] for row in written if "val_loss" in row] == [4, 8]
    assert written[3]["samples"][0]["prompt"] == "def "
    assert len(written[0]["expert_load"]) == 1 and sum(written[0]["expert_load"][0]) == pytest.approx(1)
    assert names_in(folder) >= {
        "config.yaml",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "model",
        "summary.json",
        "report.html",
    }
    assert names_in(folder / "checkpoints") == {"step-00000006", "step-00000008"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 8 and summary["tokens"] == 8 * 256
    assert summary["train_loss"] == written[-1]["loss"] and summary["val_loss"] == written[-1]["val_loss"]
    assert all(name.endswith((".safetensors", ".json")) for name in names_in(folder / "checkpoints/step-00000008"))


def test_training_makes_the_loss_fall(run):
    falling = losses(run(steps=40, optim={"type": "muon", "learning_rate": 0.01}, eval={"every": None, "tokens": 256}))
    assert falling[-1][0] < falling[0][0] - 1.5
    assert falling[-1][0] < falling[len(falling) // 2][0] < falling[0][0]


@pytest.mark.parametrize("micro_batch", [1, 3, 8])
def test_losses_do_not_depend_on_the_micro_batch(run, micro_batch):
    whole, cut = run(name="whole", micro_batch=8), run(name="cut", micro_batch=micro_batch)
    for ours, theirs in zip(losses(cut), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_equals_the_run_that_never_stopped(run, config, optimizer, at_step):
    through = run(name="through", optim={"type": optimizer})
    stopped = config(name="stopped", optim={"type": optimizer})
    at_step.send(5, signal.SIGTERM)
    assert train(stopped) == 128 + signal.SIGTERM
    assert len(rows(stopped.run_dir)) == 5
    assert train(stopped) == 0
    assert tensors(stopped.run_dir, 8) == tensors(through, 8)
    assert rows(stopped.run_dir) == rows(through)


def test_rows_after_the_checkpoint_are_not_written_twice(run, config, at_step):
    seldom = {"every": 3, "keep_best": False}
    through = run(name="through", checkpoint=seldom)
    killed = config(name="killed", checkpoint=seldom)
    at_step.die(5)  # past the save at step 3 and the evaluation at step 4
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    at_step.clear()
    assert train(killed) == 0
    assert rows(killed.run_dir) == rows(through)
    assert tensors(killed.run_dir, 8) == tensors(through, 8)


def test_intervals_of_evaluation_saves_and_logs_change_no_bit(run):
    often = run(name="often", eval={"every": 1, "tokens": 256}, checkpoint={"every": 1}, logging={"every": 1})
    rarely = run(name="rarely", eval={"every": None, "tokens": 64}, checkpoint={"every": None}, logging={"every": 50})
    assert tensors(often, 8) == tensors(rarely, 8)
    assert losses(often) == losses(rarely)


def test_a_finished_run_started_again_says_so_and_changes_nothing(run, finished, capsys):
    folder = finished()
    before, times = tensors(folder, 8), rows(folder)
    run()
    assert tensors(folder, 8) == before and rows(folder) == times
    assert "resuming from step 8" in " ".join(capsys.readouterr().out.split())


def test_other_options_in_a_used_folder_are_an_error_that_lists_them(finished, config):
    finished()
    changed = config(seed=1, micro_batch=2, optim={"learning_rate": 1.0}, logging={"every": 1, "tensorboard": False})
    with pytest.raises(UserError) as error:
        train(changed)
    assert "optim.learning_rate: 0.0006 -> 1.0; seed: 0 -> 1; choose another --name" in str(error.value)
    assert "micro_batch" not in str(error.value) and "logging" not in str(error.value)


def test_starting_over_moves_the_old_run_aside(run, finished, tmp_path):
    folder = finished()
    (folder / "mine.txt").write_text("kept")
    run(resume="never", steps=4)
    assert (tmp_path / "runs/small.old-1/mine.txt").read_text() == "kept"
    assert len(rows(folder)) == 4


def test_a_run_can_start_from_another_runs_checkpoint(run, finished):
    first = finished(name="first")
    branched = run(name="branched", resume=str(first / "checkpoints/step-00000006"), steps=9)
    assert [row["step"] for row in rows(branched)] == [7, 8, 9]
    run(name="branched", resume=str(first), steps=9)  # its own checkpoint comes first
    assert [row["step"] for row in rows(branched)] == [7, 8, 9]


def test_a_checkpoint_of_another_model_is_an_error(finished, config):
    first = finished(name="first")
    other = config(name="other", steps=9, model={"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32})
    with pytest.raises(UserError, match="does not fit this model"):
        train(other, resume=str(first))


def test_changed_data_is_an_error(options, tmp_path):
    text = tmp_path / "texts"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(f"document {i} " * 40)
    data = {"sources": [{"paths": [str(text)]}], "tokenizer": {"type": "byte"}, "cache_dir": str(tmp_path / "cache")}
    config = Config.model_validate(options(data=data | {"val_fraction": 0.3}))
    train(config)
    (text / "0.txt").write_text("something else " * 40)
    with pytest.raises(UserError, match="data: the text or the tokenizer has changed"):
        train(config)


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(config, tmp_path):
    exploding = config(optim={"learning_rate": 1e30, "grad_clip": None}, steps=30, checkpoint={"every": 1})
    with pytest.raises(UserError, match=r"step \d+: (val_loss is nan|the last 10 steps)"):
        train(exploding)
    from training import checkpoint

    for _, path in checkpoint.list_checkpoints(tmp_path / "runs/small/checkpoints"):
        assert all(tensor.isfinite().all() for tensor in checkpoint.load(path).model.values())


def test_a_save_that_failed_ends_the_run_before_the_next_one(config, tmp_path):
    in_the_way = tmp_path / "runs/small/checkpoints"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()  # where the save makes a folder
    seldom = {"every": 300, "tokens": 64, "prompts": []}
    with pytest.raises(UserError, match=r"step-00000100: the checkpoint could not be saved: File exists"):
        train(config(steps=300, eval=seldom, checkpoint={"every": 100}, logging={"every": 1, "tensorboard": False}))
    assert 100 <= rows(tmp_path / "runs/small")[-1]["step"] < 200


class Allocations(TorchDispatchMode):
    """Counts new tensors."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func.name().startswith("aten::empty")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_preallocated", [True, False])
def test_the_first_save_finds_its_memory_allocated(build_run, is_preallocated):
    run = build_run()
    run.train_step()
    run.log.fetch()
    if is_preallocated:
        run.checkpoints.preallocate()
        run.checkpoints.wait()
    with Allocations() as during_the_save:
        run.checkpoints.save(run.state)
    assert (during_the_save.n == 0) == is_preallocated


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_train(run, precision):
    exact, lower = losses(run(name="exact")), losses(run(name="lower", precision=precision))
    for (ours, _), (theirs, _) in zip(lower, exact, strict=True):
        assert ours == pytest.approx(theirs, rel=0.02)


def test_fp16_skips_a_step_that_overflows_and_lowers_the_scale(build_run):
    run = build_run(precision="fp16")
    run.state.loss_scale.scale = 2.0**40
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train_step()
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    assert not run.optimizer.state_dict()
    assert run.state.loss_scale.scale == 2.0**39
    run.state.loss_scale.scale = 2.0**10
    run.train_step()
    assert not torch.equal(run.model.wte.weight, before["wte.weight"])


def test_two_ranks_compute_the_same_as_one(processes, options, tmp_path, run):
    alone = run(name="alone", precision="fp32")
    path = write_config(tmp_path / "two.yaml", options(name="two"))
    ended = processes.run("training.train:main", "--config", str(path), n_ranks=2)
    assert ended.returncode == 0, ended.stderr
    folder = tmp_path / "runs" / "two"
    for ours, theirs in zip(rows(folder), rows(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["expert_load"] == theirs["expert_load"]
        assert ours.get("val_loss", 0) == pytest.approx(theirs.get("val_loss", 0), rel=1e-5)


def test_sigterm_to_one_of_two_ranks_stops_both_with_one_checkpoint(processes, options, tmp_path):
    endless = options(name="two", steps=1_000_000, eval={"every": None, "tokens": 64}, checkpoint={"every": None})
    path = write_config(tmp_path / "two.yaml", endless)
    folder = tmp_path / "runs" / "two"
    ranks = ForkedRanks(processes.start("training.train:main", "--config", str(path), n_ranks=2))
    try:
        wait_for_rows(folder, 4, ranks)
        ranks.signal(1, signal.SIGTERM)
        assert ranks.launch.wait(60).statuses == [128 + signal.SIGTERM] * 2
    finally:
        ranks.kill()
    (saved,) = names_in(folder / "checkpoints")
    assert saved == f"step-{rows(folder)[-1]['step']:08d}"
    assert tensors(folder, rows(folder)[-1]["step"])


def test_evaluate_has_a_row_for_each_path_and_their_total(finished, call, tmp_path):
    folder, sizes = finished(), {"a.txt": 20, "b": 70}
    (tmp_path / "b").mkdir()
    for path, n in {"a.txt": 20, "b/one.txt": 30, "b/two.txt": 40}.items():
        (tmp_path / path).write_text("x = y + 1\n" * n)
    paths = [str(tmp_path / name) for name in sizes]
    done = call("evaluate", "--run", str(folder), "--data", *paths, paths[0], "--json")
    assert done.returncode == 0 and "paths to files that are listed before, left out: 1" in done.stderr
    result = json.loads(done.stdout)
    assert [(row["name"], row["bytes"]) for row in result["rows"]] == list(zip(paths, (200, 700), strict=True))
    assert (result["step"], result["total"]["bytes"], result["total"]["tokens"]) == (8, 900, 903)
    for row in result["rows"]:
        alone = json.loads(call("evaluate", "--run", str(folder), "--data", row["name"], "--json").stdout)
        assert alone["rows"] == [row] and alone["total"] == row | {"name": "total"}
    n_targets = [row["tokens"] - 1 for row in result["rows"]]
    mean = sum(n * row["loss"] for n, row in zip(n_targets, result["rows"], strict=True)) / sum(n_targets)
    assert result["total"]["loss"] == pytest.approx(mean, rel=1e-12)
    table = call("evaluate", "--run", str(folder), "--data", *paths).stdout.splitlines()
    assert len(table) == 4 and len(set(map(len, table))) == 1
    assert [f"{row['loss']:.4f}" for row in (*result["rows"], result["total"])] == [
        line.split()[1] for line in table[1:]
    ]


def test_the_source_of_eval_best_decides_what_is_best(run, config, capsys):
    folder = run(eval={"every": 2, "tokens": 512, "best": "email"})
    losses = {row["step"]: row["val_sets"]["loss"]["email"] for row in rows(folder) if "val_sets" in row}
    summary = json.loads((folder / "summary.json").read_text())
    best = min(losses, key=losses.get)
    assert (summary["best_step"], summary["best_val_loss"], summary["best_of"]) == (best, losses[best], "email")
    assert f"best {losses[best]:.4f} at step {best} (email)" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"eval\.best: no validation text has the name 'books'; there is json, email, logging"
    ):
        train(config(eval={"best": "books"}))
    assert train(config(eval={"every": 2, "tokens": 512})) == 0
    line = "eval.best: all validation text, no longer email: the best step so far no longer counts"
    assert line in capsys.readouterr().err


def test_a_best_checkpoint_that_is_gone_no_longer_counts(config, at_step, capsys):
    options = {"eval": {"every": 2, "tokens": 512}, "checkpoint": {"every": None, "keep": 1, "final": "best"}}
    at_step.send(5)
    stopped = config(**options)
    assert train(stopped) != 0
    best = json.loads((stopped.run_dir / "checkpoints/step-00000005/state.json").read_text())["best"]["step"]
    path = stopped.run_dir / "checkpoints" / f"step-{best:08d}"
    shutil.rmtree(path)
    assert train(stopped) == 0
    line = f"{path}: the best checkpoint is not there: the best step so far no longer counts\n"
    assert line in capsys.readouterr().err
    assert json.loads((stopped.run_dir / "summary.json").read_text())["best_step"] > 5


def test_generate_and_evaluate_work_on_a_run(finished, call, tmp_path):
    folder = finished()
    done = command("-m", "training.generate", "--run", str(folder), "--prompt", "import ", "--tokens", "5")
    assert done.returncode == 0 and done.stdout.startswith("import ") and len(done.stdout) > len("import ")
    done = command("-m", "training.evaluate", "--run", str(folder / "checkpoints/step-00000006"))
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["step", "json", "email", "logging", "total"]
    text = tmp_path / "text.txt"
    text.write_text("def f():\n    return 1\n" * 20)
    done = call("evaluate", "--run", str(folder), "--data", str(text))
    assert done.returncode == 0 and done.stdout.startswith("step 8: loss ") and "440 bytes" in done.stdout
    for name, *prompt in (("generate", "--prompt", "a"), ("evaluate",)):
        done = call(name, "--run", str(tmp_path), *prompt)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: --run {tmp_path}: no run") and done.stderr.count("\n") == 1
