"""What the tests of whole runs share: a small run on real text, and the command as a real process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from training.checkpoint import SINGLE, Checkpoint, CheckpointWriter, TensorShard
from training.config import CheckpointConfig, Config
from training.logging.phases import PHASES
from training.options import cli
from training.options.schema import is_list, sections
from training.train import train

ROOT = Path(__file__).parent.parent
MOE = {"type": "moe", "n_experts": 4, "hidden": 32}
TIME_FIELDS = {"tokens_per_s", "mfu", "memory_gib", "step_s", "time_s", *(f"time_{phase}" for phase in PHASES)}

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell's background job; what tests start would ignore it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """One cache of token shards for all runs."""
    return tmp_path_factory.mktemp("data_cache")


@pytest.fixture
def options(tmp_path, cache):
    """Options of a small run on three packages of the standard library; keywords replace whole options."""

    def make(**changes) -> dict:
        stdlib = Path(sysconfig.get_path("stdlib"))
        options = {
            "name": "small",
            "out_dir": str(tmp_path / "runs"),
            "steps": 8,
            "batch_tokens": 256,
            "micro_batch": 4,
            "precision": "fp32",
            "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "blocks": [{"ffn": MOE}, {}]},
            "data": {
                "sources": [{"type": "files", "paths": [str(stdlib / name) for name in ("json", "email", "logging")]}],
                "tokenizer": {"type": "byte"},
                "val_fraction": 0.2,
                "cache_dir": str(cache),
            },
            "schedule": {"warmup_steps": 2},
            "eval": {"every": 4, "tokens": 512, "prompts": ["def "], "sample_tokens": 4},
            "checkpoint": {"every": 3},
            "logging": {"every": 2, "tensorboard": False},
        }
        return options | changes

    return make


@pytest.fixture
def config(options):
    """The small run's configuration."""
    return lambda **changes: Config.model_validate(options(**changes))


@pytest.fixture
def begun(config):
    """Small runs that have begun, or go on, in this process; closed at the end of the test."""
    from training.data import prepare
    from training.distributed.world import World
    from training.engine.build import begin

    runs = []

    def make(**changes):
        made = config(**changes)
        runs.append(begin(made, prepare(made.data, quiet=True), World(0, 1, torch.device("cpu")), "auto"))
        return runs[-1]

    yield make
    for run in runs:
        run.close()


@pytest.fixture
def run(config):
    """Train the small run with some options changed; returns its folder."""

    def go(resume="auto", **changes) -> Path:
        made = config(**changes)
        assert train(made, resume=resume) == 0
        return made.run_dir

    return go


def command(*arguments: str, env: dict[str, str] | None = None, **kwargs) -> subprocess.CompletedProcess:
    """Run `python ...` from the repository's root, with one thread and these variables besides."""
    made = environment() | (env or {})
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=made, capture_output=True, text=True, timeout=240, **kwargs
    )


def environment() -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}  # set by `main` here
    return ours | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


def write_config(path: Path, options: dict) -> Path:
    """A YAML file of the options."""
    path.write_text(cli.dump_config(Config.model_validate(options)))
    return path


def rows(run: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock and the machine."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIME_FIELDS} for line in lines]


def tensors(run: Path, step: int) -> dict[str, str]:
    """The SHA-256 of a checkpoint's tensor files."""
    manifest = json.loads((run / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest.items() if name.endswith(".safetensors")}


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Save it as one process does, and wait; nothing that is there goes."""
    saver = CheckpointWriter(folder, SINGLE, CheckpointConfig(keep=1000))
    parts = {
        kind: {
            name: TensorShard(tensor, 0, tensor.shape, is_owner=True)
            for name, tensor in getattr(checkpoint, kind).items()
        }
        for kind in ("model", "optimizer")
    }
    saver.save(parts, checkpoint.state, None)
    saver.wait()
    return folder / f"step-{checkpoint.state['step']:08d}"


def goes_on_with(kernel: str, run, folder: Path, capsys) -> None:
    """The fixture `run`'s eight steps, gone back to the sixth, end in the same bits and name this kernel."""
    before = tensors(folder, 8)
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    run()
    said = capsys.readouterr().out
    assert "goes on     after step 6" in said and f"{kernel} (ran, and equals the reference)" in said
    assert tensors(folder, 8) == before


def minimal_value(annotation: Any) -> Any:
    """Return a valid value of an option: of a section, its required options only."""
    if is_list(annotation):
        return [minimal_value(get_args(annotation)[0])]
    if inside := sections(annotation):
        fields = inside[0].model_fields.items()
        return {name: minimal_value(field.annotation) for name, field in fields if field.is_required()}
    return "x" if annotation is str else 1
