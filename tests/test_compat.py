"""Files of commit 68a78e2 still open: a configuration, a token cache, a run's checkpoint, an export.

`tests/fixtures/68a78e2/make.py` wrote them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from training.config import Config
from training.model import GPT
from training.options import cli
from training.train import main
from training.weights.init_from import load_pretrained, resolve_init_from

FIXTURE = Path(__file__).parent / "fixtures" / "68a78e2"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text())


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """Copy the files and make the copy the working directory."""
    folder = shutil.copytree(FIXTURE, tmp_path / "old")
    monkeypatch.chdir(folder)
    return folder


def cache_files(folder: Path) -> dict[str, int]:
    """Return the files of the token shards and the time of their last change."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns
        for path in (folder / "cache").rglob("*")
        if path.is_file() and path.name != "digests.json" and path.suffix != ".lock"
    }


def test_an_old_configuration_loads(old):
    options, resolved = cli.load_config(old / "config.yaml"), cli.load_config(old / "runs/old/config.yaml")
    assert (resolved.steps, resolved.model.vocab_size) == (options.steps, 320)
    assert resolved.model.layers()[0].ffn == options.resolved().model.layers()[0].ffn


def test_an_old_run_resumes_on_its_cache(old, capsys):
    before = cache_files(old)
    assert main(["--config", "config.yaml"]) == 0
    assert cache_files(old) == before
    output = capsys.readouterr().out
    assert "resuming from step 3" in " ".join(output.split())
    rows = [json.loads(line) for line in (old / "runs/old/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(rows, EXPECTED["rows"], strict=True):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-3), key  # in fp16 another processor rounds by 5e-4


@pytest.mark.usefixtures("old")
def test_an_old_checkpoint_is_evaluated(call):
    done = call("evaluate", "--run", "runs/old")
    assert done.returncode == 0, done.stderr
    val_loss = EXPECTED["rows"][2]["val_loss"]
    assert float(done.stdout.split("loss ")[1].split(",")[0]) == pytest.approx(val_loss, rel=1e-3)


def test_an_old_export_opens(old):
    data = {"sources": [{"paths": ["text.jsonl"]}], "val_fraction": 0.2}
    model_config, weights = load_pretrained(resolve_init_from(Config.model_validate({
        "name": "from-export", "init_from": str(old / "export"), "model": {}, "data": data,
    })))  # fmt: skip
    model = GPT(model_config)
    model.load_state_dict(model.state_dict() | weights)
    with torch.no_grad():
        logits = model.logits(torch.tensor(EXPECTED["tokens"]))[:, -1, :8]
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["logits"]), rtol=1e-4, atol=1e-5)
