"""Signals at any moment: at most the step in progress is lost, all ranks stop alike, and the run resumes exactly."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, environment, rows, tensors, write_config
from launched import rows_in

from training import checkpoint
from training.checkpoint import CheckpointWriter
from training.errors import UserError
from training.logging.jsonl import JSONLSink
from training.optim.optimizer import Optimizer
from training.train import train

STEPS = 16
OFTEN = {"steps": STEPS, "checkpoint": {"every": 5}, "eval": {"every": 6, "tokens": 256}}


@pytest.fixture
def through(finished):
    """The run without a signal."""
    return finished(name="through", **OFTEN)


def send(number: int, times: int = 1) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


def in_a_forward(step: int, evaluation: bool = False):
    """Send a signal in the second forward of a step, or in the evaluation after it."""

    def prepare(at_step, _monkeypatch, number):
        calls = []

        def count(*_):
            if torch.is_grad_enabled() != evaluation:
                calls.append(1)
                if len(calls) == 2:
                    send(number)

        at_step.before_step(step, lambda model: model.register_forward_pre_hook(count))

    return prepare


def at_call(where, name: str, call: int, times: int = 1):
    """Send a signal when a method is called for the (call + 1)-th time."""

    def prepare(_at_step, monkeypatch, number):
        original, calls = getattr(where, name), iter(range(1000))

        def sending(*arguments, **named):
            if next(calls) == call:
                send(number, times)
            return original(*arguments, **named)

        monkeypatch.setattr(where, name, sending)

    return prepare


MOMENTS = {
    "in a step": in_a_forward(8),
    "before an update": at_call(Optimizer, "step", 7),
    "in the first step": at_call(Optimizer, "step", 0),
    "in the last step": at_call(Optimizer, "step", STEPS - 1),
    "in an evaluation": in_a_forward(6, evaluation=True),
    "in a save": at_call(CheckpointWriter, "save", 0),
    "while rows are written": at_call(JSONLSink, "write", 1),
    "twice": at_call(Optimizer, "step", 7, times=2),
}


CASES = [(moment, signal.SIGTERM) for moment in MOMENTS] + [("in a step", signal.SIGINT), ("in a save", signal.SIGUSR1)]


@pytest.mark.parametrize(("moment", "number"), CASES, ids=[f"{moment}-{n.name}" for moment, n in CASES])
def test_a_signal_saves_after_the_step_and_the_run_resumes(
    config, through, at_step, monkeypatch, capsys, moment, number
):
    stopped = config(name="stopped", **OFTEN)
    with monkeypatch.context() as patched:
        MOMENTS[moment](at_step, patched, number)
        status = train(stopped)
    at_step.clear()
    folder = stopped.run_dir
    last = rows(folder)[-1]["step"]
    assert checkpoint.latest(folder / "checkpoints", pytest.fail).name == f"step-{last:08d}"
    message = f"stopped by {number.name}, saved after step {last}; the same command resumes it\n"
    assert (status, capsys.readouterr().out.endswith(message)) == (128 + number, True)
    assert train(stopped) == 0
    assert rows(folder) == rows(through)
    assert tensors(folder, STEPS) == tensors(through, STEPS)


def test_a_failed_save_is_not_announced(config, at_step, tmp_path, capsys):
    """The save after the signal fails in its thread: a file has the name of its folder."""

    def block(_model):
        (tmp_path / "runs/stopped/checkpoints").write_text("a file")
        send(signal.SIGTERM)

    at_step(2, block)
    with pytest.raises(UserError, match="step-00000002: the checkpoint could not be saved: File exists"):
        train(config(name="stopped", **OFTEN))
    assert "stopped by" not in capsys.readouterr().out


PLACES = ["read", "prepare folder", "open logs", "watch signals"]
RESUMING = [(number, place) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) for place in PLACES]
FEW = [each for each in RESUMING if each[0] == signal.SIGTERM or each[1] == "read"]


@pytest.mark.parametrize("cases", [FEW, pytest.param(RESUMING, marks=pytest.mark.soak)], ids=["few", "all"])
def test_a_signal_while_a_run_is_resumed_ends_it_and_harms_nothing(processes, options, run, through, tmp_path, cases):
    """The signal comes while the run reads the checkpoint, prepares its folder, opens its logs or its handlers."""
    changes = OFTEN | {"checkpoint": {"every": 5, "keep": 10}}
    folder = run(name="resumed", **changes)
    for step, path in checkpoint.list_checkpoints(folder / "checkpoints"):
        if step > 5:
            shutil.rmtree(path)
    path = write_config(tmp_path / "resumed.yaml", options(name="resumed", **changes))

    def files():
        return {path: path.read_bytes() for path in (folder / "checkpoints/step-00000005").iterdir()}

    before = files()
    for number, place in cases:
        variables = {"SIGNAL": str(int(number)), "AT": place}
        ended = processes.run("trajectory:main_with_a_signal", "--config", str(path), env=variables)
        assert ended.statuses[0] in (-number, 128 + number), (place, number, ended)
        assert "Traceback" not in ended.stderr
        assert files() == before
    run(name="resumed", **changes)
    assert rows(folder) == rows(through)
    assert tensors(folder, STEPS) == tensors(through, STEPS)


def start(path, *launcher: str) -> subprocess.Popen:
    """Start the command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "training.train", "--config", str(path)],
        cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_signal_before_the_first_step_ends_at_once_and_harms_nothing(options, run, through, tmp_path):
    path = write_config(tmp_path / "early.yaml", options(name="early", **OFTEN))
    for delay in (0.2, 1.0, 2.0):
        process = start(path)
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert (process.returncode, errors) in [(-signal.SIGTERM, ""), (128 + signal.SIGTERM, "")]
    folder = run(name="early", **OFTEN)
    assert rows(folder) == rows(through)
    assert tensors(folder, STEPS) == tensors(through, STEPS)


