"""The recipes of docs/clusters.md: run if one machine is enough, otherwise their files and options are checked."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, write_config
from launched import TRAIN, TorchrunRanks, ranks_of, rows_in, wait_for_rows
from ruamel.yaml import YAML

from training.options import cli

RECIPES = ROOT / "recipes"
PAGE = (ROOT / "docs/clusters.md").read_text()


def read_yaml(name: str) -> list[dict]:
    return list(YAML(typ="safe").load_all((RECIPES / name).read_text()))


def check_command(words: list[str]) -> None:
    """Check that torchrun accepts its options, the training command accepts the rest, and the config exists."""
    from torch.distributed.run import get_args_parser

    assert Path(words[0]).name == "torchrun"
    options = get_args_parser().parse_args(words[1:])
    assert options.module and options.training_script == "training.train"
    config, _ = cli.parse_command_line(options.training_script_args, prog="train", doc="", flags={"--resume": ""})
    assert config.steps


def commands(text: str) -> list[list[str]]:
    """Return the torchrun commands of a shell script, with values for the variables that the launcher sets."""
    text = re.sub(r'"\$\(.*\)"', "10.0.0.1", text.replace("\\\n", " ")).replace("my.yaml", "configs/quickstart.yaml")
    text = text.replace('"$CONFIG"', read_yaml("skypilot.yaml")[0]["envs"]["CONFIG"])
    text = re.sub(r'"\$SKYPILOT_\w+"', "1", text)
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if "torchrun " in line]
    return [words[words.index("exec") + 1 :] if "exec" in words else words for words in lines]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_every_torchrun_command_parses(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = "".join(re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL))
    (sky,) = read_yaml("skypilot.yaml")
    *_, job = read_yaml("kubernetes.yaml")
    trainer = job["spec"]["trainer"]
    torchrun_commands = [*commands(page), *commands(sky["run"]), trainer["command"] + trainer["args"]]
    assert len(torchrun_commands) == 5
    for words in torchrun_commands:
        check_command(words)
    assert subprocess.run(["bash", "-n"], input=sky["run"] + sky["setup"], text=True).returncode == 0


def test_the_kubernetes_job_names_its_runtime_and_volumes():
    runtime, job = read_yaml("kubernetes.yaml")
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": runtime["apiVersion"].split("/")[0],
        "kind": runtime["kind"],
        "name": runtime["metadata"]["name"],
    }
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert all(argument.startswith("/shared/") for argument in job["spec"]["trainer"]["args"] if argument[0] == "/")


def test_the_ray_program_imports_existing_names():
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    compile(program, "clusters.md", "exec")
    for module, name in re.findall(r"from (training\S*) import (\w+)", program):
        exec(f"from {module} import {name}")


SRUN = """#!/bin/bash
# Like srun: one process per task, and every signal goes to all of them.
for n in 0 1; do
    SLURM_PROCID=$n SLURM_LOCALID=$n SLURM_NTASKS=2 "$@" 2> "$LOGS/$SLURM_RESTART_COUNT.$n" &
    tasks+=($!)
done
trap 'kill -TERM "${tasks[@]}"' TERM
highest=0
for task in "${tasks[@]}"; do
    wait "$task"; status=$?
    while kill -0 "$task" 2> /dev/null; do wait "$task"; status=$?; done
    ((status > highest)) && highest=$status
done
exit $highest
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1
[ "$1" = requeue ] && echo "$2" >> "$LOGS/requeued"
exit 0
"""


@pytest.mark.soak
def test_the_slurm_script_saves_before_the_time_limit_and_resumes_when_requeued(options, tmp_path):
    path = write_config(tmp_path / "run.yaml", options(
        name="slurm", steps=300, eval={"every": None, "tokens": 64}, checkpoint={"every": 500},
        logging={"every": 1, "tensorboard": False}, parallel={"timeout_s": 5.0},
    ))  # fmt: skip
    folder, requeued = tmp_path / "runs/slurm", tmp_path / "requeued"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    home = tmp_path / "home"
    home.mkdir()
    (home / ".venv").symlink_to(Path(sys.prefix))
    variables = environment() | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "LOGS": str(tmp_path),
        "TEST_LAUNCH": str(tmp_path), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "here",
    }  # fmt: skip

    ends = [(signal.SIGTERM, 143, ""), (signal.SIGKILL, 137, "rank 0, which holds the ranks' store at "), (None, 0, "")]
    for count, (number, status, message) in enumerate(ends):
        job = subprocess.Popen(
            ["bash", str(RECIPES / "slurm.sh"), str(path)], cwd=home, stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, env=variables | {"SLURM_RESTART_COUNT": str(count)},
        )  # fmt: skip
        try:
            if number is not None:
                wait_for_rows(folder, rows_in(folder) + 20)
                os.kill(job.pid if number == signal.SIGTERM else ranks_of(tmp_path)[0], number)
            assert job.wait(60) == status
        finally:
            for pid in ranks_of(tmp_path).values():
                os.kill(pid, signal.SIGKILL)
            job.wait(5)
        errors = "".join((tmp_path / f"{count}.{n}").read_text() for n in (0, 1))
        assert errors.count("error: ") == bool(message) and message in errors and "Traceback" not in errors, errors
        assert requeued.read_text().count("\n") == min(count + 1, 2)
    assert rows_in(folder) == 300 and (folder / "summary.json").exists()


@pytest.mark.soak
def test_torchrun_restarts_after_a_rank_is_killed(options, tmp_path):
    path = write_config(tmp_path / "run.yaml", options(
        name="again", steps=100, eval={"every": None, "tokens": 64}, checkpoint={"every": 10},
        logging={"every": 1, "tensorboard": False}, parallel={"timeout_s": 5.0},
    ))  # fmt: skip
    folder, where = tmp_path / "runs/again", ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    ranks = TorchrunRanks(tmp_path / "logs", *where, *TRAIN, "--config", str(path))
    try:
        wait_for_rows(folder, 20, ranks)
        ranks.signal(1, signal.SIGKILL)
        assert ranks.process.wait(60) == 0
    finally:
        ranks.kill()
    assert ranks.line().startswith("error: rank 1 (host ")
    assert rows_in(folder) == 100 and (folder / "summary.json").exists()
