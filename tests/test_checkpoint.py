"""A checkpoint is complete or absent; a damaged one is named and the one before it is used."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import save_checkpoint as save

from training.checkpoint import Checkpoint, corruption, latest, list_checkpoints, load, prune
from training.errors import UserError

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def checkpoint(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        {"w": torch.randn(5, 3, generator=generator), "b": torch.zeros(2, dtype=torch.bfloat16)},
        {"w/momentum": torch.randn(5, 3, generator=generator)},
        {"step": step, "best": None, "time_s": 0.1 + 0.2},
    )


def test_loaded_tensors_and_state_equal_the_saved_ones(tmp_path):
    saved = checkpoint(7)
    loaded = load(save(tmp_path, saved))
    for ours, theirs in ((loaded.model, saved.model), (loaded.optimizer, saved.optimizer)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert loaded.state == saved.state


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["gone", "empty", "halved", "longer", "one bit", "of another step", "a folder"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(tmp_path, name, damage):
    older, path = save(tmp_path, checkpoint(3)), save(tmp_path, checkpoint(6))
    file = path / name
    data = file.read_bytes()
    if damage in ("gone", "a folder"):
        file.unlink()
    if damage == "a folder":
        file.mkdir()
    elif damage == "of another step":
        file.write_bytes((older / name).read_bytes())
    elif damage != "gone":
        flipped = bytes([data[len(data) // 2] ^ 4])
        file.write_bytes(
            {
                "empty": b"",
                "halved": data[: len(data) // 2],
                "longer": data + b"x",
                "one bit": data[: len(data) // 2] + flipped + data[len(data) // 2 + 1 :],
            }[damage]
        )
    warnings = []
    assert latest(tmp_path, warnings.append) == older
    assert len(warnings) == 1 and "\n" not in warnings[0]
    # With the manifest of another checkpoint, the first file that differs from it is named.
    assert str(file) in warnings[0] or (name == "manifest.json" and str(path) in warnings[0])
    with pytest.raises(UserError, match="step-00000006"):
        load(path)


def test_a_run_does_not_start_over_if_every_checkpoint_is_damaged(tmp_path):
    for step in (1, 2):
        (save(tmp_path, checkpoint(step)) / "state.json").write_text("{}")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        latest(tmp_path, lambda _: None)


def test_latest_is_none_in_a_folder_without_checkpoints(tmp_path):
    assert latest(tmp_path / "missing", pytest.fail) is None
    assert latest(tmp_path, pytest.fail) is None


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, checkpoint(step))
        prune(tmp_path, keep=2, best_step=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 4, 5]
    assert all(corruption(path) is None for _, path in list_checkpoints(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for _, path in list_checkpoints(tmp_path)]


def test_prune_keeps_every_nth_step(tmp_path):
    for step in range(1, 10):
        save(tmp_path, checkpoint(step))
        prune(tmp_path, keep=1, best_step=2, keep_every=3)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 3, 6, 9]


def test_the_remains_of_a_killed_save_do_not_count_and_are_removed(tmp_path):
    for name in (".step-00000009.tmp", ".step-00000001.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"torn")
    assert latest(tmp_path, pytest.fail) is None
    save(tmp_path, checkpoint(9))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000009"]


def test_a_failed_save_is_one_line(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="could not be saved") as error:
        save(tmp_path / "checkpoints", checkpoint(1))
    assert "\n" not in str(error.value)


def test_the_manifest_is_written_last_and_everything_is_synced_before_the_name(tmp_path, monkeypatch):
    order = []
    fsync, original = os.fsync, Path.rename

    def recorded_fsync(descriptor):
        order.append(("sync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)

    def recorded_rename(path, target):
        order.append(("rename", path.name))
        return original(path, target)

    monkeypatch.setattr(Path, "rename", recorded_rename)
    save(tmp_path, checkpoint(1))
    kinds = [kind for kind, _ in order]
    before = [name.rsplit("/", 1)[-1] for kind, name in order[: kinds.index("rename")]]
    assert set(FILES) | {".step-00000001.tmp"} == set(before)
    assert order[-1] == ("sync", str(tmp_path))


def test_the_state_is_plain_json(tmp_path):
    path = save(tmp_path, checkpoint(1))
    assert json.loads((path / "state.json").read_text())["step"] == 1
    assert oct((path / "model.safetensors").stat().st_mode)[-3:] == "644"
