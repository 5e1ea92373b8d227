"""A run that is killed anywhere, any number of times, ends in the bits of one that was not."""

from __future__ import annotations

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
from conftest import ROOT, command, environment, rows, tensors, write_config
from launched import rows_in

from training.checkpoint import corruption, latest, list_checkpoints
from training.data import prepare
from training.data.loader import Samples
from training.engine import step as loop
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
def killed(options, tmp_path):
    """Run the harness; returns what it found."""

    def go(*arguments: str, **changes) -> dict:
        path = write_config(tmp_path / "trial.yaml", options(**SMALL | changes))
        harness = [sys.executable, str(ROOT / "tests/crashes.py"), str(tmp_path), str(path), *arguments]
        done = subprocess.run(harness, env=environment(), capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return go


def test_killed_at_operations_on_files_it_goes_on_to_the_same_bits(killed):
    found = killed("--few")
    in_order(found["operations"])
    assert found["wrong"] == {}
    assert found["trials"] > 40 and len(found["operations"]) > 300


WRITES = ("open", "write", "fsync")


def in_order(operations: list[tuple[str, str]]) -> None:
    """Of each of four saves: every file synced, the manifest last, the folder, its name, its parent; then others go."""
    names = [(name, path.rpartition("/checkpoints")[2]) for name, path in operations if "/checkpoints" in path]
    places = {operation: [i for i, found in enumerate(names) if found == operation] for operation in set(names)}
    for step in (2, 4, 6, 8):
        partial = f"/.step-{step:08d}.tmp"
        files = [f"{partial}/{name}" for name in ("model.safetensors", "optimizer.safetensors", "state.json")]
        synced = [places["fsync", path][0] for path in files]
        manifest = (places["open", f"{partial}/manifest.json"][0], places["fsync", f"{partial}/manifest.json"][0])
        renamed = places["rename", partial][0]
        assert max(synced) < manifest[0] < manifest[1] < places["fsync", partial][0] < renamed
        durable = min(i for i in places["fsync", ""] if i > renamed)
        changes = [name for name, _ in names[places["mkdir", partial][0] + 1 : durable] if name not in WRITES]
        assert changes == ["rename"], "nothing goes before the new one is durable"
        for path in files:
            assert max(places["write", path]) < places["fsync", path][0]


def test_writes_that_are_torn_count_for_nothing(killed):
    found = killed("--few", "--torn")
    assert found["wrong"] == {} and found["trials"] > 10


def test_twenty_kills_in_one_run_with_saves_that_are_waited_for(killed):
    found = killed("--chains", "1", steps=40, checkpoint=SMALL["checkpoint"] | {"background": False})
    assert found["wrong"] == {}


def test_twenty_kills_with_a_loss_scale_spikes_that_are_skipped_and_tensorboard(killed):
    found = killed(
        "--chains", "1", precision="fp16", skip_spikes=1.0, steps=40, logging=SMALL["logging"] | {"tensorboard": True}
    )
    assert found["wrong"] == {}
    assert found["skipped"] > 0


@pytest.mark.soak
@pytest.mark.parametrize("more", [[], ["--torn"], ["--chains", "25"]], ids=["every operation", "torn", "500 kills"])
@pytest.mark.parametrize("background", [True, False])
def test_killed_at_every_operation(killed, more, background):
    steps = 40 if "--chains" in more else 8
    found = killed(*more, steps=steps, checkpoint=SMALL["checkpoint"] | {"background": background})
    print(f"{found['trials']} trials, {len(found['operations'])} operations, wrong: {found['wrong']}")
    assert found["wrong"] == {}


class Real:
    """The command as a process that is killed by what can be seen of its run from outside."""

    def __init__(self, config: Path, folder: Path):
        self.folder, self.checkpoints, self.n_before = folder, folder / "checkpoints", rows_in(folder)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "training.train", "--config", str(config)], cwd=ROOT, env=environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def until(self, seen: Callable[[], bool]) -> None:
        while not seen():
            assert self.process.poll() is None, f"it ended before it was killed: {self.process.stderr.read()}"
            time.sleep(0.0005)

    def kill(self, draw: random.Random, moment: str) -> bool:
        """Kill it, alive, at such a moment; whether what it left says that it was."""
        if moment == "at start-up":
            time.sleep(draw.uniform(0.2, 1.0))
        else:
            far = self.n_before + draw.randrange(3, 30)
            self.until(lambda: rows_in(self.folder) > far)
        if moment == "in a save":
            self.until(self.saving)
            time.sleep(draw.uniform(0, 0.005))
        elif moment == "in an evaluation":
            self.until(self.evaluating)
        elif moment == "before what is old goes":
            self.until(self.too_many)
        assert self.process.poll() is None
        self.process.kill()
        self.process.communicate()
        assert self.process.returncode == -signal.SIGKILL
        return {
            "at start-up": lambda: rows_in(self.folder) == self.n_before,
            "training": lambda: True,
            "in a save": self.saving,
            "in an evaluation": lambda: rows_in(self.folder) % EVAL_EVERY == EVAL_EVERY - 1,
            "before what is old goes": self.too_many,
        }[moment]()

    def names(self) -> list[str]:
        return os.listdir(self.checkpoints) if self.checkpoints.exists() else []  # noqa: PTH208 (the quickest look)

    def saving(self) -> bool:
        return any(name.endswith(".tmp") for name in self.names())

    def too_many(self) -> bool:
        return sum(name.startswith("step-") for name in self.names()) > 2 + 1  # of two kept, and the best

    def evaluating(self) -> bool:
        """Whether the row of an evaluation's step is due, and does not come."""
        n_rows = rows_in(self.folder)
        if n_rows % EVAL_EVERY != EVAL_EVERY - 1:
            return False
        time.sleep(0.05)
        return rows_in(self.folder) == n_rows


