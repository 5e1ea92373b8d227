"""Fixtures for tests of whole runs: a small run on real text, interruptions, and commands as processes or calls."""

import importlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import pytest
import torch
import warm
from s3 import FAST, Proxy, S3Server
from torch.utils.hooks import RemovableHandle

from training.checkpoint import SINGLE, Checkpoint, CheckpointWriter, TensorShard
from training.config import CheckpointConfig, Config
from training.logging.phases import PHASES
from training.options import cli
from training.options.schema import is_list, sections
from training.section import PathText
from training.train import train

if TYPE_CHECKING:
    from training.distributed.world import World

ROOT = Path(__file__).parent.parent
RECIPES = [ROOT / "recipes" / f"{name}.yaml" for name in ("plain", "speedrun", "gpt2_124m", "gpt2_moe")]
# Every shipped configuration of a run, by folder and name.
SHIPPED = {f"{path.parent.name}/{path.stem}": path for path in [*sorted((ROOT / "configs").glob("*.yaml")), *RECIPES]}
MOE = {"type": "moe", "n_experts": 4, "hidden": 32}
TIME_FIELDS = {"tokens_per_s", "mfu", "memory_gib", "step_s", "time_s", *(f"time_{phase}" for phase in PHASES)}

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a shell ignores SIGINT, as do its children
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    """One cache of token shards for all runs."""
    return tmp_path_factory.mktemp("data_cache")


@pytest.fixture
def options(tmp_path, cache):
    """Options of a small run on three packages of the standard library, a source each; keywords replace options."""

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
                "sources": [{"paths": [str(stdlib / name / "**/*.py")]} for name in ("json", "email", "logging")],
                "tokenizer": {"type": "byte"},
                "val_fraction": 0.2,
                "cache_dir": str(cache),
            },
            "schedule": {"warmup_steps": 2},
            "eval": {"every": 4, "tokens": 512, "prompts": ["def "], "sample_tokens": 4},
            "checkpoint": {"every": 3},
            "logging": {"every": 2, "tensorboard": False, "histogram_every": 4},
        }
        return options | changes

    return make


@pytest.fixture
def config(options):
    """The small run's configuration."""
    return lambda **changes: Config.model_validate(options(**changes))


class BuiltRun:
    """A run in this process, trained step by step. Tests reach the engine only through it and `AtStep`.

    `model` is the GPT, `sharded` the ShardedModel around it.
    """

    def __init__(self, config: Config, world: "World | None" = None, resume: str = "auto"):
        from training import engine
        from training.data import prepare
        from training.distributed.world import World

        self.dataset = prepare(config.data, quiet=True)
        self.world = world or World(0, 1, torch.device("cpu"))
        self.setup = engine.build(config, self.dataset, self.world, resume)
        self.config, self.state, self.optimizer = self.setup.config, self.setup.state, self.setup.optimizer
        self.micro_batch = self.setup.micro_batch
        self.sharded, self.model = self.setup.model, self.setup.model.model
        self.log = engine.open_log(self.setup, self.dataset, time.perf_counter())
        if self.config.parallel.compile:
            self.sharded.compile()
        self.checkpoints = engine.Checkpoints(self.config, self.sharded, self.optimizer, self.log)
        self.phase = engine.Phases(self.log.timer, self.world)

    def train_step(self) -> None:
        """Train one step and keep its metrics."""
        from training import engine

        metrics = engine.train_step(self.setup, self.phase)
        self.log.add(self.state.step, *metrics, self.state.guard.n_skipped)

    def rows(self) -> list[dict]:
        """Return the rows of the steps since the last call."""
        self.log.fetch()
        rows, self.log.rows = self.log.rows, []
        return rows

    def evaluate(self) -> dict[str, Any]:
        """Return the validation figures."""
        from training import engine

        return engine.evaluate(self.setup, self.dataset.tokenizer)

    def sample(self) -> dict:
        """Return the continuations of the prompts."""
        from training import engine

        return engine.sample_texts(self.setup, self.dataset.tokenizer)

    def save(self) -> None:
        """Save a checkpoint and wait for it."""
        self.log.fetch()
        self.checkpoints.save(self.state)
        self.checkpoints.wait()

    def close(self) -> None:
        """Wait for the last save and close the log."""
        self.checkpoints.close()
        self.log.close()


