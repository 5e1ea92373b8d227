"""A disk that is too small, or full during a save: one line, nothing lost, and the run resumes to the same bits."""

import json
import os
import subprocess
import time

import pytest
from conftest import rows, tensors

from training import checkpoint
from training.errors import UserError
from training.model import GPT
from training.model.stats import model_stats
from training.planning.report import checkpoint_bytes, disk_shortage, n_checkpoints
from training.train import train

PAGE = 4096


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a file system of `kib` KiB below tmp_path."""
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


def test_a_run_that_does_not_fit_on_the_disk_ends_before_the_first_step(config, small_disk):
    disk = small_disk(576)
    with pytest.raises(UserError, match=rf"{disk}/runs has 0\.\d+ MiB free, .* need 0\.\d+ MiB: lower checkpoint"):
        train(config(out_dir=str(disk / "runs")))
    assert not (disk / "runs/small").exists()
    assert train(config(out_dir=str(disk / "runs"), checkpoint={"keep": 1, "keep_best": False})) == 0


def test_the_disk_needs_room_for_the_model_and_all_missing_checkpoints(config, small_disk):
    disk = small_disk(4096)
    run_config = config(out_dir=str(disk / "runs"))
    stats = model_stats(run_config.model.model_copy(update={"vocab_size": 320}))
    a_save, weights = checkpoint_bytes(stats, run_config), 4 * stats.n_parameters
    whole = n_checkpoints(run_config) * a_save + weights
    assert n_checkpoints(run_config) == run_config.checkpoint.keep + 2, "the best checkpoint, and the one in progress"
    assert a_save == 3 * weights > 2 * PAGE
    for room, fits in ((whole, True), (whole - weights // 2, False)):
        fill(disk, room + PAGE)
        assert (disk_shortage(stats, run_config) is None) == fits, room
    (disk / "filler").unlink()
    existing = disk / "runs/small/checkpoints/step-00000003"
    existing.mkdir(parents=True)
    (existing / "model.safetensors").write_bytes(bytes(a_save))
    fill(disk, whole - a_save + PAGE)
    assert disk_shortage(stats, run_config) is None
    assert "lower checkpoint.keep" in disk_shortage(stats, run_config, fresh=True), "the old run keeps its checkpoints"


def test_a_disk_of_the_required_size_is_enough(config, small_disk):
    """The disk also has 256 KiB for logs and file names."""
    disk = small_disk(4096)
    run_config = config(out_dir=str(disk / "runs"), checkpoint={"every": 1, "keep": 3})
    stats = model_stats(run_config.model.model_copy(update={"vocab_size": 320}))
    weights = 4 * stats.n_parameters
    fill(disk, n_checkpoints(run_config) * checkpoint_bytes(stats, run_config) + weights + 2**18)
    assert train(run_config) == 0


def test_without_keep_best_the_best_checkpoint_is_neither_saved_nor_kept(run):
    """The learning rate rises until training diverges, so the best step is an early one."""
    rising = {"steps": 40, "optim": {"learning_rate": 1.0}, "schedule": {"type": "constant", "warmup_steps": 39}}
    for every, keep in ((4, 1), (None, 10)):
        section = {"every": every, "keep": keep, "keep_best": False}
        folder = run(name=f"kept-{keep}", checkpoint=section, eval={"every": 4, "tokens": 512}, **rising)
        assert json.loads((folder / "summary.json").read_text())["best_step"] < 40
        assert [step for step, _ in checkpoint.list_checkpoints(folder / "checkpoints")] == [40]


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("percent", [0, 10, 50, 90, 99])
def test_a_full_disk_during_a_save_loses_nothing(config, run, small_disk, at_step, percent, background):
    """After step 5 the disk has room for `percent` of the save of step 6."""
    disk = small_disk(4096)
    changes = {
        "checkpoint": {"every": 3, "background": background},
        "eval": {"every": None, "tokens": 64},
        "logging": {"every": 50, "tensorboard": False},
        "steps": 12,
    }
    through = run(name="through", **changes)
    small = config(out_dir=str(disk / "runs"), **changes)
    saved = disk / "runs/small/checkpoints/step-00000003"

    def fill_disk(model: GPT) -> None:
        while not saved.exists():
            time.sleep(0.01)
        fill(disk, 16 * 1024 + percent * checkpoint_bytes(model_stats(model.config), small) // 100)

    at_step(5, fill_disk)
    with pytest.raises(UserError, match=r"step-0000000\d: the checkpoint could not be saved: No space left on device"):
        train(small)
    assert list(saved.parent.iterdir()) == [saved]
    assert checkpoint.corruption(saved) is None
    (disk / "filler").unlink()
    at_step.clear()
    assert train(small) == 0
    assert rows(disk / "runs/small") == rows(through)
    assert tensors(disk / "runs/small", 12) == tensors(through, 12)


def fill(disk, room: int) -> None:
    """Fill the disk, leaving `room` bytes or up to a page more."""
    (disk / "filler").unlink(missing_ok=True)
    stat = os.statvfs(disk)
    (disk / "filler").write_bytes(b"x" * max(0, stat.f_bavail * stat.f_frsize - room))
