"""`training.runs`: the runs of a folder, their states, and the caches that none of them needs."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import write_config

from training.files import run_lock
from training.runs.listing import find_runs
from training.train import train


@pytest.fixture
def list_runs(call):
    return lambda *arguments: call("runs.__main__", *map(str, arguments))


def as_json(done) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_runs_are_listed_with_their_state_and_figures(list_runs, finished, at_step, config, tmp_path):
    folder = finished()
    at_step.send(5)
    assert train(config(name="cut")) == 128 + 15
    at_step.clear()
    shutil.copytree(tmp_path / "runs/cut", tmp_path / "runs/group/inner")
    (tmp_path / "runs/no-run").mkdir()
    summary = json.loads((folder / "summary.json").read_text())

    with run_lock(tmp_path / "runs/cut"):
        entries = {entry["name"]: entry for entry in as_json(list_runs(tmp_path / "runs", "--json"))}
    assert {name: entry["state"] for name, entry in entries.items()} == {
        "small": "finished", "cut": "running", "group/inner": "stopped"
    }  # fmt: skip
    small, cut = entries["small"], entries["cut"]
    assert (small["step"], small["steps"], cut["step"]) == (8, 8, 5)
    assert small["val_loss"] == pytest.approx(summary["val_loss"])
    assert small["best_val_loss"] == summary["best_val_loss"] and small["tokens_per_s"] == summary["tokens_per_s"]
    assert small["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert Path(cut["folder"]) == tmp_path / "runs/cut"

    table = list_runs(tmp_path / "runs", "--sort", "name").stdout.splitlines()
    assert [line.split()[0] for line in table] == ["run", "cut", "group/inner", "small", "3"]
    for flags, names in (
        (("--state", "stopped"), ["cut", "group/inner"]),
        (("--name", "inn"), ["group/inner"]),
        (("--name", "s*"), ["small"]),
        (("--sort", "loss", "--state", "finished"), ["small"]),
    ):
        assert sorted(entry["name"] for entry in as_json(list_runs(tmp_path / "runs", *flags, "--json"))) == names
    orders = {"age": ("age_s", -1), "steps": ("step", 1), "best": ("best_val_loss", 1), "size": ("bytes", -1)}
    for key, (field, sign) in orders.items():
        values = [sign * entry[field] for entry in as_json(list_runs(tmp_path / "runs", "--sort", key, "--json"))]
        assert values == sorted(values) and len(set(values)) > 1, key


def test_a_folder_without_runs_and_a_missing_one(list_runs, tmp_path):
    (tmp_path / "empty").mkdir()
    assert list(find_runs(tmp_path / "empty")) == []
    assert "no such run" in list_runs(tmp_path / "empty").stderr
    done = list_runs(tmp_path / "none")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "name the out_dir" in done.stderr


def test_damaged_files_of_a_run_do_not_stop_the_list(list_runs, finished):
    folder = finished()
    for name in ("summary.json", "run.json", "config.yaml"):
        (folder / name).write_text("{")
    (entry,) = as_json(list_runs(folder.parent, "--json"))
    (folder / "summary.json").write_text('{"steps": 8, "best_val_loss": "y", "tokens_per_s": [1]}')
    for key in ("best", "speed", "name"):
        assert list_runs(folder.parent, "--sort", key).returncode == 0
    assert list_runs(folder.parent, "--remove_caches_unused_for", -1).returncode == 2
    assert entry["step"] == 8 and entry["state"] == "stopped" and entry["steps"] is None


def test_only_caches_that_no_run_was_trained_on_are_removed(list_runs, call, options, run, tmp_path, monkeypatch):
    data = options()["data"] | {"cache_dir": str(tmp_path / "cache")}
    folder = run(data=data)
    other = options(data=data | {"val_fraction": 0.3})
    assert call("prepare", "--config", str(write_config(tmp_path / "other.yaml", other))).returncode == 0
    monkeypatch.chdir(tmp_path)
    listed = as_json(list_runs(folder.parent, "--caches", "--json"))
    used, unused = sorted(listed, key=lambda cache: not cache["runs"])
    assert used["runs"] == ["small"] and unused["runs"] == []

    assert as_json(list_runs(folder.parent, "--remove_caches_unused_for", 30, "--json")) == []
    long_ago = time.time() - 40 * 86400
    for cache in listed:
        os.utime(cache["folder"], (long_ago, long_ago))
    removed = as_json(list_runs(folder.parent, "--remove_caches_unused_for", 30, "--json"))
    assert [cache["folder"] for cache in removed] == [unused["folder"]]
    assert not Path(unused["folder"]).exists() and Path(used["folder"]).exists()
    (left,) = as_json(list_runs(folder.parent, "--caches", "--json"))
    assert left["folder"] == used["folder"] and left["unused_s"] > 39 * 86400
    assert run(data=data) == folder  # it still resumes, which counts as a use
    assert as_json(list_runs(folder.parent, "--caches", "--json"))[0]["unused_s"] < 3600