@pytest.fixture
def build_run(config):
    """Build small runs, new or resumed, in this process; close them after the test."""
    runs = []

    def build(**changes) -> BuiltRun:
        runs.append(BuiltRun(config(**changes)))
        return runs[-1]

    yield build
    for run in runs:
        run.close()


@pytest.fixture
def run(config):
    """Train the small run with some options changed; returns its folder."""

    def go(resume="auto", **changes) -> Path:
        changed_config = config(**changes)
        assert train(changed_config, resume=resume) == 0
        return changed_config.run_dir

    return go


@pytest.fixture(scope="session")
def finished_runs() -> dict[str, Path]:
    """The folders of finished runs, by their changed options."""
    return {}


@pytest.fixture
def finished(config, run, finished_runs, tmp_path_factory):
    """Return a finished run's folder, as `run` does; equal runs are trained once per session and copied."""

    def copy(**changes) -> Path:
        folder, key = config(**changes).run_dir, json.dumps(changes, sort_keys=True)
        if key in finished_runs:
            shutil.copytree(finished_runs[key], folder)
            folder.with_name(f".{folder.name}.lock").touch()
            return folder
        run(**changes)
        finished_runs[key] = shutil.copytree(folder, tmp_path_factory.mktemp("finished") / "run")
        return folder

    return copy


class AtStep:
    """Actions in the loop of `train`, each with the model as its argument. Steps count from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        from training import engine

        self.before: list[tuple[int, Callable]] = []
        self.after: list[tuple[int, Callable]] = []
        original = engine.train_step

        def train_step(setup, phase):
            step, model = setup.state.step + 1, setup.model.model
            for action in [action for n, action in self.before if n == step]:
                action(model)
            metrics = original(setup, phase)
            for action in [action for n, action in self.after if n == step]:
                action(model)
            return metrics

        monkeypatch.setattr(engine, "train_step", train_step)

    def __call__(self, step: int, action: Callable[[torch.nn.Module], object]) -> None:
        """Call `action(model)` right after this step, before the loop checks for signals and writes rows."""
        self.after.append((step, action))

    def before_step(self, step: int, action: Callable[[torch.nn.Module], object]) -> None:
        """Call `action(model)` right before this step."""
        self.before.append((step, action))

    def send(self, step: int, number: signal.Signals = signal.SIGTERM) -> None:
        """Send this process a signal after the step."""
        self(step, lambda _: os.kill(os.getpid(), number))

    def die(self, step: int) -> None:
        """End `train` with a KeyboardInterrupt after the step."""

        def die(_model):
            raise KeyboardInterrupt

        self(step, die)

    def poison(self, steps: Iterable[int], value: float = math.nan) -> None:
        """Multiply the loss of these steps by `value`."""
        hooks = []
        for step in steps:
            self.before_step(step, lambda model: hooks.append(poison_loss(model, value)))
            self(step, lambda _: hooks.pop().remove())

    def clear(self) -> None:
        """Forget all actions, so that the next `train` runs undisturbed."""
        self.before, self.after = [], []


def poison_loss(model: torch.nn.Module, value: float) -> RemovableHandle:
    """Multiply the loss of every forward by `value`, until the hook is removed."""

    def multiply(_model, _inputs, outputs):
        loss, metrics = outputs
        return loss * value, metrics | {"loss_sum": metrics["loss_sum"] * value}

    return model.register_forward_hook(multiply)


@pytest.fixture
def at_step(monkeypatch) -> AtStep:
    """Do something at a step of `train`: stop, die, poison the loss, fill the disk."""
    return AtStep(monkeypatch)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """A real S3 server: moto's process."""
    server = S3Server(tmp_path_factory.mktemp("s3") / "log")
    yield server
    server.close()


