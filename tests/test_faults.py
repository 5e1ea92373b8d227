"""Ranks that die, hang, fail or differ: all ranks end in time, one line says why, and the run can be resumed."""

import json
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import write_config
from launched import ForkedRanks, TorchrunRanks, rows_in, train, wait_for_rows

from training.config import ParallelConfig
from training.distributed.diagnosis import LOOP, Activity, ProcessId, Rank, current_process, diagnose
from training.distributed.world import agree_on_start_id, join_world
from training.errors import UserError

LIMIT = 6.0  # parallel.timeout_s; long enough for four processes to start on two busy cores
EXIT_S = 3.0  # seconds in which all ranks end, after the limit or a death
POLL_S = 0.5  # seconds until a test notices the end
RESTART_HINT = "run the same command again to resume from the latest checkpoint"


@pytest.fixture
def small(options, tmp_path):
    """Return a function that writes the config of a small run and returns (its path, the run's folder)."""

    def make(**changes) -> tuple[Path, Path]:
        values = options(
            eval={"every": None, "tokens": 64}, checkpoint={"every": 10}, logging={"every": 1, "tensorboard": False},
            parallel={"timeout_s": LIMIT},
        )  # fmt: skip
        return write_config(tmp_path / "small.yaml", values | changes), tmp_path / "runs/small"

    return make


@pytest.fixture
def fork(processes):
    """Return a function that starts a target on forked ranks; the end of the test kills them."""
    started = []

    def start(*arguments: str, n_ranks: int = 2, target: str = "training.train:main", **variables: str) -> ForkedRanks:
        started.append(ForkedRanks(processes.start(target, *arguments, n_ranks=n_ranks, env=variables)))
        return started[-1]

    yield start
    for each in started:
        each.kill()


FAULTS = [
    ("torchrun", 2, 1, signal.SIGKILL, "died"),
    ("forks", 2, 0, signal.SIGKILL, "died"),
    ("forks", 2, 1, signal.SIGSTOP, "has sent no heartbeat"),
    pytest.param("torchrun", 4, 2, signal.SIGSTOP, "has sent no heartbeat", marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("launcher", "size", "rank", "number", "event"), FAULTS)
def test_all_ranks_end_with_one_line_when_one_is_killed_or_stopped(
    small, fork, tmp_path, launcher, size, rank, number, event
):
    path, folder = small(steps=100_000)
    if launcher == "torchrun":
        ranks = train(tmp_path / "logs", path, size)
    else:
        ranks = fork("--config", str(path), n_ranks=size)
    try:
        wait_for_rows(folder, 15, ranks)
        pid = ranks.pids()[rank]
        ranks.signal(rank, number)
        within = EXIT_S + LIMIT * (number == signal.SIGSTOP) + POLL_S
        if (launcher, number) == ("forks", signal.SIGSTOP):  # without a launcher nobody kills the stopped rank
            ranks.others_end(rank, within)
        else:
            ranks.ends(within)
    finally:
        ranks.kill()
    assert launcher == "forks" or ranks.process.returncode == 1
    assert re.fullmatch(
        rf"error: rank {rank} \(host \S+, pid {pid}\) {event}.* while rank \d \(host \S+, pid \d+\) "
        rf"(waited for it|was) in .*(step|record of step) \d+; {RESTART_HINT}",
        ranks.line(),
    ), ranks.line()


def test_a_run_whose_rank_died_resumes_in_an_existing_process_group(small, fork):
    """The second start is as in Ray Train: the process group exists, and `train` is not in the main thread."""
    path, folder = small(steps=60)
    ranks = fork("--config", str(path))
    wait_for_rows(folder, 15, ranks)
    ranks.signal(1, signal.SIGKILL)
    ranks.ends(EXIT_S + POLL_S)
    ranks = fork(str(path), target="trajectory:main_in_a_borrowed_group")
    assert ranks.launch.wait(60).returncode == 0, ranks.errors()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61)) and (folder / "summary.json").exists()


