"""`checkpoint.copy_to`: whatever happens to the server, the network or the process, no run is lost."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import rows, tensors, write_config
from copied import start_and_wait
from pydantic import ValidationError
from s3 import BUCKET, Proxy

from training.checkpoint import SINGLE, CheckpointWriter, Copier, RemoteRun, TensorShard, list_checkpoints
from training.config import CheckpointConfig, Config
from training.errors import UserError
from training.remote import RemoteFolder
from training.train import train

STEPS = 6
SMALL = {
    "steps": STEPS,
    "batch_tokens": 128,
    "micro_batch": 2,
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32},
    "eval": {"every": 4, "tokens": 128},
    "checkpoint": {"every": 2, "keep": 1},
    "logging": {"every": 1, "tensorboard": False},
}


def copied(url: str, **changes) -> dict:
    """Return the options of a run that is copied to a URL."""
    return SMALL | {"checkpoint": SMALL["checkpoint"] | {"copy_to": url} | changes}


class CopiedRun:
    """A run in forks, on a machine that can be lost."""

    def __init__(self, processes, options, tmp_path: Path, s3: Proxy):
        self.processes, self.options, self.tmp_path, self.s3 = processes, options, tmp_path, s3
        self.pid = 0

    def __call__(self, url: str, target: str = "training.train:main", env=None, **changes):
        """Train to the end, or until it is killed."""
        return self.start(url, target, env, **changes).wait()

    def start(self, url: str, target: str = "training.train:main", env=None, **changes):
        path = write_config(self.tmp_path / "copied.yaml", self.options(**(copied(url) | changes)))
        launch = self.processes.start(target, "--config", str(path), env=self.s3.env | (env or {}))
        self.pid = launch.pids[0]
        return launch

    @property
    def folder(self) -> Path:
        return self.tmp_path / "runs/small"

    def lose_machine(self) -> None:
        """Remove everything that the run has written on this machine."""
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture
def go(processes, options, tmp_path, s3) -> CopiedRun:
    """Train a run that is copied, in a process of its own."""
    return CopiedRun(processes, options, tmp_path, s3)


@pytest.fixture
def through(finished) -> Path:
    """The run without a copy and without interruption."""
    return finished(name="through", **SMALL)


def check_same(folder: Path, through: Path) -> None:
    """Assert that a run has the bits and the rows of the uninterrupted one."""
    assert tensors(folder, STEPS) == tensors(through, STEPS)
    assert rows(folder) == rows(through)
    model = "model/model.safetensors"
    assert (folder / model).read_bytes() == (through / model).read_bytes()


def check_copy(url: str, folder: Path, steps: list[int]) -> None:
    """Assert that a copy has these checkpoints, intact, and the run's other files."""
    remote = RemoteRun(url)
    assert sorted(remote.complete) == sorted(remote.steps) == steps
    assert [remote.corruption(step) for step in steps] == [None] * len(steps)
    names = {name for name in remote.folder.names() if not name.startswith("checkpoints/")}
    assert names == {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "checkpoints" not in path.parts
    }
    for name in names:
        assert remote.folder.read(name) == (folder / name).read_bytes(), name


@pytest.fixture
def waiting(monkeypatch):
    """Saves wait for their copies, so that every run sends the same requests."""
    monkeypatch.setattr(Copier, "start", start_and_wait)


def lines_of(capsys) -> tuple[list[str], list[str]]:
    """Return the lines about the copy on standard output and standard error."""
    output = capsys.readouterr()
    is_told = re.compile(r"(?!  ).*copy_to")  # not in the next commands, which are indented
    return tuple([line for line in text.splitlines() if is_told.match(line)] for text in output)


