"""Saving beside the loop: what is saved is what was, one at a time, by all processes together or by none."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, environment
from safetensors.torch import load_file

from training.checkpoint import (
    SINGLE,
    CheckpointWriter,
    TensorShard,
    WriterGroup,
    corruption,
    latest,
    list_checkpoints,
    load,
    read_tensors,
    tensor_shapes,
)
from training.checkpoint.parts import Entry, write_tensors
from training.config import CheckpointConfig
from training.errors import UserError

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]


def part(tensor: torch.Tensor) -> TensorShard:
    return TensorShard(tensor, 0, tensor.shape, is_owner=True)


def parts(value: float, n: int = 64) -> dict:
    return {"model": {"w": part(torch.full((n, 32), value))}, "optimizer": {"w/step": part(torch.tensor(value))}}


def test_the_files_are_what_safetensors_reads(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype}-{shape}": torch.randint(0, 2, shape, generator=generator).to(dtype)
        for dtype in TYPES
        for shape in ((), (3,), (5, 7), (0, 4), (2, 3, 2))
    }
    tensors["strided"] = torch.arange(12.0).view(3, 4).T
    write_tensors(tmp_path / "a", {name: Entry(t.dtype, t.shape, [t]) for name, t in tensors.items()})
    found = load_file(tmp_path / "a")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_what_changes_after_the_call_is_not_in_the_checkpoint(tmp_path):
    saver = CheckpointWriter(tmp_path, SINGLE, CheckpointConfig(keep=100))
    weights = torch.ones(512, 512)
    for step in range(20):
        before = weights.clone()
        saver.save({"model": {"w": part(weights)}, "optimizer": {}}, {"step": step}, None)
        weights.mul_(2)
        saver.wait()
        assert torch.equal(load_file(tmp_path / f"step-{step:08d}/model.safetensors")["w"], before), step


def test_a_save_is_waited_for_by_the_next_one_and_by_the_end(tmp_path):
    saver = CheckpointWriter(tmp_path, SINGLE, CheckpointConfig(keep=100))
    for step in range(4):
        saver.save(parts(step), {"step": step}, None)
        assert sum(thread.name.startswith("saver") for thread in threading.enumerate()) <= 1
    saver.close()
    assert [step for step, path in list_checkpoints(tmp_path) if corruption(path) is None] == [0, 1, 2, 3]
    assert not any(thread.name.startswith("saver") for thread in threading.enumerate())


def test_in_the_foreground_it_is_there_when_the_call_returns(tmp_path):
    CheckpointWriter(tmp_path, SINGLE, CheckpointConfig(background=False)).save(parts(1), {"step": 1}, None)
    assert corruption(tmp_path / "step-00000001") is None


def test_a_failure_comes_up_at_the_next_look_and_the_checkpoint_before_stays(tmp_path):
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    saver = CheckpointWriter(folder, SINGLE, CheckpointConfig())
    saver.save(parts(1), {"step": 1}, None)
    saver.wait()
    folder.rename(elsewhere).with_name("checkpoints").write_text("a file where the folder should be")
    saver.save(parts(2), {"step": 2}, None)
    saver.close()
    assert "step-00000002: the checkpoint could not be saved" in str(saver.failure)
    with pytest.raises(UserError, match="could not be saved"):
        saver.wait()
    folder.unlink()
    elsewhere.rename(folder)
    assert latest(folder, pytest.fail).name == "step-00000001"
    saver.save(parts(2), {"step": 2}, None)
    saver.wait()
    assert latest(folder, pytest.fail).name == "step-00000002"


@pytest.mark.parametrize("kind", ["model", "optimizer"])
def test_what_is_not_finite_is_not_saved(tmp_path, kind):
    saver = CheckpointWriter(tmp_path, SINGLE, CheckpointConfig())
    saver.save(parts(1), {"step": 1}, None)
    spoiled = parts(2.0)
    name, spoilt = next((name, p) for name, p in spoiled[kind].items() if p.tensor.is_floating_point())
    spoilt.tensor.view(-1)[-1] = float("nan")
    saver.save(spoiled, {"step": 2}, None)
    with pytest.raises(UserError, match=rf"step-00000002: the checkpoint could not be saved: {name} is not finite"):
        saver.wait()
    assert latest(tmp_path, pytest.fail).name == "step-00000001"
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_full_disk_is_a_line_and_leaves_no_part(tmp_path):
    program = f"""
import resource, signal
from pathlib import Path
from test_background_save import *
folder = Path({str(tmp_path)!r})
saver = CheckpointWriter(folder, SINGLE, CheckpointConfig())
saver.save(parts(1), {{"step": 1}}, None)
saver.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
saver.save(parts(2, n=4096), {{"step": 2}}, None)
try:
    saver.wait()
except UserError as error:
    print(error)
"""
    done = python(program)
    assert done.stdout == f"{tmp_path}/step-00000002: the checkpoint could not be saved: File too large\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert corruption(tmp_path / "step-00000001") is None


def python(program: str) -> subprocess.CompletedProcess:
    variables = environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, timeout=120)


def test_kill_9_while_it_is_written_leaves_the_checkpoint_before(tmp_path):
    program = f"""