EVAL_EVERY = 50
IN_SMALL = ["in a save", "in an evaluation", "at start-up", "training"]
IN_FULL = {"in a save": 20, "in an evaluation": 5, "at start-up": 5, "before what is old goes": 5, "training": 15}


@pytest.mark.parametrize(
    ("steps", "moments"),
    [
        pytest.param(200, IN_SMALL, id="4"),
        pytest.param(4000, [m for m, n in IN_FULL.items() for _ in range(n)], marks=pytest.mark.soak, id="50"),
    ],
)
def test_real_kills_of_a_process_that_trains_lose_nothing(options, run, tmp_path, steps, moments):
    long = SMALL | {
        "steps": steps,
        "model": SMALL["model"] | {"vocab_size": 4096},  # so that a save takes a while
        "checkpoint": {"every": 5, "keep": 2},
        "eval": {"every": EVAL_EVERY, "tokens": 2**12},  # and an evaluation
    }
    path, draw = write_config(tmp_path / "killed.yaml", options(name="killed", **long)), random.Random(1)
    folder, seen = tmp_path / "runs/killed", []
    for moment in draw.sample(moments, len(moments)):
        while not Real(path, folder).kill(draw, moment):  # the save was quicker than the signal
            continue
        seen.append(moment)
        latest(folder / "checkpoints", pytest.fail)
    assert sorted(seen) == sorted(moments)
    done = command("-m", "training.train", "--config", str(path))
    assert done.returncode == 0, done.stderr
    through = run(name="through", **long)
    assert rows(folder) == rows(through)
    assert tensors(folder, steps) == tensors(through, steps)


@pytest.mark.parametrize("n_stops", [1, 3])
def test_stopped_at_every_kind_of_step_and_past_the_end_of_the_text(run, config, monkeypatch, n_stops):
    """After the first step, in warm-up, after an evaluation, around the end of an epoch, before the last step."""
    texts = [{"type": "files", "paths": [str(Path(json.__file__).with_name("scanner.py"))]}]
    data = config().data.model_dump() | {"sources": texts, "val_sources": texts}
    short = SMALL | {"steps": 40, "schedule": {"warmup_steps": 4}, "checkpoint": {"every": 100}, "data": data}
    through = run(name="through", **short)
    n_samples = train_windows(config, short)
    assert n_samples < 40 * 4 / 2, "the text is read twice and more"
    original = loop.train_step
    for moment in (1, 3, 4, n_samples // 4, n_samples // 4 + 1, 39):
        made, stops = config(name=f"stopped-{moment}", **short), iter([True] * n_stops)

        def stopping(run, moment=moment, stops=stops):
            original(run)
            if run.step >= moment and next(stops, False):
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(loop, "train_step", stopping)
        ends = [train(made)]
        while ends[-1]:
            ends.append(train(made))
        assert ends == [128 + signal.SIGTERM] * min(n_stops, 41 - moment) + [0]
        folder = through.with_name(made.name)
        assert rows(folder) == rows(through), moment
        assert tensors(folder, 40) == tensors(through, 40), moment


def train_windows(config, options: dict) -> int:
    made = config(**options)
    return Samples(prepare(made.data, quiet=True).train, n_positions=32, seed=0).n_samples


def test_of_a_thousand_bits_that_flip_every_one_is_found(run):
    folder = run(**SMALL) / "checkpoints/step-00000008"
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
def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(run, config, capsys, file, harm):
    folder = run(**SMALL)
    bits, found = tensors(folder, 8), rows(folder)
    other = run(name="other", seed=1, **SMALL) if harm == "of another run" else folder
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
    said = [line for line in capsys.readouterr().out.splitlines() if "falling back" in line]
    assert len(said) == 1 and str(path.parent) in said[0]
    assert tensors(folder, 8) == bits
    assert rows(folder) == found


def test_a_checkpoint_under_another_steps_name_is_damaged(run):
    folder = run(**SMALL) / "checkpoints"
    shutil.copytree(folder / "step-00000006", folder / "step-00000099")
    assert (
        corruption(folder / "step-00000099") == f"{folder}/step-00000099: damaged: it is the checkpoint of another step"
    )


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc/hostname"])
def test_a_manifest_that_names_files_elsewhere_is_damaged(run, name):
    folder = run(**SMALL) / "checkpoints/step-00000008"
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {name: manifest["state.json"]}, indent=1))
    assert corruption(folder) == f"{folder}/manifest.json: damaged: {name!r} is no file of this folder"


def test_where_all_are_damaged_the_run_ends_and_nothing_is_begun_anew(run, config):
    folder = run(**SMALL)
    for _, path in list_checkpoints(folder / "checkpoints"):
        (path / "state.json").write_text("{}")
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="every checkpoint is damaged; start over with --resume never"):
        train(config(**SMALL))
    assert (folder / "metrics.jsonl").read_bytes() == before