@pytest.fixture
def s3(s3_server, monkeypatch):
    """A proxy in front of the S3 server; this process uses it and gives up quickly."""
    proxy = Proxy(s3_server)
    for name, value in proxy.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("fsspec.config.conf", {"s3": json.loads(FAST)})
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 2)
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """A server (`warm.py`) that runs commands and ranks as forks of itself, which saves their imports."""
    server = warm.Server(tmp_path_factory.mktemp("warm"), environment() | {"PYTHONPATH": str(ROOT)})
    yield server
    server.close()


class CommandResult(NamedTuple):
    """The result of a command, with the field names of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def call(capsys):
    """Call a command of the package in this process: call("generate", "--run", ...)."""

    def go(name: str, *arguments: str) -> CommandResult:
        capsys.readouterr()
        try:
            status = importlib.import_module(f"training.{name}").main(list(arguments))
        except SystemExit as end:
            status = end.code
        return CommandResult(status or 0, *capsys.readouterr())

    return go


def command(*arguments: str, env: dict[str, str] | None = None, **kwargs) -> subprocess.CompletedProcess:
    """Run `python ...` from the repository's root in a new process, with one thread."""
    variables = environment() | (env or {})
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=240, **kwargs
    )


def environment() -> dict[str, str]:
    """Return the environment variables for a process that a test starts."""
    ours = {name: value for name, value in os.environ.items() if name != "TORCH_CPP_LOG_LEVEL"}  # `main` sets it here
    return ours | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}


def write_config(path: Path, options: dict) -> Path:
    """Write the options to a YAML file; return its path."""
    path.write_text(cli.dump_config(Config.model_validate(options)))
    return path


def rows(run: Path) -> list[dict]:
    """Return metrics.jsonl without the fields that depend on the clock or the machine."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIME_FIELDS} for line in lines]


def tensors(run: Path, step: int) -> dict[str, str]:
    """Return the SHA-256 of each tensor file of a checkpoint."""
    manifest = json.loads((run / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return {name: entry["sha256"] for name, entry in manifest.items() if name.endswith(".safetensors")}


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Save a checkpoint as one process does, and wait; older checkpoints stay."""
    writer = CheckpointWriter(folder, SINGLE, CheckpointConfig(keep=1000))
    shards = {
        kind: {
            name: TensorShard(tensor, 0, tensor.shape, is_owner=True)
            for name, tensor in getattr(checkpoint, kind).items()
        }
        for kind in ("model", "optimizer")
    }
    writer.save(shards, checkpoint.state, None)
    writer.wait()
    return folder / f"step-{checkpoint.state['step']:08d}"


def check_resumes_with(kernel: str, run, folder: Path, capsys) -> None:
    """Assert that the run of eight steps, resumed from step 6, ends in the same bits and names this kernel."""
    before = tensors(folder, 8)
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    run()
    output = " ".join(capsys.readouterr().out.split())
    assert "resuming from step 6" in output and f"{kernel} (matches the reference)" in output
    assert tensors(folder, 8) == before


def minimal_value(annotation: Any) -> Any:
    """Return a valid value of an option; for a section, a mapping with its required options only."""
    if is_list(annotation):
        return [minimal_value(get_args(annotation)[0])]
    if inside := sections(annotation):
        fields = inside[0].model_fields.items()
        return {name: minimal_value(field.annotation) for name, field in fields if field.is_required()}
    return "x" if annotation in (str, PathText) else 1


@contextmanager
def no_file_beyond(n_bytes: int) -> Iterator[None]:
    """Let each file take exactly `n_bytes`; further writes fail."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
