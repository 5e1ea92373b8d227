"""A run's bits do not depend on its working directory, environment, file order or logging."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, environment, rows, tensors, write_config

from training.train import train

SURROUNDINGS = {
    "plain": {},
    "elsewhere": {"PYTHONHASHSEED": "1", "LC_ALL": "C", "TZ": "Pacific/Kiritimati", "PYTHONUTF8": "0"},
    "again": {"PYTHONHASHSEED": "4711", "LC_ALL": "tr_TR.UTF-8", "TZ": "America/St_Johns", "COLUMNS": "40"},
}


@pytest.mark.parametrize(
    "names", [["plain", "elsewhere"], pytest.param(list(SURROUNDINGS), marks=pytest.mark.soak)], ids=["2", "3"]
)
def test_processes_in_different_surroundings_end_in_the_same_bits(options, tmp_path, names):
    results = {}
    for i, name in enumerate(names):
        variables = SURROUNDINGS[name]
        texts = tmp_path / f"texts-{i}"
        texts.mkdir()
        order = sorted(
            (ROOT / "training/data").glob("*.py"), key=lambda path, i=i: hash((path.name, i)) if i else path.name
        )
        for path in order:  # the order in which the folder lists its files
            shutil.copy(path, texts)
        changes = options(name=name)
        changes["data"] |= {
            "sources": [{"type": "files", "paths": [str(texts)]}],
            "cache_dir": str(tmp_path / f"c-{i}"),
        }
        changes["logging"] = {"every": 1 + i, "tensorboard": i == 1}
        where, temporary = tmp_path / f"cwd-{i}", tmp_path / f"tmp-{i}"
        where.mkdir()
        temporary.mkdir()
        path = write_config(tmp_path / f"{name}.yaml", changes)
        done = subprocess.run(
            [sys.executable, "-m", "training.train", "--config", str(path)], cwd=where, capture_output=True, text=True,
            env=environment() | {"TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)} | variables,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "runs" / name
        results[name] = (tensors(folder, 8), rows(folder), (folder / "model/model.safetensors").read_bytes())
    assert all(result == results["plain"] for result in results.values())


@pytest.mark.parametrize("deleted", ["cache", "sources"])
def test_a_run_survives_the_deletion_of_its_data(run, config, at_step, tmp_path, deleted):
    """A mapped file stays readable. The next start reports the missing sources, or rebuilds the cache."""
    texts, cache = tmp_path / "texts", tmp_path / "own-cache"
    shutil.copytree(ROOT / "training/data", texts, ignore=shutil.ignore_patterns("__pycache__"))
    data = config().data.model_dump() | {"sources": [{"type": "files", "paths": [str(texts)]}], "cache_dir": str(cache)}
    through = run(name="through", data=data)
    at_step(3, lambda _: shutil.rmtree(cache if deleted == "cache" else texts))
    assert train(config(name="robbed", data=data)) == 0
    robbed = through.with_name("robbed")
    assert rows(robbed) == rows(through)
    assert tensors(robbed, 8) == tensors(through, 8)
    assert cache.exists() == (deleted == "sources")
