"""The length of a run in steps, from `tokens`, `epochs` or `tokens_per_parameter`. All of them round up."""

import math
from collections.abc import Sequence
from fractions import Fraction

from training.config import Config
from training.errors import UserError
from training.model.stats import model_stats
from training.optim.batch_schedule import BatchSchedule
from training.options.notices import schedule_notices


def length_notices(config: Config) -> list[str]:
    """Return the lines about lengths in steps, and stages of the batch, that do not fit; `steps` is resolved."""
    return [*schedule_notices(config), *BatchSchedule.of(config).describe_unused(config)]


def epoch_samples(windows: Sequence[int], weights: Sequence[float] | None) -> Fraction:
    """Return the number of samples in an epoch, from the number of windows of each stream of training text.

    With weights, it is the number after which the source that is read most was read once.
    """
    if weights is None:
        return Fraction(sum(windows))
    exact = [Fraction(str(weight)) for weight in weights]
    return sum(exact) * min(n / weight for n, weight in zip(windows, exact, strict=True))


def resolve_steps(config: Config, samples_per_epoch: Fraction | None) -> Config:
    """Return the config with `steps`, in place of the option that sets the length. `model` is resolved.

    `samples_per_epoch` is None if it is unknown. Raises UserError if the run would be too long to count.
    """
    if config.steps is not None:
        return config
    if config.tokens is not None:
        option, n_tokens = f"tokens: {config.tokens:,}", config.tokens
    elif config.epochs is not None:
        if samples_per_epoch is None:
            raise UserError("epochs: the training text is not prepared, so its size is unknown; run training.prepare")
        option = f"epochs: {config.epochs:g}"
        n_tokens = math.ceil(Fraction(str(config.epochs)) * samples_per_epoch) * config.model.n_positions
    else:
        option = f"tokens_per_parameter: {config.tokens_per_parameter:g}"
        n_tokens = math.ceil(Fraction(str(config.tokens_per_parameter)) * model_stats(config.model).n_active_parameters)
    steps = BatchSchedule.of(config).steps(n_tokens)
    if steps >= 2**63:
        raise UserError(f"{option} is {steps:.3g} steps, more than can be counted; lower it")
    return config.with_steps(steps)