@pytest.mark.usefixtures("s3", "waiting")
@pytest.mark.parametrize("place", ["s3", "path", "file"])
def test_a_run_is_copied_whole_and_goes_on_from_there(config, through, at_step, tmp_path, capsys, place):
    url = {"s3": f"s3://{BUCKET}/whole", "path": f"{tmp_path}/disk/run", "file": f"file://{tmp_path}/disk/run"}[place]
    small = config(**copied(url))
    at_step.send(3)
    assert train(small) == 128 + signal.SIGTERM
    assert lines_of(capsys) == ([f"checkpoint.copy_to: step 3 is at {url}"], [])
    check_copy(url, small.run_dir, [3])
    shutil.rmtree(small.run_dir)
    at_step.clear()
    assert train(small) == 0
    output = capsys.readouterr().out
    assert f"fetching step 3 from {url}\n" in output
    assert f"checkpoint.copy_to: step 6 is at {url} with the final model\n" in output
    check_same(small.run_dir, through)
    check_copy(url, small.run_dir, [6])
    shutil.rmtree(small.run_dir)
    assert train(small) == 0
    check_same(small.run_dir, through)


MANIFEST_4, MANIFEST_2 = "step-00000004/manifest.json", "step-00000002/manifest.json"
KILLS = [  # each on a machine of its own
    ("PUT .*step-00000002/optimizer", True),  # there is no complete checkpoint yet
    ("GET .*step-00000002/model", False),  # it is not verified yet
    (f"PUT .*{MANIFEST_4}", False),
    (f"PUT .*{MANIFEST_4}", True),
    ("GET .*metrics.jsonl", False),  # in a fetch
    (f"DELETE .*{MANIFEST_2}", True),
    ("PUT .*step-00000006/model", False),
    ("PUT .*summary.json", False),
]


def test_a_run_whose_machines_are_lost_at_requests_loses_nothing(go, through):
    url, newest = f"s3://{BUCKET}/lost", -1
    for pattern, is_done in KILLS:
        go.s3.reset()
        go.s3.kill(lambda: go.pid, pattern, is_done=is_done)
        assert go(url, target="copied:main").returncode == -signal.SIGKILL, pattern
        go.lose_machine()
        go.s3.reset()
        newest = check_intact(url, newest)
    assert newest == 6
    done = go(url, target="copied:main")
    assert done.returncode == 0, done.stderr
    check_same(go.folder, through)
    check_copy(url, go.folder, [6])


def check_intact(url: str, newest: int) -> int:
    """Assert that a copy's complete checkpoints are intact and that the newest is not older; return its step."""
    remote = RemoteRun(url)
    assert [problem for step in remote.complete if (problem := remote.corruption(step))] == []
    assert max(remote.complete, default=-1) >= newest
    return max(remote.complete, default=-1)


@pytest.mark.soak
@pytest.mark.parametrize("is_done", [False, True])
@pytest.mark.parametrize("keeps_disk", [False, True])
def test_a_run_killed_at_every_request(go, through, is_done, keeps_disk):
    done = go(f"s3://{BUCKET}/every-{is_done}-{keeps_disk}", target="copied:main")
    n_requests, n_kills = len(go.s3.requests), 0
    assert done.returncode == 0 and n_requests > 70
    for number in range(1, n_requests + 1):
        url = f"s3://{BUCKET}/every-{is_done}-{keeps_disk}-{number}"
        go.lose_machine()
        go.s3.reset()
        go.s3.kill(lambda: go.pid, number, is_done=is_done)
        assert go(url, target="copied:main").returncode == -signal.SIGKILL, number
        go.s3.reset()
        check_intact(url, -1)
        if not keeps_disk:
            go.lose_machine()
        assert go(url, target="copied:main").returncode == 0, number
        check_same(go.folder, through)
        check_copy(url, go.folder, [6])
        n_kills += 1
    print(f"{n_kills} of {n_requests} kills: the same bits")


@pytest.mark.soak
def test_a_start_on_a_fresh_machine_killed_at_every_request(go, through):
    url, n_requests, number = f"s3://{BUCKET}/fetch", 0, 0
    go.s3.kill(lambda: go.pid, "PUT .*step-00000006/model", is_done=False)
    assert go(url, target="copied:main").returncode == -signal.SIGKILL
    while True:
        number += 1
        go.lose_machine()
        go.s3.reset()
        go.s3.kill(lambda: go.pid, number, is_done=bool(number % 2))
        go(url, target="copied:main")
        if any("PUT" in request and "write-test" not in request for request in go.s3.requests):
            break  # past the fetch
        go.s3.reset()
        n_requests += 1
    done = go(url, target="copied:main")
    assert done.returncode == 0, done.stderr
    check_same(go.folder, through)
    print(f"{n_requests} kills")
    assert n_requests > 15


