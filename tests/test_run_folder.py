"""A run's folder: an error changes nothing in it, two never train in it, and damaged files are one line each."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import rows, tensors, write_config
from launched import rows_in
from test_restart import flip_a_bit, names, wait_until

from training import checkpoint
from training import train as train_module
from training.checkpoint.read import file_entry
from training.data import row_files, text_files
from training.data.file_hashes import FileHashes
from training.errors import UserError
from training.files import run_lock, write_atomically
from training.train import train

OFTEN = {"checkpoint": {"every": 2, "keep": 2}}


def without_data_lines(text: str) -> list[str]:
    """Return the lines of standard error but those that say which files a search left out."""
    return [line for line in text.splitlines() if not line.startswith("data: ")]


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
def test_a_start_that_fails_changes_nothing(finished, config, resume, changes):
    folder = finished(**OFTEN)
    before = contents(folder.parent)
    with pytest.raises(UserError):
        train(config(**OFTEN | changes), resume=resume if resume == "never" else str(folder / resume))
    assert contents(folder.parent) == before


def test_files_and_folders_have_the_permissions_of_any_new_ones(run, tmp_path):
    umask = os.umask(0o002)
    try:
        run(steps=3, logging={"every": 2})
    finally:
        os.umask(umask)
    assert {oct(path.stat().st_mode) for path in tmp_path.rglob("*")} == {"0o100664", "0o40775"}


def test_a_link_to_a_run_is_the_same_run(finished, config):
    folder = finished()
    folder.with_name("link").symlink_to(folder.name)
    with run_lock(folder), pytest.raises(UserError, match="link: another process is training this run"):
        train(config(name="link"))


def test_a_run_whose_lock_is_removed_ends_before_it_writes(processes, options, tmp_path):
    path = write_config(tmp_path / "one.yaml", options(steps=1_000_000, checkpoint={"every": 50}))
    process = processes.start("training.train:main", "--config", str(path))
    folder = tmp_path / "runs/small"
    wait_until(lambda: rows_in(folder))
    lock = folder.with_name(".small.lock")
    lock.unlink()
    ended = process.wait(60)
    message = f"error: {lock}: was removed, so another process may be training {folder}; start again"
    assert (ended.statuses, ended.stderr.splitlines()[-1]) == ([2], message)


def test_no_good_checkpoint_is_pruned_while_steps_are_not_finite(config, tmp_path, at_step):
    """The weights are finite but every result is not, so that a checkpoint of them would look complete."""

    def spoil(model):
        with torch.no_grad():
            model.wte.weight.fill_(3e38)

    at_step(7, spoil)
    often = {
        "checkpoint": {"every": 1, "keep": 2, "keep_best": False},
        "eval": {"every": None, "tokens": 64},
    }
    folder = tmp_path / "runs/small/checkpoints"
    with pytest.raises(UserError, match=rf"another --name that starts from --resume {folder}/step-N$"):
        train(config(steps=40, **often))
    saved = checkpoint.list_checkpoints(folder)
    assert [step for step, _ in saved] == [6, 7]
    assert checkpoint.load(saved[0][1]).model["wte.weight"].abs().max() < 1


def test_a_stopped_run_says_how_to_resume(config, capsys, at_step):
    at_step.send(3, signal.SIGTERM)
    assert train(config(), resume="never") == 128 + signal.SIGTERM
    assert capsys.readouterr().out.endswith("saved after step 3; the same command without --resume resumes it\n")
    assert train(config()) == 0
    assert "resuming from step 3" in " ".join(capsys.readouterr().out.split())


def test_a_restart_by_torchrun_resumes(monkeypatch):
    assert train_module.resolve_resume("never") == "never"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train_module.resolve_resume("never") == "auto"
    assert train_module.resolve_resume("runs/other") == "runs/other"


def test_the_names_of_new_folders_are_durable(config, monkeypatch):
    """Each new folder's parent is synced, before the first checkpoint counts."""
    synced, real = [], os.fsync

    def record_fsync(file: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{file}").readlink()))
        real(file)

    monkeypatch.setattr(os, "fsync", record_fsync)
    run_config = config()
    assert train(run_config) == 0
    folder = run_config.run_dir.resolve()
    for parent in (folder.parent.parent, folder.parent, folder, folder / "checkpoints", folder / "tokenizer"):
        assert str(parent) in synced, parent


def test_pruning_a_link_leaves_its_target(finished, config, tmp_path):
    folder = finished(**OFTEN)
    elsewhere = (folder / "checkpoints/step-00000006").rename(tmp_path / "elsewhere")
    (folder / "checkpoints/step-00000006").symlink_to(elsewhere)
    shutil.rmtree(folder / "checkpoints/step-00000008")
    assert train(config(checkpoint={"every": 2, "keep": 1, "keep_best": False})) == 0
    assert names(folder) == ["step-00000008"] and checkpoint.corruption(elsewhere) is None


def test_foreign_files_among_the_checkpoints_are_ignored(run, finished):
    folder = finished(**OFTEN)
    before = tensors(folder, 8), rows(folder)
    flip_a_bit(folder / "checkpoints/step-00000008/model.safetensors")
    (folder / "checkpoints/damaged-0-step-00000008").mkdir()
    (folder / "checkpoints/damaged-2-step-00000008").mkdir()
    (folder / "checkpoints/.step-00000009.tmp").write_text("a file")
    run(**OFTEN)
    assert (tensors(folder, 8), rows(folder)) == before
    assert "damaged-1-step-00000008" in names(folder) and ".step-00000009.tmp" not in names(folder)


@pytest.mark.parametrize("state", ["[]", "{}", '{"step": "x"}', '{"step": -3}', '{"step": true}'])
def test_an_invalid_state_is_corrupt(finished, config, tmp_path, state):
    """Even if its manifest fits, and its folder's name has no step."""
    path = (finished() / "checkpoints/step-00000008").rename(tmp_path / "mine")
    seal(path, state)
    with pytest.raises(UserError, match=r"mine/(state.json|manifest.json): damaged"):
        train(config(name="other"), resume=str(path))


ODD_STATES = [
    {"skips": {}}, {"skips": 3}, {"skips": {"total": "x", "in_a_row": 0, "spikes": 0}},
    {"skips": {"total": -1, "in_a_row": 0, "spikes": 0}}, {"ledger": {"seconds": 3}},
    {"ledger": {"seconds": {"compute": "x"}}}, {"ledger": {"seconds": {"compute": -1.0}}},
    {"loss_scale": {"x": 1}}, {"loss_scale": {"scale": 0.0, "good_steps": 0}}, {"best": {}}, {"best": {"step": 4}},
    {"best": {"step": 9, "val_loss": 2.0}}, {"best": {"step": 4, "val_loss": float("nan")}},
    {"kernels": {"attention": 5}}, {"micro_batch": {"CPU": {}}},
    {"micro_batch": {"CPU": {"micro_batch": 1, "recompute": "some"}}}, {"time_s": 0.0}, {"time_s": -1.0},
    {"time_s": "1"}, {"time_s": float("inf")}, {"last_row": {}}, {"last_row": {"step": 8, "tokens": "x"}},
    {"last_row": {"step": 8, "tokens": 10**400}}, {"last_row": {"step": 7, "tokens": 1}}, {"last_row": []},
    {"config": 3}, {"config": {"precision": "fp7"}}, {"config": {"precision": []}}, {"data": None}, {"another": 1},
]  # fmt: skip


def test_a_state_with_wrong_fields_is_an_error_of_one_line(finished, call, options, tmp_path):
    folder = finished(precision="fp16")
    path, command = folder / "checkpoints/step-00000008", write_config(tmp_path / "x.yaml", options(precision="fp16"))
    content = json.loads((path / "state.json").read_text())
    for change in ODD_STATES:
        seal(path, json.dumps(content | change))
        done, (key,) = call("train", "--config", str(command)), change
        (line,) = without_data_lines(done.stderr)
        assert line.startswith(f"error: {path / 'state.json'}: not the state of a run: {key}"), (change, line)
        assert done.returncode == 2


def test_an_odd_best_is_an_error_before_anything_is_pruned(finished, call):
    folder = finished(**OFTEN)
    path = folder / "checkpoints/step-00000008"
    before = names(folder)
    for best in (3, {}, {"step": "x"}, []):
        seal(path, json.dumps(json.loads((path / "state.json").read_text()) | {"best": best}))
        done = call("checkpoints", "prune", str(folder), "--keep", "1")
        assert done.returncode == 2 and done.stderr.startswith(f"error: {path / 'state.json'}: best: "), done
        assert done.stderr.count("\n") == 1 and names(folder) == before


def seal(path: Path, state: str) -> None:
    """Write a state, and the manifest that fits it."""
    (path / "state.json").write_text(state)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"] = file_entry(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount")
