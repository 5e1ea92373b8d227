"""Two runs that take turns over several seeds: whether the shorter one ends as low as the longer one."""

import dataclasses
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import against, seconds_of
from training_run import TrainingRun

from training.compare.results import RunResult, paired_difference
from training.config import Config
from training.optim.batch_schedule import BatchSchedule

COLORS = ("#666666", "#1f66b0")


@dataclasses.dataclass
class Side:
    """A run, its clock and its curve. The clock stands still while the other side trains, and during evaluations."""

    run: TrainingRun
    step_s: list[float] = dataclasses.field(default_factory=list)
    curve: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)  # step, seconds, validation loss

    @property
    def share_done(self) -> float:
        return self.run.n_steps / self.run.config.steps

    @property
    def name(self) -> str:
        return self.run.config.name

    @property
    def loss(self) -> float:
        """The last validation loss."""
        return self.curve[-1][2]

    def tokens(self, n_steps: int) -> int:
        """Return the tokens that these steps read."""
        return BatchSchedule.of(self.run.config).tokens(n_steps)

    def flops(self, n_steps: int) -> float:
        """Return the FLOPs of forward and backward in these steps."""
        return float(self.tokens(n_steps) * self.run.stats.flops_per_token)

    def step(self) -> None:
        """Train a step, and evaluate if it is due."""
        run, config = self.run, self.run.config
        self.step_s.append(seconds_of(run.step, run.setup.model.world.device))
        is_due = config.eval.every is not None and run.n_steps % config.eval.every == 0
        if is_due or run.n_steps == config.steps:
            loss = run.validation_loss()
            self.curve.append((run.n_steps, sum(self.step_s), loss))
            print(f"  {self.name:12} step {run.n_steps:5}/{config.steps}  loss {loss:.4f}", flush=True)

    def result(self) -> RunResult:
        """Return the final loss and what it took."""
        config, (steps, seconds, loss) = self.run.config, self.curve[-1]
        return RunResult(
            config.seed, config.run_dir, loss, steps, self.tokens(steps), seconds, self.flops(steps), data=None
        )

    def summary(self) -> str:
        """Return the result on a line."""
        result, stats = self.result(), self.run.stats
        return (
            f"{self.name:12} loss {result.value:.4f} after {result.steps} steps, {result.tokens / 1e6:.2f}M tokens, "
            f"{result.flops / 1e12:.2f} TFLOP, {result.time_s:.1f} s; "
            f"{stats.n_parameters:,} parameters, {stats.n_active_parameters:,} active"
        )


def start(config: Config, seed: int, folder: str, device: torch.device) -> Side:
    """Return a run with this seed before its first step."""
    logging = config.logging.model_copy(update={"tensorboard": False})
    changes = {"seed": seed, "out_dir": folder, "logging": logging}
    return Side(TrainingRun(config.model_copy(update=changes), device))


def race(configs: tuple[Config, Config], seeds: int, device: torch.device) -> list[tuple[Side, Side]]:
    """Train both configurations with each seed; return the sides by seed.

    The side with the smaller share of its steps done goes on, so that other load on the machine affects both.
    """
    pairs = []
    for seed in range(configs[0].seed, configs[0].seed + seeds):
        print(f"seed {seed}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            one, two = (start(config, seed, folder, device) for config in configs)
            while min(one.share_done, two.share_done) < 1:
                min(one, two, key=lambda side: side.share_done).step()
        pairs.append((one, two))
    return pairs


def report(pairs: list[tuple[Side, Side]], most_flops: float | None, most_time: float) -> None:
    """Print what each run took, and of the second side the shares of the first's FLOPs and time, beside the bars.

    A bar is met only if the second side ends as low with every seed.
    """
    for first, second in pairs:
        print(f"seed {first.run.config.seed}\n  {first.summary()}\n  {second.summary()}")
    results = [(first.result(), second.result()) for first, second in pairs]
    first, second = (side.name for side in pairs[0])
    difference = paired_difference([new for _, new in results], {old.seed: old.value for old, _ in results})
    line = f"final loss of {second} less that of {first}: {difference.mean:+.4f}"
    if difference.low is not None:
        line += f", {difference.n_seeds} seeds, 95 % interval {difference.low:+.4f} to {difference.high:+.4f}"
    n_reached = sum(new.value <= old.value for old, new in results)
    print(f"{line}\nas low with {n_reached} of {len(pairs)} seeds")
    flops, times = [new.flops / old.flops for old, new in results], [new.time_s / old.time_s for old, new in results]
    for name, shares, bar in (("FLOPs", flops, most_flops), ("time", times, most_time)):
        if bar is not None and n_reached == len(pairs):
            print(f"its share of the {name}: {against(statistics.fmean(shares), bar, least=False)}")
        elif bar is not None:
            print(f"its share of the {name}: {statistics.fmean(shares):.4g} (MISSED, as it is not as low)")
    print(f"its share of the time by seed: {min(times):.3f} to {max(times):.3f}")


def draw(pairs: list[tuple[Side, Side]], path: Path) -> None:
    """Draw validation loss by tokens, FLOPs and time: the mean over the seeds, and a band from least to most."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(14, 4.5), layout="constrained", sharey=True)
    for sides, color in zip(zip(*pairs, strict=True), COLORS, strict=True):
        steps, seconds, losses = np.array([side.curve for side in sides]).transpose(2, 0, 1)  # (seed, evaluation) each
        mean = losses.mean(0)
        tokens, flops = ([count(int(n)) for n in steps[0]] for count in (sides[0].tokens, sides[0].flops))
        for panel, x in zip(panels, (np.divide(tokens, 1e6), np.divide(flops, 1e12), seconds.mean(0)), strict=True):
            panel.plot(x, mean, color=color, label=f"{sides[0].name}: {mean[-1]:.3f}")
            panel.plot(x[-1], mean[-1], "o", color=color)
            panel.fill_between(x, losses.min(0), losses.max(0), color=color, alpha=0.25)
    first_loss = statistics.fmean(first.loss for first, _ in pairs)
    for panel, unit in zip(panels, ("tokens, millions", "training FLOPs, 10¹²", "seconds of training"), strict=True):
        panel.axhline(first_loss, color=COLORS[0], linewidth=0.8, linestyle=":")
        panel.set(xlabel=unit, xlim=(0, None))
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("validation loss, nats per token")
    panels[0].legend()
    figure.savefig(path, dpi=110)