def test_ranks_stopped_together_continue_together_and_end_without_their_launcher(small, tmp_path):
    path, folder = small(steps=100_000)
    ranks = train(tmp_path / "logs", path)
    try:
        wait_for_rows(folder, 5, ranks)
        pids = ranks.pids()
        for number, seconds in ((signal.SIGSTOP, LIMIT + 1), (signal.SIGCONT, 1.5)):
            for rank in pids:
                ranks.signal(rank, number)
            time.sleep(seconds)
        wait_for_rows(folder, rows_in(folder) + 5, ranks)
        assert ranks.pids() == pids
        ranks.process.kill()
        ranks.ends(within=EXIT_S + POLL_S)
    finally:
        ranks.kill()
    assert "torchrun, which holds the ranks' store at " in ranks.line() and "has ended" in ranks.line()


def test_untimed_work_may_exceed_the_limit_and_an_endless_loop_may_not(small, fork):
    """The record of step 3 takes longer than the limit; step 5 never ends on rank 1."""
    path, folder = small(steps=100_000)
    ranks = fork("--config", str(path), target="trajectory:main_that_hangs", SLOW_RECORD=f"3:{LIMIT + 2}", HANG="1:5")
    wait_for_rows(folder, 4, ranks)
    ranks.ends(within=LIMIT + EXIT_S + POLL_S)
    assert rows_in(folder) == 4
    assert re.search(
        r"rank 1 \(host \S+, pid \d+\) is stuck in .* while rank 0 .* waited \d+ s for it in .* of step 5;",
        ranks.line(),
    )


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ("options", r"the ranks differ: steps: 8 on rank 0, 9 on rank 1; start all of them with the same inputs"),
        ("data", r'the ranks differ: data: "\w+" on rank 0, "\w+" on rank 1; start all of them with the same inputs'),
        ("missing data", r"rank 1 \(host \S+, pid \d+\): texts: no such file or folder"),
    ],
)
def test_ranks_with_different_options_or_data_end_before_the_run_starts(options, fork, tmp_path, difference, message):
    data = {"sources": [{"paths": ["texts"]}], "tokenizer": {"type": "byte"}, "val_fraction": 0.3, "cache_dir": "cache"}
    for rank in (0, 1):
        home = tmp_path / str(rank)
        home.mkdir()
        other = rank == 1 and difference
        changes = options(data=data, parallel={"timeout_s": LIMIT}, steps=9 if other == "options" else 8)
        write_config(home / "run.yaml", changes)
        if other != "missing data":
            (home / "texts").mkdir()
            for i in range(30):
                (home / "texts" / f"{i}.txt").write_text(f"document {i} " * (41 if other == "data" else 40))
    ranks = fork(str(tmp_path), "--config", "run.yaml", target="trajectory:main_in_own_folder")
    assert ranks.launch.wait(40).statuses == [2, 2]
    assert re.fullmatch(f"error: {message}", ranks.line()), ranks.line()
    assert not (tmp_path / "runs/small").exists()


@pytest.mark.parametrize("arguments", ["--parallel.device mps", pytest.param("--steps none", marks=pytest.mark.soak)])
def test_an_error_of_all_ranks_of_a_host_is_printed_once(small, tmp_path, arguments):
    """Local rank 0 prints it, although it finds the error last; the launcher does not kill it earlier."""
    path, _ = small()
    (tmp_path / "late.py").write_text(
        "import os, sys, time\nfrom training.train import main\n"
        "if os.environ['LOCAL_RANK'] == '0':\n    time.sleep(2)\nsys.exit(main())\n"
    )
    where = ["--standalone", "--nproc-per-node", "2", str(tmp_path / "late.py")]
    ranks = TorchrunRanks(tmp_path / "logs", *where, "--config", str(path), *arguments.split())
    try:
        ranks.process.wait(40)
    finally:
        ranks.kill()
    assert arguments.split()[0][2:] in ranks.line()
    assert set(re.findall(r"exitcode +: (-?\d+)", (ranks.logs / "launcher").read_text())) <= {"2", "-15"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is not a number: 'two'; start with torchrun"),
        ({"WORLD_SIZE": "2"}, "RANK is not set; start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK 2 does not fit WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "1", "MASTER_ADDR": "127.0.0.1"},
            r"rank 1 could not connect to 127.0.0.1:1 \(MASTER_ADDR, MASTER_PORT\) within 0.5 s: ",
        ),
    ],
)
def test_missing_launcher_variables_are_named(monkeypatch, variables, message):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as error:
        join_world(torch.device("cpu"), ParallelConfig(timeout_s=0.5))
    assert "\n" not in str(error.value)


