"""The number of tokens of each step's batch: constant, or in stages. Steps count from 0."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from training.config import Config


class Stage(NamedTuple):
    """Consecutive steps with batches of one size."""

    first_step: int
    first_token: int  # the number of tokens that earlier stages read
    batch_tokens: int
    option: int  # its number in `batch_schedule`


class BatchSchedule:
    """The stages of a run, from (from_tokens, batch_tokens) pairs; the first `from_tokens` is 0, and they increase.

    A stage starts at the first step before which `from_tokens` tokens or more were read: it rounds up to whole steps. A
    stage that the next one starts with is left out. The last stage has no end.
    """

    def __init__(self, sizes: Iterable[tuple[int, int]]):
        self.stages: list[Stage] = []
        for option, (from_tokens, batch_tokens) in enumerate(sizes):
            stage = Stage(0, 0, batch_tokens, option)
            if self.stages:
                step, token, size, _ = self.stages[-1]
                n_steps = max(0, -(-(from_tokens - token) // size))
                stage = Stage(step + n_steps, token + n_steps * size, batch_tokens, option)
                if not n_steps:
                    self.stages.pop()
            self.stages.append(stage)

    @classmethod
    def of(cls, config: Config) -> "BatchSchedule":
        """Return the schedule of `batch_schedule`, or of `batch_tokens`."""
        if config.batch_tokens is not None:
            return cls([(0, config.batch_tokens)])
        return cls((stage.from_tokens, stage.batch_tokens) for stage in config.batch_schedule)

    def batch_tokens(self, step: int) -> int:
        """Return the tokens of a step."""
        return self._stage(step).batch_tokens

    def tokens(self, steps: int) -> int:
        """Return the tokens that the first `steps` steps read."""
        stage = self._stage(steps)
        return stage.first_token + (steps - stage.first_step) * stage.batch_tokens

    def steps(self, tokens: int) -> int:
        """Return the fewest steps that read at least `tokens` tokens."""
        stage = self.stages[bisect_right([stage.first_token for stage in self.stages], tokens) - 1]
        return stage.first_step - (stage.first_token - tokens) // stage.batch_tokens

    def nearest_steps(self, tokens: float) -> int:
        """Return the steps that read about `tokens` tokens: the nearest number, and at least 1."""
        stage = self.stages[bisect_right([stage.first_token for stage in self.stages], tokens) - 1]
        return max(1, stage.first_step + round((tokens - stage.first_token) / stage.batch_tokens))

    def describe_unused(self, config: Config) -> Iterator[str]:
        """Yield a line for each stage of `batch_schedule` that has no step; `steps` is resolved."""
        first_step = {stage.option: stage.first_step for stage in self.stages}
        for option, stage in enumerate(config.batch_schedule or ()):
            if option not in first_step:
                yield f"batch_schedule.{option}: no step has its size: the next stage starts with the same step"
            elif first_step[option] >= config.steps:
                yield f"batch_schedule.{option}: this run ends before {stage.from_tokens:,} tokens, where it starts"

    @property
    def constant(self) -> int | None:
        """The tokens of every batch; None if stages differ."""
        return self.stages[0].batch_tokens if len(self.stages) == 1 else None

    def sizes(self) -> list[int]:
        """Return the tokens of a batch in each stage."""
        return [stage.batch_tokens for stage in self.stages]

    def _stage(self, step: int) -> Stage:
        return self.stages[bisect_right([stage.first_step for stage in self.stages], step) - 1]
