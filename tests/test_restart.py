"""A start never silently discards a run, never trains it twice at once, and never continues it as another run."""

import gzip
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import command, rows, save_checkpoint, tensors, write_config
from launched import rows_in

from training import checkpoint
from training.data import prepare
from training.data.tokenizer import build_byte_tokenizer
from training.distributed.world import World
from training.engine.build import resolve_precision, resolve_sizes
from training.engine.changes import comparable
from training.engine.resume import check_same_run, find_resume_point
from training.errors import UserError
from training.files import run_lock
from training.train import train


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_quarantined_and_written_again(run, capsys):
    keep = {"every": 3, "keep": 1, "keep_best": False}
    folder = run(checkpoint={"every": 3, "keep": 2, "keep_best": False})
    before = tensors(folder, 8)
    flip_a_bit(folder / "checkpoints/step-00000008/model.safetensors")
    run(checkpoint=keep)
    assert "step-00000008/model.safetensors: damaged" in capsys.readouterr().out
    assert names(folder) == ["damaged-0-step-00000008", "step-00000008"]
    assert checkpoint.corruption(folder / "checkpoints/step-00000008") is None
    assert tensors(folder, 8) == before


def test_with_only_damaged_checkpoints_the_error_says_how_to_start_over(finished, config):
    folder = finished()
    for name in names(folder):
        flip_a_bit(folder / "checkpoints" / name / "optimizer.safetensors")
    with pytest.raises(UserError, match="every checkpoint is damaged; start over with --resume never"):
        train(config())


def test_going_back_to_an_older_checkpoint_of_the_run(run, finished):
    folder = finished()
    before = tensors(folder, 8), rows(folder)
    run(resume=str(folder / "checkpoints/step-00000006"))
    assert names(folder) == ["step-00000006", "step-00000008", "undone-0-step-00000008"]
    assert (tensors(folder, 8), rows(folder)) == before


def test_another_config_is_an_error_before_the_first_checkpoint_too(config, at_step):
    at_step.die(3)
    with pytest.raises(KeyboardInterrupt):
        train(config(checkpoint={"every": None}, logging={"every": 1, "tensorboard": False}))
    at_step.clear()
    with pytest.raises(UserError, match=r"holds a run with other options: seed: 0 -> 5"):
        train(config(seed=5))
    assert train(config()) == 0


def check_resume(config) -> None:
    """Raise UserError if these options may not resume the run, as a start would after preparing the data."""
    dataset, world = prepare(config.data, quiet=True), World(0, 1, torch.device("cpu"))
    config, _ = resolve_sizes(config, dataset)
    point = find_resume_point(config, "auto", world)
    check_same_run(resolve_precision(config, world, point.state), dataset, "auto", point)


def test_the_same_text_at_another_path_or_spelling_resumes(config, options, tmp_path, monkeypatch):
    """Also compressed, split otherwise over sources, and with the same tokenizer from elsewhere."""
    monkeypatch.chdir(tmp_path)
    build_byte_tokenizer().save("tokenizer")
    rows = [json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(60)]
    Path("text.jsonl").write_text("".join(rows))
    Path("packed.jsonl.gz").write_bytes(gzip.compress("".join(rows).encode()))
    for name, part in (("1.jsonl", rows[:30]), ("2.jsonl", rows[30:])):
        Path(name).write_text("".join(part))

    def start(*paths: str, go: Callable = check_resume, weight: float | None = None, tokenizer: str = "file") -> None:
        sources = [{"paths": [path], "weight": weight} for path in paths]
        tokenizers = {"file": {"type": "file", "path": "tokenizer"}, "byte": {"type": "byte"}}
        data = options()["data"] | {"sources": sources, "tokenizer": tokenizers[tokenizer]}
        go(config(data=data, steps=3))

    start("text.jsonl", go=train)
    for paths in (["./text.jsonl", "text.jsonl"], [str(Path("text.jsonl").absolute())], ["1.jsonl", "2.jsonl"]):
        start(*paths)
    start("packed.jsonl.gz", tokenizer="byte")
    with pytest.raises(UserError, match=r"with other options: data.sources.0.paths.0: text.jsonl -> 1.jsonl; "):
        start("1.jsonl")
    with pytest.raises(UserError, match=r"with other options: proportions of data.sources.0: unset -> 1.0; "):
        start("text.jsonl", weight=1)
    Path("text.jsonl").write_text("".join(rows[1:]))
    with pytest.raises(UserError, match=r"with other options: data: the text or the tokenizer has changed; "):
        start("text.jsonl")


def test_options_written_otherwise_that_mean_the_same_resume(finished, config, options):
    def resume(*blocks: dict, **changes: object) -> None:
        check_resume(config(model=options()["model"] | {"blocks": list(blocks)}, **changes))

    finished()
    moe = {"type": "moe", "n_experts": 4, "hidden": 32}
    resume({"ffn": moe | {"top_k": 2}, "mixer": {"head_dim": 8}}, {"ffn": {"hidden": 64}}, schedule={"warmup_steps": 2})
    with pytest.raises(UserError, match=r"with other options: model.blocks.0.ffn.n_experts: 4 -> 5; "):
        resume({"ffn": moe | {"n_experts": 5}}, {})
    with pytest.raises(UserError, match=r"with other options: steps: 8 -> 9; "):
        check_resume(config(steps=9))