@pytest.mark.usefixtures("waiting")
@pytest.mark.parametrize("fault", ["500", "drop", "lose"])
def test_a_failed_copy_is_one_line_and_the_next_one_is_tried(config, through, s3, capsys, fault):
    url = f"s3://{BUCKET}/failed-{fault}"
    small = config(**copied(url))
    s3.fault = lambda _number, request: fault if re.search("PUT .*step-00000002", request) else ""
    assert train(small) == 0
    printed, noted = lines_of(capsys)
    (line,) = noted
    assert line.startswith(f"checkpoint.copy_to: {url}/checkpoints/step-00000002/")
    assert line.endswith("try again later; training goes on, and the next checkpoint tries again")
    assert printed == [
        f"checkpoint.copy_to: works again; step 4 is at {url}",
        f"checkpoint.copy_to: step 6 is at {url} with the final model",
    ]
    check_same(small.run_dir, through)
    s3.reset()
    check_copy(url, small.run_dir, [6])


@pytest.mark.parametrize("fault", ["500", "drop"])
def test_a_server_that_is_lost_for_good_is_one_line_at_the_end_and_the_same_command_copies(
    config, through, s3, capsys, fault
):
    url = f"s3://{BUCKET}/gone-{fault}"
    small = config(**copied(url))
    s3.fault = lambda _number, request: fault if "step-0" in request or "model" in request else ""
    assert train(small) == 0
    printed, noted = lines_of(capsys)
    assert not any("is at" in line for line in printed)
    assert len(noted) <= 2 and noted[-1].startswith("checkpoint.copy_to: step 6: not there: s3://")
    assert noted[-1].endswith("; the same command copies it")
    check_same(small.run_dir, through)
    s3.reset()
    assert train(small) == 0
    assert lines_of(capsys)[0] == [f"checkpoint.copy_to: step 6 is at {url} with the final model"]
    check_copy(url, small.run_dir, [6])


def test_a_slow_server_does_not_delay_steps(config, through, s3, at_step, capsys):
    url = f"s3://{BUCKET}/slow"
    small, times = config(**copied(url)), []
    s3.fault = lambda _number, request: 0.1 if "write-test" not in request else ""
    for step in range(1, STEPS + 1):
        at_step(step, lambda _: times.append(len(s3.requests)))
    assert train(small) == 0
    check_same(small.run_dir, through)
    remote = RemoteRun(url)
    assert times[-1] < 30 < len(s3.requests), "the training is over before the copy"
    assert max(remote.complete) == 6 and remote.corruption(6) is None
    assert lines_of(capsys)[1] == []


def test_a_stopped_run_does_not_wait_for_its_copy_for_long(config, s3, at_step, capsys, monkeypatch):
    monkeypatch.setattr("training.engine.state.STOP_S", 0.5)
    url = f"s3://{BUCKET}/stopped"
    at_step.send(3)
    s3.fault = lambda _number, request: 1.5 if "PUT" in request and "write-test" not in request else ""
    assert train(config(**copied(url))) == 128 + signal.SIGTERM
    (line,) = lines_of(capsys)[1]
    assert line == "checkpoint.copy_to: step 3: not there: not finished after 0.5 s; the same command copies it"


def test_the_checkpoint_that_is_copied_is_not_pruned(tmp_path):
    folder = tmp_path / "checkpoints"
    writer = CheckpointWriter(folder, SINGLE, CheckpointConfig(keep=1))

    def save(step):
        shards = {"x": TensorShard(torch.zeros(2), 0, torch.Size([2]), is_owner=True)}
        writer.save({"model": shards, "optimizer": shards}, {"step": step}, best_step=4)
        writer.wait()

    def steps():
        return [step for step, _ in list_checkpoints(folder)]

    save(2)
    with writer.pinned(2) as path:
        save(4)
        save(6)
        assert path == folder / "step-00000002" and steps() == [2, 4, 6]
    assert steps() == [4, 6]
    with writer.pinned(2) as path:
        assert path is None
    again = CheckpointWriter(folder, SINGLE, CheckpointConfig(keep=1))
    with again.pinned(6):
        pass
    assert steps() == [4, 6], "a process that has saved nothing does not know the best step"


