"""A run in the test's process, trained step by step. Only this file and `conftest.AtStep` know the engine's functions."""

from __future__ import annotations

import time

import torch

from training import engine
from training.config import Config
from training.data import prepare
from training.distributed.world import World


class LiveRun:
    """The parts of a run, and what the loop does with them.

    `model` is the sharded model and `network` the GPT in it; rows are fetched but not written, unless `write` is
    called.
    """

    def __init__(self, config: Config, world: World | None = None, resume: str = "auto"):
        self.world = world or World(0, 1, torch.device("cpu"))
        self.dataset = prepare(config.data, quiet=True)
        self.tokenizer = self.dataset.tokenizer
        self.setup = engine.build(config, self.dataset, self.world, resume)
        self.config, self.model, _, self.optimizer, self.loader, self.val_samples, *rest = self.setup
        self.micro_batch, self.state, self.kernels = rest
        self.network = self.model.model
        self.log = engine.open_log(self.setup, self.dataset, time.perf_counter())
        self.checkpoints = engine.Checkpoints(self.config, self.model, self.optimizer, self.log)
        self.phase = engine.Phases(self.log.timer, self.world)

    def step(self) -> None:
        """Train one step."""
        parts = (self.config, self.model, self.optimizer, self.loader, self.micro_batch, self.state, self.phase)
        metrics = engine.train_step(*parts)
        self.log.add(self.state.step, *metrics, self.state.guard.n_skipped)

    def rows(self) -> list[dict]:
        """Fetch and return the rows of the steps since the last call."""
        rows = self.log.fetch()
        self.log.rows.clear()
        return rows

    def evaluate(self) -> dict[str, float]:
        """Return the validation figures."""
        return engine.evaluate(self.setup, self.tokenizer)

    def sample(self) -> dict:
        """Return the continuations of the prompts."""
        return engine.sample_texts(self.setup, self.tokenizer)

    def save(self) -> None:
        """Save a checkpoint and wait for it."""
        self.log.fetch()
        self.checkpoints.save(self.state)
        self.checkpoints.wait()

    def close(self) -> None:
        """Close the logs, once nothing is being saved."""
        self.checkpoints.__exit__()
        self.log.close()