import os, signal, threading, time
from pathlib import Path
from test_background_save import *
folder = Path({str(tmp_path)!r})
saver = CheckpointWriter(folder, SINGLE, CheckpointConfig())
saver.save(parts(1), {{"step": 1}}, None)
saver.wait()
saver.save(parts(2, n=400_000), {{"step": 2}}, None)
while not list(folder.glob(".step-*/model*")):
    time.sleep(0.0005)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(program).returncode == -signal.SIGKILL
    assert latest(tmp_path, pytest.fail).name == "step-00000001"
    assert list(tmp_path.glob(".step-00000002.tmp"))
    saver = CheckpointWriter(tmp_path, SINGLE, CheckpointConfig())
    saver.save(parts(3), {"step": 3}, None)
    saver.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def peers(size: int) -> list[WriterGroup]:
    """Threads of one process that meet."""
    told, met = [b""] * size, threading.Barrier(size, timeout=20)

    def exchange(rank: int, data: bytes) -> list[bytes]:
        told[rank] = data
        met.wait()
        answers = list(told)
        met.wait()
        return answers

    return [WriterGroup(rank, size, lambda data, rank=rank: exchange(rank, data)) for rank in range(size)]


def rows_of(rank: int, size: int, n: int = 10) -> tuple[int, int]:
    return n * rank // size, n * (rank + 1) // size


def save_by(size: int, folder, one_file_gib: float, step: int = 1) -> list[CheckpointWriter]:
    """Each of the processes saves its rows, and the first one what all have."""
    whole, scalar = torch.arange(30.0).view(10, 3), torch.tensor(7.0)
    savers = [CheckpointWriter(folder, one, CheckpointConfig(one_file_gib=one_file_gib)) for one in peers(size)]

    def save(rank: int) -> None:
        start, stop = rows_of(rank, size)
        some = {
            "split": TensorShard(whole[start:stop], start, whole.shape, is_owner=True),
            "same": TensorShard(whole, 0, whole.shape, is_owner=rank == 0),
            "of the last": TensorShard(whole[: 10 * (rank == size - 1)], 0, whole.shape, is_owner=rank == size - 1),
        }
        savers[rank].save(
            {"model": some, "optimizer": {"x/step": TensorShard(scalar, 0, scalar.shape, rank == 0)}},
            {"step": step},
            None,
        )
        savers[rank].close()

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(save, range(size)))
    return savers


@pytest.mark.parametrize("one_file_gib", [8, 0])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_so_many_wrote_any_number_reads(tmp_path, size, one_file_gib):
    assert [saver.failure for saver in save_by(size, tmp_path, one_file_gib)] == [None] * size
    path, whole = tmp_path / "step-00000001", torch.arange(30.0).view(10, 3)
    assert corruption(path) is None
    assert len(list(path.glob("model*.safetensors"))) == (1 if one_file_gib else size)
    assert tensor_shapes(path, "model") == dict.fromkeys(("split", "same", "of the last"), whole.shape)
    assert all(torch.equal(tensor, whole) for tensor in load(path).model.values())
    assert load(path).optimizer == {"x/step": torch.tensor(7.0)}
    for readers in (1, 2, 3):
        for rank in range(readers):
            start, stop = rows_of(rank, readers)
            found = read_tensors(path, "model", {"split": (start, stop), "same": (stop, stop)})
            assert torch.equal(found["split"], whole[start:stop]) and found["same"].shape == (0, 3)
    with pytest.raises(KeyError, match="absent"):
        read_tensors(path, "model", {"absent": None})


def test_one_process_that_cannot_write_fails_the_save_on_all(tmp_path, monkeypatch):
    save_by(2, tmp_path, 0)
    write = CheckpointWriter._write_own

    def full(self, path, some, in_one):
        if self.group.rank == 1:
            raise OSError(28, "No space left on device")
        return write(self, path, some, in_one)

    monkeypatch.setattr(CheckpointWriter, "_write_own", full)
    for saver in save_by(2, tmp_path, 0, step=2):
        assert str(saver.failure).endswith("could not be saved: No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_each_file_of_many_is_checked(tmp_path):
    save_by(2, tmp_path, 0)
    for file in sorted((tmp_path / "step-00000001").iterdir()):
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert file.name in corruption(tmp_path / "step-00000001")
        file.write_bytes(data)
    assert corruption(tmp_path / "step-00000001") is None


def test_a_process_that_reads_its_rows_reads_no_more(tmp_path):
    """Of 256 MiB it wants a sixteenth; its peak memory says that it took no more than that, and some."""
    rows = torch.ones(16, 2**20)
    save = CheckpointWriter(tmp_path, SINGLE, CheckpointConfig())
    some = {f"{i}": part(rows) for i in range(4)}
    save.save({"model": some, "optimizer": {}}, {"step": 1}, None)
    save.wait()
    program = f"""
import resource
from pathlib import Path
from test_background_save import read_tensors
path = Path({str(tmp_path / "step-00000001")!r})
read_tensors(path, "model", {{"0": (0, 1)}})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = read_tensors(path, "model", {{str(i): (3, 4) for i in range(4)}})
assert all(tensor.sum() == 2**20 for tensor in found.values())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = python(program)
    assert int(done.stdout) < 64 * 1024, done.stderr


def test_the_manifest_lists_every_file_and_comes_last(tmp_path):
    save_by(4, tmp_path, 0)
    path = tmp_path / "step-00000001"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest.keys() | {"manifest.json"} == {file.name for file in path.iterdir()}
    assert all((path / name).stat().st_size == entry["bytes"] for name, entry in manifest.items())
    written = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert max(written, key=written.get) == "manifest.json"