@pytest.mark.usefixtures("waiting")
def test_the_best_checkpoint_and_every_nth_are_kept_there_and_the_best_is_fetched(config, run, tmp_path):
    url = f"{tmp_path}/disk/kept"
    options = {"every": 2, "keep": 1, "keep_every": 3, "final": "best"}
    worse = {"optim": {"learning_rate": 1.0}, "schedule": {"type": "constant", "warmup_steps": 2}}
    changes = {"steps": 8, "eval": {"every": 2, "tokens": 128}} | worse
    through = run(name="through", **SMALL | changes | {"checkpoint": options})
    small = config(**SMALL | changes | {"checkpoint": options | {"copy_to": url}})
    assert train(small) == 0
    assert json.loads((small.run_dir / "summary.json").read_text())["best_step"] == 2
    assert RemoteRun(url).complete == {2, 3, 6, 8}
    shutil.rmtree(small.run_dir)
    assert train(small) == 0
    assert sorted(step for step, _ in list_checkpoints(small.run_dir / "checkpoints")) == [2, 8]
    model = "model/model.safetensors"
    assert (small.run_dir / model).read_bytes() == (through / model).read_bytes()


@pytest.fixture
def copy_of_two(config, at_step, waiting, tmp_path):  # noqa: ARG001 (only used)
    """Return the configuration of a run that was stopped at step 5, with steps 4 and 5 in its copy and folder."""
    small = config(**SMALL | {"checkpoint": {"every": 2, "keep": 2, "copy_to": str(tmp_path / "disk/run")}})
    at_step.send(5)
    assert train(small) == 128 + signal.SIGTERM
    at_step.clear()
    return small


