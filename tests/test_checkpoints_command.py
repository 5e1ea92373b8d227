"""python -m training.checkpoints: verify, list, prune."""

import pytest
import torch
from conftest import save_checkpoint

from training.checkpoint import Checkpoint
from training.checkpoints import main
from training.files import run_lock


@pytest.fixture
def run_dir(tmp_path):
    """A run's folder with checkpoints of steps 1 to 5; step 2 is the best."""
    for step in range(1, 6):
        state = {"step": step, "best": {"step": 2, "val_loss": 1.0}}
        weights = {"w": torch.full((3, 5), float(step))}
        save_checkpoint(tmp_path / "small/checkpoints", Checkpoint(weights, weights, state))
    return tmp_path / "small"


def steps_of(run) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_every_checkpoint_is_listed_and_verified(run_dir, capsys):
    assert main(["list", str(run_dir)]) == 0
    assert main(["verify", str(run_dir)]) == 0
    listed, verified = (capsys.readouterr().out.splitlines()[part] for part in (slice(0, 5), slice(5, 10)))
    assert [line.split()[1] for line in listed] == ["1", "2", "3", "4", "5"]
    assert str(run_dir / "checkpoints/step-00000003") in listed[2]
    assert all(line.endswith("  intact") for line in verified)


def test_verify_finds_a_flipped_bit_and_names_the_file(run_dir, capsys):
    file = run_dir / "checkpoints/step-00000003/optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert main(["list", str(run_dir)]) == 0, "list compares sizes only"
    assert main(["verify", str(run_dir)]) == 1
    lines = capsys.readouterr().out.splitlines()[5:]
    assert [str(file) in line for line in lines] == [False, False, True, False, False]


def test_prune_keeps_the_newest_the_best_and_damaged_ones(run_dir):
    (run_dir / "checkpoints/step-00000001/state.json").write_text("{}")
    assert main(["prune", str(run_dir), "--keep", "1"]) == 1
    assert steps_of(run_dir) == ["step-00000001", "step-00000002", "step-00000005"]


@pytest.mark.parametrize("damage", ["missing", "flipped bit"])
def test_prune_does_not_count_a_damaged_checkpoint_as_newest(run_dir, damage):
    file = run_dir / "checkpoints/step-00000005/model.safetensors"
    data = bytearray(file.read_bytes())
    file.unlink()
    if damage == "flipped bit":
        data[-1] ^= 1
        file.write_bytes(data)
    main(["prune", str(run_dir), "--keep", "1"])
    assert steps_of(run_dir) == ["step-00000002", "step-00000004", "step-00000005"]


def test_prune_works_inside_the_folder_and_removes_the_remains_of_a_killed_prune(run_dir, monkeypatch):
    (run_dir / "checkpoints/.step-00000001.old").mkdir()
    monkeypatch.chdir(run_dir)
    assert main(["prune", "."]) == 0
    assert steps_of(run_dir) == ["step-00000002", "step-00000004", "step-00000005"]


def test_wrong_input_is_one_line_and_status_2(run_dir, tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert main(["prune", str(run_dir), "--keep", "0"]) == 2
    with run_lock(run_dir):
        assert main(["prune", str(run_dir)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["error"] * 3
    assert "no run with a checkpoint is here" in lines[0] and "another process is training this run" in lines[2]
    assert len(steps_of(run_dir)) == 5