def test_a_folder_that_cannot_be_changed_is_an_error_of_one_line(finished, call, options, tmp_path):
    folder = finished(**OFTEN)
    path = str(write_config(tmp_path / "one.yaml", options(**OFTEN)))
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        moved = call("train", "--config", path, "--resume", "never")
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        back = call("train", "--config", path, "--resume", str(folder / "checkpoints/step-00000006"))
        pruned = call("checkpoints", "prune", str(folder), "--keep", "1")
    finally:
        subprocess.run(["umount", folder], check=True)
    for done, reason in ((moved, "busy"), (back, "Read-only file system"), (pruned, "Read-only file system")):
        assert done.returncode == 2
        (line,) = without_data_lines(done.stderr)
        assert line.startswith("error: ") and str(folder) in line and line.lower().endswith(reason.lower())


def test_wrong_values_of_resume_and_name_are_errors_of_one_line(capsys, options, tmp_path):
    path = write_config(tmp_path / "one.yaml", options())
    assert train_module.main(["--config", str(path), "--resume", ""]) == 2
    assert capsys.readouterr().err == "error: --resume: '' is empty; give a path\n"
    assert train_module.main(["--config", str(path), "--name", "x" * 300]) == 2
    assert capsys.readouterr().err.endswith("File name too long; choose another --name\n")