def test_a_second_signal_a_second_later_ends_at_once_and_harms_nothing(processes, options, run, tmp_path):
    """The second step never ends, so the first signal waits for it."""
    often = {
        "steps": 2,
        "schedule": {"warmup_steps": 1},
        "checkpoint": {"every": 1},
        "eval": {"every": None, "tokens": 64},
    }
    path = write_config(tmp_path / "hangs.yaml", options(name="hangs", **often))
    hang = {"HANG": "0:2", "SLOW_RECORD": "0:0"}
    process = processes.start("trajectory:main_that_hangs", "--config", str(path), env=hang)
    folder, until = tmp_path / "runs/hangs/checkpoints", time.monotonic() + 60
    while not (folder / "step-00000001").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.signal(signal.SIGTERM)
    time.sleep(1.2)
    process.signal(signal.SIGTERM)
    assert process.wait(30).statuses == [-signal.SIGTERM]
    run(name="hangs", **often)
    through = run(name="through", **often)
    assert tensors(tmp_path / "runs/hangs", 2) == tensors(through, 2)


PASSED_ON = "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"
SIGNALS = [(signal.SIGTERM, ()), (signal.SIGINT, ()), (signal.SIGUSR1, PASSED_ON)]


@pytest.mark.parametrize(
    "signals", [SIGNALS[:1], pytest.param(SIGNALS, marks=pytest.mark.soak)], ids=["SIGTERM", "all"]
)
def test_a_signal_to_torchrun_stops_all_ranks_at_one_step_and_the_run_resumes(options, run, tmp_path, signals):
    """Two ranks with one micro-batch each equal one process with two, bit for bit: a sum of two has one order."""
    alike = {
        "steps": 120,
        "eval": {"every": None, "tokens": 64},
        "checkpoint": {"every": None},
        "logging": {"every": 1},
    }
    path = write_config(tmp_path / "two.yaml", options(name="two", **alike))
    folder = tmp_path / "runs/two"
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    for number, more in signals:
        before = rows_in(folder)
        process = start(path, *launcher, *more)
        until = time.monotonic() + 60
        while rows_in(folder) < before + 4:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        step, newest = checkpoint.list_checkpoints(folder / "checkpoints")[-1]
        assert checkpoint.corruption(newest) is None
        assert f"stopped by {number.name}, saved after step {step}; the same command resumes it" in output
        assert before < rows(folder)[-1]["step"] == step < alike["steps"]
    run(name="two", **alike)
    through = run(name="through", **alike)
    assert rows(folder) == rows(through)
    assert tensors(folder, alike["steps"]) == tensors(through, alike["steps"])
