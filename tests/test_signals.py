"""Signals at any moment: at most the step in progress is lost, all ranks stop alike, and the run goes on exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, command, environment, rows, tensors, write_config

from training import checkpoint, loop
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
    "while rows are written": at(loop, "write_report", 1),
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
    newest = checkpoint.newest(folder / "checkpoints", pytest.fail)
    assert newest.name == f"step-{last:08d}"
    said = f"stopped by {number.name}, saved after step {last}; the same command goes on\n"
    assert (status, capsys.readouterr().out.endswith(said)) == (128 + number, True)
    assert train(made) == 0
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
    slow = {"steps": 3, "batch_tokens": 2**15, "checkpoint": {"every": 1}, "eval": {"every": None, "tokens": 64}}
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
    assert tensors(tmp_path / "runs/slow", 3) == tensors(through, 3)


def test_a_signal_to_torchrun_stops_all_its_ranks_at_one_step(options, tmp_path):
    made = options(name="two", steps=1_000_000, eval={"every": None, "tokens": 64}, checkpoint={"every": None})
    path = write_config(tmp_path / "two.yaml", made)
    launcher = start(path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    metrics = tmp_path / "runs/two/metrics.jsonl"
    until = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") > 3):
        assert launcher.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    launcher.send_signal(signal.SIGTERM)
    said, _ = launcher.communicate(timeout=60)
    (step,) = {path for _, path in checkpoint.steps(tmp_path / "runs/two/checkpoints")}
    assert checkpoint.damage(step) is None
    assert f"stopped by SIGTERM, saved after step {int(step.name[5:])}; the same command goes on" in said
    assert rows(tmp_path / "runs/two")[-1]["step"] == int(step.name[5:])