def test_a_pattern_of_the_same_layers_is_the_same_model(config, options):
    def blocks(*blocks: dict) -> list:
        return comparable(config(model=options()["model"] | {"blocks": list(blocks)}))["model"]["blocks"]

    wide = {"ffn": {"hidden": 48}}
    assert blocks(wide) == blocks(wide, wide) == blocks(wide | {"repeat": 2}) != blocks(wide, {})
    assert len(blocks(wide, {})) == 2


def test_a_schedule_that_does_not_depend_on_the_number_of_steps_may_get_more(run, config):
    schedule = {"type": "constant", "warmup_steps": 2}
    short, through = run(schedule=schedule, steps=3), run(name="through", schedule=schedule, steps=5)
    run(schedule=schedule, steps=5)
    assert tensors(short, 5) == tensors(through, 5)
    with pytest.raises(UserError, match=r"with other options: steps: 5 -> 4; "):
        train(config(schedule=schedule, steps=4))


def test_a_stopped_run_may_be_shortened_but_not_to_the_step_it_has_reached(config, at_step):
    """The last step evaluates: a run without one would have no validation loss."""
    options = {"schedule": {"type": "constant", "warmup_steps": 2}, "eval": {"every": None, "tokens": 64}}
    at_step.send(3, signal.SIGTERM)
    assert train(config(**options)) == 128 + signal.SIGTERM
    with pytest.raises(UserError, match=r"with other options: steps: 8 -> 3; "):
        train(config(**options, steps=3))
    assert train(config(**options, steps=5)) == 0


def test_a_start_with_no_steps_left_is_an_error(finished, config):
    first = finished(name="first")
    with pytest.raises(UserError, match="it is at step 8, and steps is 8"):
        train(config(name="second"), resume=str(first))


def test_a_branch_has_its_own_best(run, finished):
    first = finished(name="first")
    path = first / "checkpoints/step-00000006"
    state = json.loads((path / "state.json").read_text())
    saved = checkpoint.load(path)
    saved.state["best"] = {"step": 4, "val_loss": 0.5}
    copied = save_checkpoint(first.parent / "elsewhere", saved)
    assert state["best"]["val_loss"] > 0.5
    branch = run(name="branch", resume=str(copied))
    assert json.loads((branch / "summary.json").read_text())["best_step"] == 8


def test_a_checkpoint_of_another_optimizer_is_an_error(finished, config):
    first = finished(name="first")
    with pytest.raises(UserError, match="does not fit this model: 'optimizer state"):
        train(config(name="other", steps=9, optim={"type": "muon"}), resume=str(first))


def test_one_of_twenty_simultaneous_starts_trains_and_the_others_exit(processes, options, config, tmp_path):
    folder = config().run_dir
    path = write_config(tmp_path / "one.yaml", options(steps=1_000_000, checkpoint={"every": 50}))
    started = [processes.start("training.train:main", "--config", str(path)) for _ in range(20)]
    wait_until(lambda: rows_in(folder))
    wait_until(lambda: sum(process.poll() is None for process in started) == 1)
    (running,) = [process for process in started if process.poll() is None]
    message = f"error: {folder}: another process is training this run; choose another --name\n"
    for process in started:
        if process is not running:
            assert process.wait() == ([2], "", message)
    late = command("-X", "importtime", "-m", "training.train", "--config", str(path))
    assert late.returncode == 2 and late.stderr.endswith(message)
    assert "pydantic" in late.stderr and "torch" not in late.stderr
    with pytest.raises(UserError, match="another process"), run_lock(folder):
        pass
    running.kill()
    with run_lock(folder):
        pass


def wait_until(is_true: Callable[[], bool]) -> None:
    """Wait for at most a minute."""
    until = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_an_out_dir_that_is_a_file_is_an_error_of_one_line(config, tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="runs: File exists; choose another --out_dir"):
        train(config())


def test_a_chosen_kernel_runs_at_the_models_own_widths(run, capsys):
    model = {"n_layer": 1, "n_head": 1, "n_embd": 18, "n_positions": 32}
    run(model=model | {"blocks": [{"ffn": {"type": "moe", "hidden": 30, "n_experts": 4}}]}, steps=3)
    assert "experts     loop (grouped: fails here:" in capsys.readouterr().out


def test_fewer_samples_than_processes_are_an_error(config):
    from training.distributed.mesh import check_mesh

    with pytest.raises(UserError, match="batch_tokens: 32 are 1 samples, fewer than 2 processes"):
        check_mesh(config(batch_tokens=32), 2)


def test_a_run_whose_text_has_changed_is_not_evaluated_on_it(config, call, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i}.txt").write_text(f"document {i} " * 40)
    data = {"sources": [{"paths": [str(texts)]}], "tokenizer": {"type": "byte"}, "cache_dir": str(tmp_path / "cache")}
    assert train(config(data=data | {"val_fraction": 0.3}, steps=3)) == 0
    (texts / "0.txt").write_text("something else " * 40)
    done = call("evaluate", "--run", str(tmp_path / "runs/small"))
    assert done.returncode == 2
    assert "its text has changed since" in done.stderr
