"""A disk that is too small, or full in the middle of a save: one line, nothing lost, and it goes on exactly."""

from __future__ import annotations

import os
import subprocess

import pytest
from conftest import rows, tensors

from training import checkpoint, loop
from training.config import Config
from training.disk import checkpoint_bytes
from training.errors import UserError
from training.model import GPT
from training.train import train


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own below tmp_path, of so many KiB."""
    mounted = []

    def make(kib: int):
        folder = tmp_path / f"disk-{kib}"
        folder.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder], check=False).returncode:
            pytest.skip("needs root, to mount a file system")
        mounted.append(folder)
        return folder

    if os.name != "posix" or os.geteuid():
        pytest.skip("needs root, to mount a file system")
    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_run_that_will_not_fit_is_refused_before_the_first_step(config, small_disk):
    disk = small_disk(512)
    with pytest.raises(UserError, match=rf"{disk}/runs has 0\.\d+ MiB free, .* need 0\.\d+ MiB: lower checkpoint"):
        train(config(out_dir=str(disk / "runs")))
    assert not (disk / "runs/small").exists()
    assert train(config(out_dir=str(disk / "runs"), checkpoint={"keep": 1, "keep_best": False})) == 0


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("percent", [0, 10, 50, 90, 99])
def test_a_disk_that_is_full_in_a_save_loses_nothing(config, run, small_disk, monkeypatch, percent, background):
    disk = small_disk(4096)
    often = {"every": 3, "background": background}
    logs = {"every": 50, "tensorboard": False}
    quiet = {"every": None, "tokens": 64}
    changes = {"checkpoint": often, "eval": quiet, "logging": logs, "steps": 12}
    through = run(name="through", **changes)
    made = config(out_dir=str(disk / "runs"), **changes)
    step = loop.train_step

    def filled(run):
        step(run)
        if run.step == 5:
            run.saver.wait()
            room = 16 * 1024 + percent * of_a_save(made, run.dataset.tokenizer.vocab_size) // 100
            fill(disk, room)

    monkeypatch.setattr(loop, "train_step", filled)
    with pytest.raises(UserError, match=r"step-0000000\d: the checkpoint could not be saved: No space left on device"):
        train(made)
    folder = disk / "runs/small"
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000003"]
    assert checkpoint.damage(folder / "checkpoints/step-00000003") is None
    (disk / "filler").unlink()
    monkeypatch.setattr(loop, "train_step", step)
    assert train(made) == 0
    assert rows(folder) == rows(through)
    assert tensors(folder, 12) == tensors(through, 12)


def of_a_save(config: Config, n_vocab: int) -> int:
    sized = config.model.model_copy(update={"vocab_size": -(-n_vocab // 64) * 64})
    return checkpoint_bytes(GPT(sized), config)


def fill(disk, room: int) -> None:
    """Leave so many bytes."""
    there = os.statvfs(disk)
    (disk / "filler").write_bytes(b"x" * max(0, there.f_bavail * there.f_frsize - room))
