"""Signals at any moment: at most the step in progress is lost, all ranks stop alike, and the run goes on exactly."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, command, environment, rows, tensors, write_config
from launched import rows_in

from training import checkpoint
from training.engine import step as loop
from training.errors import UserError
from training.train import train

STEPS = 16
OFTEN = {"steps": STEPS, "checkpoint": {"every": 5}, "eval": {"every": 6, "tokens": 256}}


@pytest.fixture
def through(run):
    """The run that nobody stopped."""
    return run(name="through", **OFTEN)


def send(number: int, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


def in_a_forward(monkeypatch, number):
    """Between two micro-batches."""
    before, calls = loop.forward_backward, iter(range(1000))

    def sending(*arguments):
        before(*arguments)
        if next(calls) == 14:  # of two a step
            send(number)

    monkeypatch.setattr(loop, "forward_backward", sending)


def at(where, name: str, call: int, times: int = 1):
    """When a function is called for the so-manieth time."""

    def prepare(monkeypatch, number):
        before, calls = getattr(where, name), iter(range(1000))

        def sending(*arguments, **named):
            if next(calls) == call:
                send(number, times)
            return before(*arguments, **named)

        monkeypatch.setattr(where, name, sending)

    return prepare


MOMENTS = {
    "in a step": in_a_forward,
    "before an update": at(loop, "update", 7),
    "in the first step": at(loop, "update", 0),
    "in the last step": at(loop, "update", STEPS - 1),
    "in an evaluation": at(loop, "evaluate", 0),
    "in a save": at(loop, "save", 0),
    "while rows are written": at(loop, "update_report", 1),
    "twice": at(loop, "update", 7, times=2),
}


CASES = [(moment, signal.SIGTERM) for moment in MOMENTS] + [("in a step", signal.SIGINT), ("in a save", signal.SIGUSR1)]


@pytest.mark.parametrize(("moment", "number"), CASES, ids=[f"{moment}-{n.name}" for moment, n in CASES])
def test_a_signal_saves_after_the_step_and_the_run_goes_on(config, through, monkeypatch, capsys, moment, number):
    made = config(name="stopped", **OFTEN)
    with monkeypatch.context() as patched:
        MOMENTS[moment](patched, number)
        status = train(made)
    folder = through.with_name("stopped")
    last = rows(folder)[-1]["step"]
    newest = checkpoint.latest(folder / "checkpoints", pytest.fail)
    assert newest.name == f"step-{last:08d}"
    said = f"stopped by {number.name}, saved after step {last}; the same command goes on\n"
    assert (status, capsys.readouterr().out.endswith(said)) == (128 + number, True)
    assert train(made) == 0
    assert rows(folder) == rows(through)
    assert tensors(folder, STEPS) == tensors(through, STEPS)


def test_a_save_that_fails_is_not_said_to_be_there(config, monkeypatch, tmp_path, capsys):
    """The one that a signal asks for, beside the loop: a file is where its folder should be."""
    at(loop, "update", 1)(monkeypatch, signal.SIGTERM)
    at_save = loop.save

    def blocked(run):
        (tmp_path / "runs/stopped/checkpoints").write_text("a file")
        at_save(run)

    monkeypatch.setattr(loop, "save", blocked)
    with pytest.raises(UserError, match="step-00000002: the checkpoint could not be saved: File exists"):
        train(config(name="stopped", **OFTEN))
    assert "stopped by" not in capsys.readouterr().out


RESUMING = """
import os, signal
from pathlib import Path
from crashes import forked
from training import checkpoint, cli, restart, run
from training.engine.step import Watch
from training.train import main
folder = Path({folder!r})
places = [(checkpoint, "read_tensors"), (checkpoint, "quarantine"), (restart, "make_way"), (run, "open_logs")]
places.append((Watch, "__init__"))

def files():
    return {{path: path.read_bytes() for path in (folder / "checkpoints/step-00000005").iterdir()}}

