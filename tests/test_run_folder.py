"""A run's folder: a refusal changes nothing in it, two never train in it, and what is odd in it is a line."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, command, environment, rows, tensors, write_config
from test_restart import flip_a_bit, names, wait_for_rows

from training import checkpoint
from training import train as train_module
from training.checkpoint.read import file_entry
from training.data import text_files
from training.engine import step as loop
from training.errors import UserError
from training.files import run_lock
from training.logging.report import update_report
from training.train import train

OFTEN = {"checkpoint": {"every": 2, "keep": 2}}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("resume", "changes"),
    [
        ("checkpoints/step-00000006", {"optim": {"learning_rate": 1.0}}),
        ("never", {"model": {"n_embd": 16, "n_head": 2, "n_positions": 32, "vocab_size": 10}}),
        ("never", {"checkpoint": {"keep": 10**8}}),
    ],
)
def test_what_is_refused_changes_nothing(run, config, resume, changes):
    folder = run(**OFTEN)
    before = contents(folder.parent)
    with pytest.raises(UserError):
        train(config(**OFTEN | changes), resume=resume if resume == "never" else str(folder / resume))
    assert contents(folder.parent) == before


def test_by_a_link_it_is_the_same_folder(run, config):
    folder = run()
    folder.with_name("link").symlink_to(folder.name)
    with run_lock(folder), pytest.raises(UserError, match="link: another process is training this run"):
        train(config(name="link"))


def test_where_the_lock_is_removed_the_run_ends_before_it_writes(options, tmp_path):
    path = write_config(tmp_path / "one.yaml", options(steps=1_000_000, checkpoint={"every": 50}))
    arguments = [sys.executable, "-m", "training.train", "--config", str(path)]
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    folder = tmp_path / "runs/small"
    wait_for_rows(folder / "metrics.jsonl", 1, [process])
    lock = folder.with_name(".small.lock")
    lock.unlink()
    _, said = process.communicate(timeout=60)
    told = f"error: {lock}: was removed, so another process may be training {folder}; start again\n"
    assert (process.returncode, said) == (2, told)


def test_while_steps_are_not_finite_nothing_good_is_pushed_out(config, tmp_path, monkeypatch):
    """Weights that are finite and of which nothing finite comes: a checkpoint of them would be whole."""
    step = loop.train_step

    def spoiled(run):
        step(run)
        if run.step == 7:
            with torch.no_grad():
                run.model.wte.weight.fill_(3e38)

    monkeypatch.setattr(loop, "train_step", spoiled)
    often = {
        "checkpoint": {"every": 1, "keep": 2, "keep_best": False},
        "eval": {"every": None, "tokens": 64},
    }
    folder = tmp_path / "runs/small/checkpoints"
    with pytest.raises(UserError, match=rf"another --name that begins with --resume {folder}/step-N$"):
        train(config(steps=40, **often))
    found = checkpoint.list_checkpoints(folder)
    assert [step for step, _ in found] == [6, 7]
    assert checkpoint.load(found[0][1]).model["wte.weight"].abs().max() < 1


def test_what_was_stopped_goes_on_as_it_is_told(config, capsys, monkeypatch):
    step = loop.train_step

    def stopping(run):
        step(run)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "train_step", stopping)
    assert train(config(), resume="never") == 128 + signal.SIGTERM
    assert capsys.readouterr().out.endswith("saved after step 3; the same command without --resume goes on\n")
    monkeypatch.undo()
    assert train(config()) == 0
    assert "goes on     after step 3" in capsys.readouterr().out


def test_started_again_by_a_launcher_it_goes_on(monkeypatch):
    assert train_module.resumed("never") == "never"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train_module.resumed("never") == "auto"
    assert train_module.resumed("runs/other") == "runs/other"


def test_names_are_durable_too(config, monkeypatch):
    """Each folder that is made is synced into the one that it is in, and that before a save counts."""
    synced, real = [], os.fsync

    def noted(file: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        real(file)

    monkeypatch.setattr(os, "fsync", noted)
    made = config()
    assert train(made) == 0
    folder = made.run_dir.resolve()
    for parent in (folder.parent.parent, folder.parent, folder, folder / "checkpoints", folder / "tokenizer"):
        assert str(parent) in synced, parent


def test_a_checkpoint_that_is_a_link_is_let_go_and_what_it_leads_to_stays(run, config, tmp_path):
    folder = run(**OFTEN)
    elsewhere = (folder / "checkpoints/step-00000006").rename(tmp_path / "elsewhere")
    (folder / "checkpoints/step-00000006").symlink_to(elsewhere)
    shutil.rmtree(folder / "checkpoints/step-00000008")
    assert train(config(checkpoint={"every": 2, "keep": 1, "keep_best": False})) == 0
    assert names(folder) == ["step-00000008"] and checkpoint.corruption(elsewhere) is None


def test_odd_things_among_the_checkpoints_are_no_hindrance(run):
    folder = run(**OFTEN)
    before = tensors(folder, 8), rows(folder)
    flip_a_bit(folder / "checkpoints/step-00000008/model.safetensors")
    (folder / "checkpoints/damaged-0-step-00000008").mkdir()
    (folder / "checkpoints/damaged-2-step-00000008").mkdir()
    (folder / "checkpoints/.step-00000009.tmp").write_text("a file")
    run(**OFTEN)
    assert (tensors(folder, 8), rows(folder)) == before
    assert "damaged-1-step-00000008" in names(folder) and ".step-00000009.tmp" not in names(folder)


@pytest.mark.parametrize("state", ["[]", "{}", '{"step": "x"}', '{"step": -3}', '{"step": true}'])
def test_a_state_that_is_none_is_damaged(run, config, tmp_path, state):
    """Also where its manifest was made to fit, and its folder's name tells no step."""
    path = (run() / "checkpoints/step-00000008").rename(tmp_path / "mine")
    seal(path, state)
    with pytest.raises(UserError, match=r"mine/(state.json|manifest.json): damaged"):
        train(config(name="other"), resume=str(path))


