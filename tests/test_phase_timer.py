"""The phase timer: every moment is in one phase, waiting counts where it happens, and restarts add up."""

import json
import os
import signal
import time
from contextlib import contextmanager, nullcontext

import pytest
import torch
from conftest import write_config
from torch.utils._python_dispatch import TorchDispatchMode

from training import engine
from training.config import Config
from training.data.loader import Samples
from training.distributed.world import World
from training.logging.jsonl import read_rows
from training.logging.phases import PHASES, PRODUCTIVE, PhaseTimer, as_text
from training.logging.rows import RunLog
from training.train import train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")]
SLOW_S = 0.05


@pytest.fixture
def train_timed(config, monkeypatch):
    """Train and return the log, after a check that the phases up to the last step add up to the wall clock."""

    def go(device=DEVICE, **changes) -> RunLog:
        logs, clock = [], []
        open_log, finish = engine.open_log, engine.finish

        def opened(*arguments):
            logs.append(open_log(*arguments))
            clock.append(time.perf_counter() - total(logs[0].timer))
            return logs[0]

        def finished(*arguments):
            clock.append(total(logs[0].timer))
            clock.append(time.perf_counter())
            finish(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(engine, "open_log", opened)
            patch.setattr(engine, "finish", finished)
            options = {"logging": {"every": 3, "tensorboard": False}, "parallel": {"device": device.type}}
            assert train(config(**options | changes)) == 0
        start, end_total, end = clock
        assert end_total == pytest.approx(end - start, rel=0.02)
        return logs[0]

    return go


def total(timer: PhaseTimer) -> float:
    timer.flush()
    return sum(timer.seconds.values())


def around_steps(monkeypatch, around) -> None:
    """Run each step of `train` inside the context `around(state)`."""
    original = engine.train_step

    def train_step(setup, phase):
        with around(setup.state):
            return original(setup, phase)

    monkeypatch.setattr(engine, "train_step", train_step)


def test_each_phase_has_its_duration():
    timer, begin = PhaseTimer(torch.device("cpu")), time.perf_counter()
    durations = {"data": 0.06, "compute": 0.12, "optimizer": 0.03}
    time.sleep(0.05)
    measured = dict.fromkeys(("idle", *durations), 0.0)
    timer.finish_startup()
    for phase in ("idle", *durations, *durations):
        timer.enter(phase)
        entered = time.perf_counter()
        time.sleep(durations.get(phase, 0.0))
        measured[phase] += time.perf_counter() - entered
    timer.flush()
    wall = time.perf_counter() - begin
    assert sum(timer.seconds.values()) == pytest.approx(wall, rel=0.02)
    for phase in durations:
        assert measured[phase] <= timer.seconds[phase] == pytest.approx(measured[phase], abs=0.03)
    assert timer.seconds["start"] >= 0.05
    assert timer.goodput == pytest.approx(sum(measured[phase] for phase in durations) / wall, abs=0.05)


def test_startup_is_one_phase_until_finish_startup():
    timer = PhaseTimer(torch.device("cpu"), time.perf_counter() - 10)
    for phase in ("data", "compute", "optimizer", "evaluation"):
        timer.enter(phase)
        time.sleep(0.005)
    timer.finish_startup()
    timer.flush()
    assert 10.02 < timer.seconds["start"] < 10.5
    assert sum(timer.seconds[phase] for phase in (*PRODUCTIVE, "evaluation")) == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_the_phases_add_up_to_the_wall_clock_and_a_slow_disk_counts_as_data(train_timed, monkeypatch, device):
    """`train_timed` compares the sum with the wall clock."""
    read, durations = Samples.read, []

    def slow(samples, indices):
        begin = time.perf_counter()
        if not samples.is_sequential:  # training data
            time.sleep(SLOW_S)
        tokens_and_targets = read(samples, indices)
        if not samples.is_sequential:
            durations.append(time.perf_counter() - begin)
        return tokens_and_targets

    monkeypatch.setattr(Samples, "read", slow)
    log = train_timed(torch.device(device))  # evaluations after 4 and 8, saves after 3, 6 and 8
    seconds, waited = log.timer.seconds, sum(durations[3:])  # start-up reads for the graph and the first two steps
    beside = ("compute",) if device == "cuda" else ()  # a GPU computes meanwhile
    assert 6 * SLOW_S <= waited <= sum(seconds[phase] for phase in ("data", *beside))
    assert seconds["data"] < waited + seconds["compute"]
    assert all(seconds[phase] > 0 for phase in PHASES if phase != "redone")
    rows = list(read_rows(log.config.run_dir / "metrics.jsonl"))
    reads = [sum(row[f"time_{phase}"] for phase in ("data", *beside)) for row in rows[3:6]]  # the last step reads none
    assert all(seconds >= SLOW_S for seconds in reads)
    assert all(row["time_evaluation"] == 0 for row in rows[:4]) and rows[4]["time_evaluation"] > 0
    assert all(row["time_checkpoint"] == 0 for row in rows[:3]) and rows[3]["time_checkpoint"] > 0
    assert ["time_start" in row for row in rows] == [True] * 3 + [False] * 5
    assert any("of the time was spent waiting for data" in line for line in summary(log.config.run_dir)["advice"])


def test_a_fast_disk_costs_no_data_time(train_timed):
    seconds = train_timed().timer.seconds
    assert seconds["data"] < 0.3 * seconds["compute"]


def test_waiting_for_another_rank_counts_as_communication(train_timed, monkeypatch):
    for name in ("sum_int", "max_int"):
        agree = getattr(World, name)

        def straggle(world, *values, agree=agree):
            time.sleep(0.03)
            return agree(world, *values)

        monkeypatch.setattr(World, name, straggle)
    seconds = train_timed(torch.device("cpu"), eval={"every": None, "tokens": 64}, steps=5).timer.seconds
    assert seconds["communication"] > 4 * 3 * 0.03  # three exchanges per step: targets, memory, events
    assert seconds["data"] < 0.03


class NoComputedNumberIsRead(TorchDispatchMode):
    """Fails if the host reads a computed number, which would wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default or not args[0].is_floating_point()
        return func(*args, **kwargs or {})


def test_a_step_reads_no_computed_number(config, monkeypatch):
    around_steps(monkeypatch, lambda state: NoComputedNumberIsRead() if state.step else nullcontext())
    assert train(config(steps=3)) == 0
    with pytest.raises(AssertionError), NoComputedNumberIsRead():
        torch.ones(()).item()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_synchronizes_with_the_gpu_only_to_decide_on_the_update(config, monkeypatch):
    from training.engine import step

    @contextmanager
    def debug_mode(mode):
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode(mode)
        yield
        torch.cuda.set_sync_debug_mode(before)

    def decide(*arguments, should_update=step.should_update):
        with debug_mode("default"):
            return should_update(*arguments)

    monkeypatch.setattr(step, "should_update", decide)
    # The first step compiles and loads kernels.
    around_steps(monkeypatch, lambda state: debug_mode("error") if state.step else nullcontext())
    assert train(config(steps=3)) == 0


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_reading_a_batch_while_the_gpu_computes_counts_as_compute():
    """The host runs ahead of the GPU: 0.2 s of reading during 0.4 s of computing cost nothing."""
    timer, big = PhaseTimer(DEVICE), torch.randn(8192, 8192, device=DEVICE)
    big @ big
    timer.finish_startup()
    timer.enter("compute")
    torch.cuda._sleep(int(0.4 * torch.cuda.get_device_properties(DEVICE).clock_rate * 1000))
    timer.enter("data")
    time.sleep(0.2)
    timer.enter("optimizer")
    timer.flush()
    assert timer.seconds["compute"] > 0.3 and timer.seconds["data"] < 0.02


def summary(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_the_times_of_a_stopped_and_resumed_run_add_up(config, monkeypatch):
    small = config()

    @contextmanager
    def stop_after_5(state):
        yield
        if state.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    around_steps(monkeypatch, stop_after_5)
    begin = time.time()
    assert train(small) == 128 + signal.SIGTERM
    first = time.time() - begin
    monkeypatch.undo()
    (folder,) = (small.run_dir / "checkpoints").glob("step-00000005")
    kept = json.loads((folder / "state.json").read_text())["ledger"]
    assert 0.5 * first < sum(kept["seconds"].values()) < first
    begin = time.time()
    assert train(small) == 0
    second = (small.run_dir / "summary.json").stat().st_mtime - begin
    content = summary(small.run_dir)
    assert 0.8 * second < sum(content["time"].values()) - sum(kept["seconds"].values()) < second
    assert content["time"]["redone"] == 0 and content["time"]["start"] > kept["seconds"]["start"]
    assert content["goodput"] == pytest.approx(
        sum(content["time"][phase] for phase in PRODUCTIVE) / sum(content["time"].values()), abs=1e-3
    )
    assert len(content["advice"]) >= 3
    from_rows = phase_seconds(list(read_rows(small.run_dir / "metrics.jsonl")))  # without the time after the last row
    assert {phase: from_rows[phase] for phase in (*PRODUCTIVE, "start")} == pytest.approx(
        {phase: content["time"][phase] for phase in (*PRODUCTIVE, "start")}, rel=0.01, abs=1e-4
    )
    fresh = PhaseTimer(torch.device("cpu"))
    fresh.load_state_dict({})
    assert sum(fresh.seconds.values()) == 0


def phase_seconds(rows) -> dict[str, float]:
    return {phase: sum(row.get(f"time_{phase}", 0.0) for row in rows) for phase in PHASES}


def test_the_time_lost_to_several_kills_is_counted_once_each():
    saved = {"seconds": {"compute": 10.0, "evaluation": 2.0}, "since_row": {"evaluation": 2.0}}
    second = PhaseTimer(torch.device("cpu"))
    second.load_state_dict(saved)
    second.add_lost_time(3.0 + 2.0 + 4.0 + 1.0)
    assert second.seconds["redone"] == 8 and second.seconds["compute"] == 10 and second.seconds["evaluation"] == 2
    times = second.row_times(1)
    assert (times["time_redone"], times["time_evaluation"]) == (8, 2)
    third = PhaseTimer(torch.device("cpu"))
    third.load_state_dict(saved)
    third.add_lost_time(sum((times | {"time_compute": 5.0, "time_start": 0.0}).values()))
    assert third.seconds["redone"] == 13


def test_steps_after_kill_9_are_counted_as_redone(processes, options, tmp_path, capsys):
    killed = options(name="killed", steps=90, eval={"every": None, "tokens": 64}, checkpoint={"every": 40})
    path, folder = write_config(tmp_path / "killed.yaml", killed), tmp_path / "runs" / "killed"
    process = processes.start("training.train:main", "--config", str(path))
    deadline = time.monotonic() + 60
    while len(list(read_rows(folder / "metrics.jsonl"))) < 60:
        assert process.poll() is None and time.monotonic() < deadline, process.output("err")
        time.sleep(0.005)
    process.kill()
    rows = list(read_rows(folder / "metrics.jsonl"))
    newest = max((folder / "checkpoints").glob("step-*"))
    from_step, kept = int(newest.name[5:]), json.loads((newest / "state.json").read_text())["ledger"]
    after_save = phase_seconds([row for row in rows if row["step"] > from_step])
    lost = sum(after_save.values()) - sum(kept["since_row"].values())
    assert from_step < rows[-1]["step"] and lost > 0
    assert train(Config.model_validate(killed)) == 0
    content = summary(folder)
    assert content["time"]["redone"] == pytest.approx(lost, rel=0.01)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "time_redone" in row]
    assert {row["step"] for row in rows} <= {from_step + 1, from_step + 2} and rows
    assert f"; goodput {100 * content['goodput']:.0f} %" in capsys.readouterr().out


def test_the_text_has_the_largest_share_first_and_omits_shares_of_0_percent():
    seconds = dict.fromkeys(PHASES, 0.0) | {"start": 5.0, "compute": 92.0, "optimizer": 2.6, "data": 0.4}
    assert as_text(seconds) == "92 % compute, 5 % start, 3 % optimizer; goodput 95 %"
    assert as_text(dict.fromkeys(PHASES, 0.0)) == ""