before = files()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    for where, name in places:
        does = getattr(where, name)
        def sent(*arguments, does=does, number=number, **named):
            os.kill(os.getpid(), number)
            return does(*arguments, **named)
        setattr(where, name, sent)
        print(forked(lambda: main(["--config", {path!r}])), number.value)
        setattr(where, name, does)
        assert files() == before
"""


def test_a_signal_while_a_run_is_resumed_ends_it_and_harms_nothing(options, run, through, tmp_path):
    """While it reads the checkpoint, sets later ones aside, opens its logs, and as it begins to look for signals."""
    changes = OFTEN | {"checkpoint": {"every": 5, "keep": 10}}
    folder = run(name="resumed", **changes)
    for step, path in checkpoint.list_checkpoints(folder / "checkpoints"):
        if step > 5:
            shutil.rmtree(path)
    path = write_config(tmp_path / "resumed.yaml", options(name="resumed", **changes))
    done = command("-c", RESUMING.format(folder=str(folder), path=str(path)), env={"PYTHONPATH": str(ROOT / "tests")})
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    ends = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(ends) == 15
    assert all(status in (-number, 128 + number) for status, number in ends), ends
    run(name="resumed", **changes)
    assert rows(folder) == rows(through)
    assert tensors(folder, STEPS) == tensors(through, STEPS)


def start(path, *launcher: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "training.train", "--config", str(path)],
        cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_signal_before_the_first_step_ends_at_once_and_harms_nothing(options, through, tmp_path):
    path = write_config(tmp_path / "early.yaml", options(name="early", **OFTEN))
    for delay in (0.2, 1.0, 2.0):
        process = start(path)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
        assert (process.returncode, said) in [(-signal.SIGTERM, ""), (128 + signal.SIGTERM, "")]
    assert command("-m", "training.train", "--config", str(path)).returncode == 0
    assert rows(through.with_name("early")) == rows(through)
    assert tensors(through.with_name("early"), STEPS) == tensors(through, STEPS)


def test_a_second_signal_a_while_later_ends_at_once_and_harms_nothing(options, run, tmp_path):
    """Steps of some seconds, so that the first signal has to wait for one."""
    slow = {
        "steps": 2,
        "batch_tokens": 2**15,
        "schedule": {"warmup_steps": 1},
        "checkpoint": {"every": 1},
        "eval": {"every": None, "tokens": 64},
    }
    path = write_config(tmp_path / "slow.yaml", options(name="slow", **slow))
    process, folder = start(path), tmp_path / "runs/slow/checkpoints"
    until = time.monotonic() + 60
    while not (folder / "step-00000001").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert command("-m", "training.train", "--config", str(path)).returncode == 0
    through = run(name="through", **slow)
    assert tensors(tmp_path / "runs/slow", 2) == tensors(through, 2)


def test_signals_to_torchrun_stop_all_its_ranks_at_one_step_and_the_run_goes_on(options, run, tmp_path):
    """Two ranks of a micro-batch each compute the bits of one process with two: a sum of two has one order."""
    alike = {
        "steps": 400,
        "eval": {"every": None, "tokens": 64},
        "checkpoint": {"every": None},
        "logging": {"every": 1},
    }
    path = write_config(tmp_path / "two.yaml", options(name="two", **alike))
    folder = tmp_path / "runs/two"
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    passed_on = "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"
    for number, more in ((signal.SIGTERM, ()), (signal.SIGINT, ()), (signal.SIGUSR1, passed_on)):
        before = rows_in(folder)
        process = start(path, *launcher, *more)
        until = time.monotonic() + 60
        while rows_in(folder) < before + 4:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
        step, newest = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
        assert checkpoint.corruption(newest) is None
        assert f"stopped by {number.name}, saved after step {step}; the same command goes on" in said
        assert before < rows(folder)[-1]["step"] == step < alike["steps"]
    run(name="two", **alike)
    through = run(name="through", **alike)
    assert rows(folder) == rows(through)
    assert tensors(folder, alike["steps"]) == tensors(through, alike["steps"])