@pytest.mark.parametrize("change", [{"skips": {}}, {"ledger": {"seconds": 3}}, {"loss_scale": {"x": 1}}, {"skips": 3}])
def test_a_state_of_other_parts_is_a_line(run, config, change):
    folder = run(precision="fp16")
    path = folder / "checkpoints/step-00000008"
    seal(path, json.dumps(json.loads((path / "state.json").read_text()) | change))
    with pytest.raises(UserError, match=r"step-00000008/state.json: not the state of a run"):
        train(config(precision="fp16"))


def seal(path: Path, state: str) -> None:
    """Write a state, and the manifest to it."""
    (path / "state.json").write_text(state)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"] = file_entry(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_a_folder_that_cannot_be_changed_is_a_line(run, options, tmp_path):
    folder = run(**OFTEN)
    path = write_config(tmp_path / "one.yaml", options(**OFTEN))
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        moved = command("-m", "training.train", "--config", str(path), "--resume", "never")
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        older = str(folder / "checkpoints/step-00000006")
        back = command("-m", "training.train", "--config", str(path), "--resume", older)
        pruned = command("-m", "training.checkpoints", "prune", str(folder), "--keep", "1")
    finally:
        subprocess.run(["umount", folder], check=True)
    for done, reason in ((moved, "busy"), (back, "Read-only file system"), (pruned, "Read-only file system")):
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and str(folder) in line and line.lower().endswith(reason.lower())


def test_what_resume_cannot_be(capsys, options, tmp_path):
    path = write_config(tmp_path / "one.yaml", options())
    assert train_module.main(["--config", str(path), "--resume", ""]) == 2
    assert capsys.readouterr().err == "error: --resume: '' is neither auto, never nor a path\n"
    assert train_module.main(["--config", str(path), "--name", "x" * 300]) == 2
    assert capsys.readouterr().err.endswith("File name too long; choose another --name\n")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda lines: lines[:0], "not every step up to 6 has exactly one row"),
        (lambda lines: lines[:2] + lines[3:], "not every step up to 6 has exactly one row"),
        (lambda lines: [*lines[:3], *lines[2:]], "not every step up to 6 has exactly one row"),
        (lambda lines: lines, None),
    ],
)
def test_rows_that_someone_removed_are_missed_aloud_and_the_run_goes_on(run, capsys, harm, said):
    folder = run(**OFTEN)
    before = tensors(folder, 8)
    shutil.rmtree(folder / "checkpoints/step-00000008")
    path = folder / "metrics.jsonl"
    path.write_text("".join(harm(path.read_text().splitlines(keepends=True))))
    capsys.readouterr()
    run(**OFTEN)
    told = capsys.readouterr().err
    assert told == ("" if said is None else f"{path}: {said}; training continues without the missing rows\n")
    assert tensors(folder, 8) == before


def test_a_log_that_is_removed_meanwhile_is_missed_once(config, tmp_path, capsys, monkeypatch):
    step, path = loop.train_step, tmp_path / "runs/small/metrics.jsonl"

    def removing(run):
        step(run)
        if run.step == 5:
            path.unlink()

    monkeypatch.setattr(loop, "train_step", removing)
    assert train(config()) == 0
    said = f"{path}: removed or changed while the run wrote it; training continues without the missing rows\n"
    assert capsys.readouterr().err.count(said) == 1
    assert rows(path.parent)[-1]["step"] == 8


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("summary.json", "[]"),
        ("summary.json", '{"advice": 3}'),
        ("summary.json", '{"time": 5}'),
        ("summary.json", "{"),
        ("experts.json", "3"),
        ("experts.json", '{"x": 5}'),
        ("micro_batch.json", "["),
        ("micro_batch.json", "3"),
        ("micro_batch.json", '{"x": 3}'),
    ],
)
def test_side_files_that_were_edited_end_no_run(run, file, text):
    folder = run(**OFTEN)
    before = tensors(folder, 8), rows(folder)
    shutil.rmtree(folder / "checkpoints/step-00000008")
    (folder / file).write_text(text)
    run(**OFTEN)
    assert (tensors(folder, 8), rows(folder)) == before


@pytest.mark.parametrize("row", ['{"step": "x"}', '{"step": 7, "time_compute": "x"}', "3"])
def test_a_row_that_is_none_is_named(run, config, row):
    folder = run(**OFTEN)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f"{row}\n")
    with pytest.raises(UserError, match=r"metrics.jsonl line 9 is not a row of metrics"):
        train(config(**OFTEN))


def test_a_report_of_rows_that_lack_everything_is_a_line(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "loss": 1e999, "tokens": "x"}\n')
    update_report(tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}: its files are not what a run writes") and line.endswith("is not updated")


def test_a_line_that_no_document_is_as_long_as_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "long.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "fine"}\n' + json.dumps({"text": "x" * 1000}).encode()))
    with pytest.raises(UserError, match=r"long.jsonl.gz: line 2 is longer than"):
        list(text_files.read_documents(path, "text"))
