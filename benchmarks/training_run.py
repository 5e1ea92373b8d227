"""A training run whose steps a benchmark takes one at a time. It writes no logs after its header and no checkpoints."""

import sys
import time
from contextlib import redirect_stdout

import torch

from training.config import Config
from training.data import prepare
from training.distributed.world import World
from training.engine import Phases, build, evaluate, open_log, train_step


class TrainingRun:
    """A new run on one device, at step 0."""

    def __init__(self, config: Config, device: torch.device):
        with redirect_stdout(sys.stderr):
            dataset = prepare(config.data)
            self.setup = build(config, dataset, World(0, 1, device), "never")
            self.log = open_log(self.setup, dataset, time.perf_counter())
            self.log.close()
        self.config, self.stats, self.tokenizer = self.setup.config, self.setup.stats, dataset.tokenizer
        self.phase = Phases(self.log.timer, self.setup.model.world)

    def step(self) -> None:
        """Train one step as the training loop does; its metrics are fetched every `logging.every` steps."""
        state = self.setup.state
        metrics = train_step(self.setup, self.phase)
        self.log.add(state.step, *metrics, state.guard.n_skipped)
        if state.step % self.config.logging.every == 0:
            self.log.fetch()
            self.log.write()

    def validation_loss(self) -> float:
        """Return the loss in nats per token over `eval.tokens` of the validation set."""
        return evaluate(self.setup, self.tokenizer)["val_loss"]

    @property
    def n_steps(self) -> int:
        """Steps done."""
        return self.setup.state.step

    @property
    def micro_batch(self) -> int:
        """Samples per micro-batch."""
        return self.setup.micro_batch.size