def test_each_start_in_one_store_has_its_own_id():
    store = dist.HashStore()
    ids = []
    for size in (3, 3, 2):  # the ranks arrive in both orders
        order = list(range(size)) if len(ids) % 2 else list(reversed(range(size)))
        with ThreadPoolExecutor(size) as ranks:
            futures = []
            for rank in order:
                futures.append(ranks.submit(agree_on_start_id, store, rank, size, 5.0))
                time.sleep(0.1)
            (start_id,) = {future.result() for future in futures}
        ids.append(start_id)
    assert len(set(ids)) == 3
    with pytest.raises(UserError, match=r"rank 1 did not join within 0\.2 s"):
        agree_on_start_id(dist.HashStore(), 0, 2, 0.2)


def test_more_processes_than_gpus_raise_an_error(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="LOCAL_RANK 3 has no GPU: this host has 2; start at most 2"):
        join_world(torch.device("cuda"), ParallelConfig())


def rank(number: int, **activity) -> Rank:
    process = ProcessId("a", "", 100 + number, "")
    return Rank(number, process, {LOOP: Activity(**activity)}, last_heartbeat=8.5)


BEHIND = {"name": "step 5", "n_collectives": 6}
UNTIMED = {"name": "the end", "n_collectives": 6, "kind": "untimed"}


@pytest.mark.parametrize(
    ("activity", "change", "message"),
    [
        (BEHIND, {}, "rank 1 .* is stuck in step 5, while rank 0 .* waited 10 s"),
        (BEHIND, {"has_ended": True}, "rank 1 .* has ended, while rank 0"),
        (
            BEHIND | {"collective": "a sum", "n_collectives": 7}, {},
            "no rank has made progress for 10 s: rank 0 is in a sum of step 5",
        ),
        (BEHIND | {"changed_at": 8.0}, {}, None),
        (UNTIMED, {}, None),
        (UNTIMED, {"has_ended": True}, "rank 1 .* has ended"),
        (UNTIMED, {"missing_since": 8.0}, "rank 1 .* died while rank 0 .* waited for it"),
        (UNTIMED, {"missing_since": 9.5}, None),
        (UNTIMED, {"missing_since": 8.0, "has_ended": True}, "rank 1 .* has ended"),
        (UNTIMED, {"last_heartbeat": 3.0}, "rank 1 .* has sent no heartbeat for 6 s"),
        (BEHIND, {"last_heartbeat": 6.0}, None),
        (UNTIMED, {"last_heartbeat": 4.5}, None),
    ],
)  # fmt: skip
def test_diagnosis_from_heartbeats(activity, change, message):
    me, peer = rank(0, name="step 5", n_collectives=7, collective="a sum"), rank(1, **activity)
    for name, value in change.items():
        setattr(peer, name, value)
    verdict = diagnose(me, [peer], now=10.0, limit=5.0, silence=5.0, read_at=9.0)
    assert (verdict is None) if message is None else re.search(message, verdict.message)


def test_a_process_of_another_host_or_pid_namespace_never_counts_as_dead():
    me = current_process()
    assert not me.is_dead() and me.is_running()
    gone = ProcessId(me.host, me.kernel, 2**22 + 1, "")
    assert gone.is_dead() and not gone.is_running()
    for other in (ProcessId("elsewhere", me.kernel, gone.pid, ""), ProcessId(me.host, "another", gone.pid, "")):
        assert not other.is_dead() and not other.is_running()
    same_pid = ProcessId(me.host, me.kernel, me.pid, "long ago")
    assert same_pid.is_dead()
