"""A run killed at any operation, any number of times, ends in the same bits as one that was never killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, environment, rows, tensors, write_config
from launched import rows_in

from training.checkpoint import corruption, latest, list_checkpoints
from training.config import Config
from training.data import prepare
from training.data.loader import Samples
from training.errors import UserError
from training.train import train

GATED = {"activation": "silu", "gated": True}
SMALL = {
    "batch_tokens": 128,
    "micro_batch": 2,
    "model": {
        "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32,
        "position": "rope", "norm": "rmsnorm", "bias": False,
        "blocks": [
            {"ffn": {"type": "mlp", "hidden": 32, **GATED}},
            {"ffn": {"type": "moe", "n_experts": 4, "hidden": 16, "balance": "bias", **GATED}},
        ],
    },
    "eval": {"every": 4, "tokens": 128},
    "checkpoint": {"every": 2, "keep": 2},
    "logging": {"every": 1, "tensorboard": False},
}  # fmt: skip


@pytest.fixture
def kills(processes, options, tmp_path):
    """Kill trial runs by the harness `crashes.py`; returns its report."""

    def go(*arguments: str, **changes) -> dict:
        path = write_config(tmp_path / "trial.yaml", options(**SMALL | changes))
        done = processes.start("crashes:main", str(tmp_path), str(path), *arguments).wait(timeout_s=7200)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return go


def test_a_run_killed_at_file_operations_resumes_to_the_same_bits(kills):
    report = kills("--few")
    check_order(report["operations"])
    assert report["wrong"] == {}
    assert report["trials"] > 40 and len(report["operations"]) > 300


WRITES = ("open", "write", "fsync")


def check_order(operations: list[tuple[str, str]]) -> None:
    """Assert the order of four saves: sync files, manifest, folder; rename; sync the parent; prune."""
    names = [(name, path.rpartition("/checkpoints")[2]) for name, path in operations if "/checkpoints" in path]
    places = {operation: [i for i, other in enumerate(names) if other == operation] for operation in set(names)}
    for step in (2, 4, 6, 8):
        partial = f"/.step-{step:08d}.tmp"
        files = [f"{partial}/{name}" for name in ("model.safetensors", "optimizer.safetensors", "state.json")]
        synced = [places["fsync", path][0] for path in files]
        manifest = (places["open", f"{partial}/manifest.json"][0], places["fsync", f"{partial}/manifest.json"][0])
        renamed = places["rename", partial][0]
        assert max(synced) < manifest[0] < manifest[1] < places["fsync", partial][0] < renamed
        durable = min(i for i in places["fsync", ""] if i > renamed)
        changes = [name for name, _ in names[places["mkdir", partial][0] + 1 : durable] if name not in WRITES]
        assert changes == ["rename"], "nothing is removed before the new checkpoint is durable"
        for path in files:
            assert max(places["write", path]) < places["fsync", path][0]


def test_torn_writes_lose_nothing(kills):
    report = kills("--few", "--torn")
    assert report["wrong"] == {} and report["trials"] > 10


@pytest.mark.soak
def test_twenty_kills_of_a_run_that_waits_for_its_saves(kills):
    report = kills("--chains", "1", steps=40, checkpoint=SMALL["checkpoint"] | {"background": False})
    assert report["wrong"] == {}


@pytest.mark.soak
def test_twenty_kills_with_a_loss_scale_skipped_spikes_and_tensorboard(kills):
    tensorboard = SMALL["logging"] | {"tensorboard": True}
    report = kills("--chains", "1", precision="fp16", skip_spikes=1.0, steps=40, logging=tensorboard)
    assert report["wrong"] == {}
    assert report["skipped"] > 0


@pytest.mark.soak
@pytest.mark.parametrize("more", [[], ["--torn"], ["--chains", "25"]], ids=["every operation", "torn", "500 kills"])
@pytest.mark.parametrize("background", [True, False])
def test_a_run_killed_at_every_file_operation(kills, more, background):
    steps = 40 if "--chains" in more else 8
    report = kills(*more, steps=steps, checkpoint=SMALL["checkpoint"] | {"background": background})
    print(f"{report['trials']} trials, {len(report['operations'])} operations, wrong: {report['wrong']}")
    assert report["wrong"] == {}


class Victim:
    """A training process to kill when its files show that a moment has come.

    For "at start-up" it is a real command; for the other moments a fork, which saves the imports.
    """

    def __init__(self, processes, config: Path, folder: Path, moment: str):
        self.folder, self.checkpoints, self.n_before = folder, folder / "checkpoints", rows_in(folder)
        self.moment, arguments = moment, ["--config", str(config)]
        if moment == "at start-up":
            self.process = subprocess.Popen(
                [sys.executable, "-m", "training.train", *arguments], cwd=ROOT, env=environment(),
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        else:
            self.process = processes.start("training.train:main", *arguments)

    def until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            assert self.process.poll() is None, "it ended before it was killed"
            time.sleep(0.0005)

    def kill(self, draw: random.Random) -> bool:
        """Kill it at its moment; return True if its files show that the kill came in time."""
        if self.moment == "at start-up":
            time.sleep(draw.uniform(0.2, 1.0))
        else:
            far = self.n_before + draw.randrange(3, 30)
            self.until(lambda: rows_in(self.folder) > far)
        if self.moment == "in a save":
            self.until(self.saving)
            time.sleep(draw.uniform(0, 0.005))
        elif self.moment == "in an evaluation":
            self.until(self.evaluating)
        elif self.moment == "before old checkpoints go":
            self.until(self.too_many)
        assert self.process.poll() is None
        self.process.kill()
        self.process.wait()
        assert self.process.poll() == -signal.SIGKILL
        return {
            "at start-up": lambda: rows_in(self.folder) == self.n_before,
            "training": lambda: True,
            "in a save": self.saving,
            "in an evaluation": lambda: rows_in(self.folder) % EVAL_EVERY == EVAL_EVERY - 1,
            "before old checkpoints go": self.too_many,
        }[self.moment]()

    def names(self) -> list[str]:
        return os.listdir(self.checkpoints) if self.checkpoints.exists() else []  # noqa: PTH208 (the quickest look)

    def saving(self) -> bool:
        return any(name.endswith(".tmp") for name in self.names())

    def too_many(self) -> bool:
        return sum(name.startswith("step-") for name in self.names()) > 2 + 1  # the two newest and the best are kept

    def evaluating(self) -> bool:
        """Return True if an evaluation delays the next row."""
        n_rows = rows_in(self.folder)
        if n_rows % EVAL_EVERY != EVAL_EVERY - 1:
            return False
        time.sleep(0.05)
        return rows_in(self.folder) == n_rows


EVAL_EVERY = 50
IN_SMALL = ["in a save", "in an evaluation", "at start-up", "training"]
IN_FULL = {"in a save": 20, "in an evaluation": 5, "at start-up": 5, "before old checkpoints go": 5, "training": 15}


@pytest.mark.parametrize(
    ("steps", "moments"),
    [
        pytest.param(200, IN_SMALL, id="4"),
        pytest.param(4000, [m for m, n in IN_FULL.items() for _ in range(n)], marks=pytest.mark.soak, id="50"),
    ],
)
def test_kills_of_a_training_process_lose_nothing(processes, options, run, tmp_path, steps, moments):
    long = SMALL | {
        "steps": steps,
        "model": SMALL["model"] | {"vocab_size": 4096},  # so that a save takes a while
        "checkpoint": {"every": 5, "keep": 2},
        "eval": {"every": EVAL_EVERY, "tokens": 2**12},  # and an evaluation
    }
    path, draw = write_config(tmp_path / "killed.yaml", options(name="killed", **long)), random.Random(1)
    folder, seen = tmp_path / "runs/killed", []
    for moment in draw.sample(moments, len(moments)):
        while not Victim(processes, path, folder, moment).kill(draw):  # retry if the save was faster than the signal
            continue
        seen.append(moment)
        latest(folder / "checkpoints", pytest.fail)
    assert sorted(seen) == sorted(moments)
    run(name="killed", **long)
    through = run(name="through", **long)
    assert rows(folder) == rows(through)
    assert tensors(folder, steps) == tensors(through, steps)


STOPS = [
    (1, ["first", "warm-up", "evaluation", "end of text", "new epoch", "before the last"]),
    (3, ["warm-up", "before the last"]),
]


@pytest.mark.parametrize(("n_stops", "moments"), STOPS)
def test_a_run_stopped_at_every_kind_of_step_and_past_the_end_of_the_text(run, config, at_step, n_stops, moments):
    texts = [{"type": "files", "paths": [str(Path(json.__file__).with_name("scanner.py"))]}]
    data = config().data.model_dump() | {"sources": texts, "val_sources": texts}
    short = SMALL | {"steps": 40, "schedule": {"warmup_steps": 4}, "checkpoint": {"every": 100}, "data": data}
    through = run(name="through", **short)
    n_samples = train_windows(config(**short))
    assert n_samples < 40 * 4 / 2, "the run reads the text more than twice"
    epoch = n_samples // 4
    steps = {"first": 1, "warm-up": 3, "evaluation": 4, "end of text": epoch, "new epoch": epoch + 1,
             "before the last": 39}  # fmt: skip
    for moment in moments:
        at_step.clear()
        stops = range(steps[moment], min(steps[moment] + n_stops, 41))
        for step in stops:
            at_step.send(step)
        stopped = config(name=f"stopped-{steps[moment]}", **short)
        ends = [train(stopped)]
        while ends[-1]:
            ends.append(train(stopped))
        assert ends == [128 + signal.SIGTERM] * len(stops) + [0]
        assert rows(stopped.run_dir) == rows(through), moment
        assert tensors(stopped.run_dir, 40) == tensors(through, 40), moment


def train_windows(config: Config) -> int:
    """Return the number of samples in the training split."""
    return Samples(prepare(config.data, quiet=True).train, n_positions=32, seed=0).n_samples


def test_each_of_a_thousand_flipped_bits_is_detected(finished):
    folder = finished(**SMALL) / "checkpoints/step-00000008"
    draw, missed = random.Random(0), []
    files = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    for path, data in files.items():
        for place in [draw.randrange(8 * len(data)) for _ in range(250)]:
            flipped = bytearray(data)
            flipped[place // 8] ^= 1 << place % 8
            path.write_bytes(flipped)
            if corruption(folder) is None:
                missed.append((path.name, place))
        path.write_bytes(data)
    assert len(files) == 4 and missed == []
    assert corruption(folder) is None


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize(
    "harm", ["gone", "empty", "half", "one byte less", "one byte more", "of another step", "of another run", "a folder"]
)
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(finished, config, capsys, file, harm):
    folder = finished(**SMALL)
    before = tensors(folder, 8), rows(folder)
    other = finished(name="other", seed=1, **SMALL) if harm == "of another run" else folder
    path = folder / "checkpoints/step-00000008" / file
    data = path.read_bytes()
    path.unlink()
    if harm.startswith("of another"):
        step = path.parent.name if harm == "of another run" else "step-00000006"
        shutil.copy(other / "checkpoints" / step / file, path)
    elif harm == "a folder":
        path.mkdir()
    elif harm != "gone":
        half = data[: len(data) // 2]
        path.write_bytes({"empty": b"", "half": half, "one byte less": data[:-1], "one byte more": data + b"\0"}[harm])
    capsys.readouterr()
    assert train(config(**SMALL)) == 0
    messages = [line for line in capsys.readouterr().out.splitlines() if "falling back" in line]
    assert len(messages) == 1 and str(path.parent) in messages[0]
    assert (tensors(folder, 8), rows(folder)) == before


def test_a_checkpoint_under_another_steps_name_is_corrupt(finished):
    folder = finished(**SMALL) / "checkpoints"
    shutil.copytree(folder / "step-00000006", folder / "step-00000099")
    path = folder / "step-00000099"
    assert corruption(path) == f"{path}: damaged: it is the checkpoint of another step"


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc/hostname"])
def test_a_manifest_that_names_files_elsewhere_is_corrupt(finished, name):
    folder = finished(**SMALL) / "checkpoints/step-00000008"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {name: manifest["state.json"]}, indent=1))
    assert corruption(folder) == f"{folder}/manifest.json: damaged: {name!r} is no file of this folder"


def test_a_run_with_only_damaged_checkpoints_ends_and_does_not_start_over(finished, config):
    folder = finished(**SMALL)
    for _, path in list_checkpoints(folder / "checkpoints"):
        (path / "state.json").write_text("{}")
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="every checkpoint is damaged; start over with --resume never"):
        train(config(**SMALL))
    assert (folder / "metrics.jsonl").read_bytes() == before