GOES_ON = "training continues without the missing rows"
MOVED = "unreadable or out of order, to metrics.unreadable.jsonl; training continues"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda lines: lines[:0], f"not every step up to 6 has exactly one row; {GOES_ON}"),
        (lambda lines: lines[:2] + lines[3:], f"not every step up to 6 has exactly one row; {GOES_ON}"),
        (lambda lines: [*lines[:3], *lines[2:]], f"moved 1 line after step 3, {MOVED}"),
        (lambda lines: [*lines[:3], lines[4], *lines[3:]], f"moved 1 line after step 3, {MOVED}"),
        (lambda lines: [*lines[:3], "\0\n", *lines[3:]], f"moved 1 line after step 3, {MOVED}"),
        (lambda lines: [*lines, "\0\n"], None),
        (lambda lines: lines, None),
    ],
)
def test_rows_that_were_removed_are_reported_and_the_run_resumes(run, finished, capsys, harm, message):
    folder = finished(**OFTEN)
    before = tensors(folder, 8)
    shutil.rmtree(folder / "checkpoints/step-00000008")
    path = folder / "metrics.jsonl"
    path.write_text("".join(harm(path.read_text().splitlines(keepends=True))))
    capsys.readouterr()
    run(**OFTEN)
    assert without_data_lines(capsys.readouterr().err) == ([] if message is None else [f"{path}: {message}"])
    assert tensors(folder, 8) == before


def test_a_log_that_is_removed_during_the_run_is_reported_once(config, tmp_path, capsys, at_step):
    path = tmp_path / "runs/small/metrics.jsonl"
    at_step(5, lambda _: path.unlink())
    assert train(config()) == 0
    message = f"{path}: removed or changed while the run wrote it; training continues without the missing rows\n"
    assert capsys.readouterr().err.count(message) == 1
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
def test_edited_side_files_do_not_stop_a_run(run, finished, file, text):
    folder = finished(**OFTEN)
    before = tensors(folder, 8), rows(folder)
    shutil.rmtree(folder / "checkpoints/step-00000008")
    (folder / file).write_text(text)
    run(**OFTEN)
    assert (tensors(folder, 8), rows(folder)) == before