def damage(small: Config, step: int) -> None:
    """Flip a bit of a checkpoint's weights in the copy."""
    path = Path(small.checkpoint.copy_to, f"checkpoints/step-{step:08d}/model.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_copy_falls_back_to_the_one_before(copy_of_two, through, capsys):
    damage(copy_of_two, 5)
    shutil.rmtree(copy_of_two.run_dir)
    assert train(copy_of_two) == 0
    output = capsys.readouterr().out
    assert "step-00000005/model.safetensors: damaged" in output and "falling back to the checkpoint before it" in output
    check_same(copy_of_two.run_dir, through)
    remote = RemoteRun(copy_of_two.checkpoint.copy_to)
    assert any("damaged-0-step-00000005/manifest.json" in name for name in remote.folder.names())


def test_a_copy_with_only_damaged_checkpoints_is_an_error(copy_of_two):
    damage(copy_of_two, 4)
    damage(copy_of_two, 5)
    shutil.rmtree(copy_of_two.run_dir)
    with pytest.raises(UserError, match=r"every checkpoint is damaged; choose another --checkpoint.copy_to"):
        train(copy_of_two)


def test_a_damaged_checkpoint_on_the_disk_is_fetched_again(copy_of_two, through, capsys):
    path = copy_of_two.run_dir / "checkpoints/step-00000005/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert train(copy_of_two) == 0
    assert "fetching step 5 from" in capsys.readouterr().out
    check_same(copy_of_two.run_dir, through)
    assert (copy_of_two.run_dir / "checkpoints/damaged-0-step-00000005").is_dir()


def test_going_back_to_an_own_checkpoint_sets_later_ones_aside_there(copy_of_two, through):
    path = copy_of_two.run_dir / "checkpoints/step-00000004"
    assert train(copy_of_two, resume=str(path)) == 0
    check_same(copy_of_two.run_dir, through)
    remote = RemoteRun(copy_of_two.checkpoint.copy_to)
    assert "checkpoints/undone-0-step-00000005/model.safetensors" in remote.folder.names("checkpoints")


def test_the_copy_of_another_run_is_never_overwritten(copy_of_two, config):
    url = copy_of_two.checkpoint.copy_to
    before = {path: path.read_bytes() for path in Path(url).rglob("*") if path.is_file()}
    for name, changes, resume, line in (
        ("small", {}, "never", f"{url} holds checkpoints of a run, up to step 5, which --resume never would overwrite"),
        ("small", {"seed": 1}, "auto", f"{url} holds a run with other options: seed: 0 -> 1; choose another --check"),
        ("other", {}, "auto", f"{url} holds the run small; name a --checkpoint.copy_to of its own, or go on with"),
    ):
        other = config(name=name, **SMALL | changes | {"checkpoint": {"every": 1, "copy_to": url}})
        with pytest.raises(UserError, match=f"^checkpoint.copy_to: {line}"):
            train(other, resume=resume)
    assert not (copy_of_two.run_dir.parent / "other").exists()
    assert {path: path.read_bytes() for path in Path(url).rglob("*") if path.is_file()} == before


def test_a_longer_run_elsewhere_goes_on_from_the_newest_of_both(copy_of_two, through):
    """A machine with an old disk fetches the newer checkpoint, with its rows."""
    for path in sorted((copy_of_two.run_dir / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(path)
    lines = (copy_of_two.run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy_of_two.run_dir / "metrics.jsonl").write_text("".join(lines[:4]))
    assert train(copy_of_two) == 0
    check_same(copy_of_two.run_dir, through)


def test_a_run_in_its_decay_gets_more_steps_on_a_fresh_machine(config, waiting, tmp_path):  # noqa: ARG001
    url = str(tmp_path / "disk/run")
    options = SMALL | {"schedule": {"type": "wsd", "warmup_steps": 1, "decay_steps": 2}}
    through = config(name="through", **options | {"steps": 10})
    assert train(through) == 0
    short = config(**options | {"checkpoint": {"every": 2, "keep": 9, "copy_to": url}})
    assert train(short) == 0
    shutil.rmtree(short.run_dir)
    assert train(short.model_copy(update={"steps": 10})) == 0
    assert tensors(short.run_dir, 10) == tensors(through.run_dir, 10)
    assert rows(short.run_dir) == rows(through.run_dir)
    check_copy(url, short.run_dir, [2, 4, 6, 8, 10])
    assert "checkpoints/undone-0-step-00000006/manifest.json" in RemoteRun(url).folder.names()


def test_a_branch_has_a_copy_of_its_own_from_which_it_goes_on_without_its_parent(copy_of_two, config, at_step):
    url = f"{copy_of_two.checkpoint.copy_to}-branch"
    options = SMALL | {"optim": {"learning_rate": 1e-3}, "steps": 10}
    through = config(name="through-branch", **options)
    assert train(through, branch=str(copy_of_two.run_dir)) == 0
    branch = config(name="branch", **options | {"checkpoint": {"every": 2, "copy_to": url}})
    at_step.die(8)
    with pytest.raises(KeyboardInterrupt):
        train(branch, branch=str(copy_of_two.run_dir))
    at_step.clear()
    shutil.rmtree(branch.run_dir)
    shutil.rmtree(copy_of_two.run_dir)
    assert train(branch, branch=str(copy_of_two.run_dir)) == 0
    assert tensors(branch.run_dir, 10) == tensors(through.run_dir, 10)
    assert rows(branch.run_dir) == rows(through.run_dir)
    lineage = json.loads((branch.run_dir / "summary.json").read_text())["lineage"]
    assert [parent["step"] for parent in lineage] == [5]


def test_a_copy_that_cannot_work_is_found_before_anything_else(go, tmp_path):
    for url, env, status, line in (
        (f"s3://no-{BUCKET}/run", {}, 2, "no such bucket"),
        (f"s3://{BUCKET}/run", {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, 2, "set AWS_ACCESS_KEY_ID"),
        (f"gs://{BUCKET}/run", {}, 2, "pip install 'training[remote]'"),
        (f"s3://{BUCKET}/run", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, 1, "not reachable now"),
    ):
        done = go(url, env=env)
        assert done.returncode == status
        (error,) = done.stderr.splitlines()
        assert error.startswith(f"error: checkpoint.copy_to: {url}") and line in error
    assert not (tmp_path / "runs/small").exists()


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("hf://user/run", "'hf://user/run' is no URL of s3://, gs://, az://, abfs://, file://, and no path"),
        ("s3://", "'s3://' names no bucket or folder"),
        ("s3:/bucket/run", "'s3:/bucket/run' is a path; did you mean s3://bucket/run?"),
        ("gs//bucket/run", "'gs//bucket/run' is a path; did you mean gs://bucket/run?"),
        ("s3:bucket/run", "'s3:bucket/run' is a path; did you mean s3://bucket/run?"),
        ("S3://bucket/run", "'S3://bucket/run': write its scheme in small letters, s3://"),
        ("{runs}/small", "is in the folder of this run"),
        ("{runs}/small/checkpoints", "is in the folder of this run"),
        ("{runs}", "is out_dir"),
    ],
)
def test_options_that_cannot_be_meant_are_errors(config, tmp_path, url, line):
    with pytest.raises(ValidationError, match=line):
        config(**copied(url.format(runs=tmp_path / "runs")))


@pytest.mark.usefixtures("s3")
def test_manifests_that_name_files_elsewhere_do_not_count(s3_server):
    for name in ("../state.json", "/etc/state.json"):
        manifest = {name: {"bytes": 1, "sha256": ""}, "state.json": {"bytes": 1, "sha256": ""}}
        s3_server.request(
            "PUT", f"/{BUCKET}/forged/checkpoints/step-00000001/manifest.json", json.dumps(manifest).encode()
        )
        assert RemoteRun(f"s3://{BUCKET}/forged").complete == set()


def test_two_ranks_copy_all_files_and_go_on(processes, options, tmp_path, s3):
    url = f"s3://{BUCKET}/ranks"
    checkpoint = {"every": 2, "keep": 1, "one_file_gib": 0}
    hashes, sharded = [], {"parallel": {"mesh": {"shard": 2}}}
    for name, changes in (("through", {}), ("small", {"copy_to": url})):
        small = options(**SMALL | {"name": name, "checkpoint": checkpoint | changes, "micro_batch": 1} | sharded)
        arguments = ["--config", str(write_config(tmp_path / f"{name}.yaml", small))]
        if changes:
            s3.kill(lambda: launch.pids[0], "PUT .*step-00000006/manifest", is_done=False)  # noqa: B023 (at once)
            launch = processes.start("copied:main", *arguments, n_ranks=2, env=s3.env)
            assert launch.wait().statuses[0] == -signal.SIGKILL
            shutil.rmtree(tmp_path / "runs/small")
            s3.reset()
        done = processes.run("training.train:main", *arguments, n_ranks=2, env=s3.env)
        assert done.statuses == [0, 0], done.stderr
        hashes.append(tensors(tmp_path / "runs" / name, 6))
    assert "fetching step 4" in done.stdout and len(hashes[0]) == 4 and hashes[0] == hashes[1]
    assert RemoteRun(url).complete == {6}


def test_what_arrives_damaged_is_not_kept_and_costs_a_line(config, tmp_path, capsys, monkeypatch, waiting):  # noqa: ARG001
    url, put = str(tmp_path / "disk/run"), RemoteFolder.put

    def put_damaged(folder, source, name):
        if "step-00000002/model" in name:
            folder.write(name, source.read_bytes()[:-1] + b"!")
        else:
            put(folder, source, name)

    monkeypatch.setattr(RemoteFolder, "put", put_damaged)
    assert train(config(**copied(url))) == 0
    (line,) = lines_of(capsys)[1]
    assert f"{url}/checkpoints/step-00000002/model.safetensors: damaged" in line
    assert RemoteRun(url).steps == {6}


def test_a_copy_is_listed_and_verified(copy_of_two, call):
    url = f"file://{copy_of_two.checkpoint.copy_to}"
    (Path(copy_of_two.checkpoint.copy_to) / "checkpoints/step-00000004/manifest.json").unlink()
    listed = call("checkpoints", "list", url)
    assert listed.returncode == 0 and "incomplete, and not used" in listed.stdout
    assert f"MiB  {url}/checkpoints/step-00000005" in listed.stdout
    assert call("checkpoints", "verify", url).stdout.endswith("MiB  intact\n")
    damage(copy_of_two, 5)
    verified = call("checkpoints", "verify", url)
    assert verified.returncode == 1 and "step-00000005/model.safetensors: damaged" in verified.stdout
    for action, wrong in (("prune", url), ("list", f"{url}/nothing")):
        refused = call("checkpoints", action, wrong)
        assert refused.returncode == 2 and refused.stderr.startswith(f"error: {wrong}: ")