def test_a_run_goes_on_if_everything_but_its_checkpoints_is_replaced(run, finished, capsys):
    """A folder in the place of each file, a file in the place of each folder, and odd names among the checkpoints."""
    folder = finished(**OFTEN)
    before = tensors(folder, 8)
    shutil.rmtree(folder / "checkpoints/step-00000008")
    files = ["metrics.jsonl", "curves.jsonl", "run.json", "config.yaml", "experts.json", "summary.json", "report.html"]
    for name in (*files, "micro_batch.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
    for name in ("tokenizer", "model"):
        shutil.rmtree(folder / name)
    for name in ("tokenizer", "tensorboard", "model", "checkpoints/step-00000008", "checkpoints/step-"):
        (folder / name).write_text("in the way")
    (folder / ".model.tmp").symlink_to("nowhere")
    (folder / "checkpoints/step-old").mkdir()
    (folder / "checkpoints/step-old/link").symlink_to("nowhere")
    (folder / "checkpoints/step-\N{SUPERSCRIPT TWO}").mkdir()
    capsys.readouterr()
    run(**OFTEN | {"logging": {"every": 2, "tensorboard": True}})
    assert tensors(folder, 8) == before
    moved = re.findall(r"/([\w.-]+): not what a run writes; moved to (\S+)\n", capsys.readouterr().err)
    assert sorted(moved) == sorted(
        (name, f"{name}.unreadable-1") for name in (*files, "tokenizer", "tensorboard", "model", "step-00000008")
    )
    assert [row["step"] for row in rows(folder)] == [7, 8]


PIPES = ["curves.jsonl", "micro_batch.json", "run.json", ".run.json.tmp", ".curves.jsonl.tmp"]


@pytest.mark.parametrize("name", [*PIPES, "../../data_cache/digests.json"])
def test_a_pipe_in_the_place_of_a_file_does_not_let_a_run_wait(run, finished, options, tmp_path, name):
    folder = finished(**OFTEN)
    before = tensors(folder, 8), rows(folder)
    shutil.rmtree(folder / "checkpoints/step-00000008")
    data = options()["data"] | {"cache_dir": str(tmp_path / "data_cache")}
    (tmp_path / "data_cache").mkdir()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    run(**OFTEN, data=data)
    assert (tensors(folder, 8), rows(folder)) == before


def test_a_link_at_the_name_of_an_unfinished_file_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("text")
    (tmp_path / ".a.tmp").symlink_to("precious")
    write_atomically(tmp_path / "a", "new")
    assert ((tmp_path / "precious").read_text(), (tmp_path / "a").read_text()) == ("text", "new")
    assert not (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "model.safetensors"])
def test_a_pipe_in_a_checkpoint_is_damage(finished, name):
    path = finished() / "checkpoints/step-00000008"
    (path / name).unlink()
    os.mkfifo(path / name)
    assert checkpoint.corruption(path).startswith(f"{path}/")


def test_a_wrong_mode_of_wandb_does_not_move_the_run(finished, config, monkeypatch):
    folder = finished()
    monkeypatch.setenv("WANDB_MODE", "bogus")
    logging = {"wandb": {}, "tensorboard": False}
    with pytest.raises(UserError, match=r"^WANDB_MODE: "):
        train(config(logging=logging), resume="never")
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_a_damaged_config_of_a_run_without_a_checkpoint_does_not_stop_it(run, finished):
    folder = finished()
    before = tensors(folder, 8), rows(folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "config.yaml").write_text("steps: [")
    run()
    assert (tensors(folder, 8), rows(folder)) == before


def test_hashes_of_the_cache_that_were_edited_are_computed_again(tmp_path):
    path, memo = tmp_path / "text", tmp_path / "hashes.json"
    path.write_text("text")
    hashes = FileHashes(memo)
    right = hashes.sha256(path)
    hashes.save()
    ((name, entry),) = json.loads(memo.read_text()).items()
    for odd in ({name: [*entry[:3], 5]}, {name: [*entry[:3], "f"]}, {name: entry[:3]}, {name: 5}, {name: {}}, [], 3):
        memo.write_text(json.dumps(odd))
        assert FileHashes(memo).sha256(path) == right


def test_a_line_longer_than_any_document_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "long.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "fine"}\n' + json.dumps({"text": "x" * 1000}).encode()))
    with pytest.raises(UserError, match=r"long.jsonl.gz: line 2 is longer than"):
        list(text_files.read_documents(path, row_files.FileOptions("text")))
