"""Compare a Mixture of Experts with its dense twin: validation loss by tokens, FLOPs and time.

    cd benchmarks && python moe_vs_dense.py --plot results/moe_vs_dense.png | tee results/moe_vs_dense.txt

Three runs take turns, a step each: the dense twin, the MoE for as many steps, and the MoE for 1.5 times fewer, with a
shortened schedule. A run's clock stops while others train and during evaluations. The bars: with 1.5 times fewer
tokens the MoE's validation loss is no higher than the twin's; its step takes at most 1.25 times as long.
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

import torch
from common import header, seconds_of
from training_run import TrainingRun

from training import device as devices
from training.config import Config
from training.errors import UserError
from training.options import cli
from training.twin import describe_twin, twin

FEWER_TOKENS, STEP_TIME = 1.5, 1.25  # the bars


@dataclasses.dataclass
class Side:
    """A run, its clock and its curve."""

    name: str
    run: TrainingRun
    step_s: list[float] = dataclasses.field(default_factory=list)
    curve: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)  # step, seconds, validation loss

    def step(self) -> None:
        """Train a step, and evaluate if it is due."""
        run, config = self.run, self.run.config
        self.step_s.append(seconds_of(run.step, run.setup.model.world.device))
        if run.n_steps % config.eval.every == 0 or run.n_steps == config.steps:
            loss = run.validation_loss()
            self.curve.append((run.n_steps, sum(self.step_s), loss))
            print(f"  {self.name:10} step {run.n_steps:5}/{config.steps}  loss {loss:.4f}", flush=True)

    @property
    def loss(self) -> float:
        return self.curve[-1][2]


def shortened(config: Config, factor: float) -> Config:
    """Return the run with `factor` times fewer steps, and the schedule shortened in proportion."""
    counts = {name: round(n / factor) for name, n in config.schedule if name.endswith("_steps") and n is not None}
    changes = {"steps": round(config.steps / factor), "name": f"{config.name}-short"}
    return config.model_copy(update=changes | {"schedule": config.schedule.model_copy(update=counts)})


def sides(config: Config, folder: str, device: torch.device) -> list[Side]:
    """Return the three runs before their first step."""
    configs = {"dense": twin(config), "moe": config, "moe, short": shortened(config, FEWER_TOKENS)}
    runs = []
    for name, one in configs.items():
        quiet = one.logging.model_copy(update={"tensorboard": False})
        runs.append(Side(name, TrainingRun(one.model_copy(update={"out_dir": folder, "logging": quiet}), device)))
    return runs


def report(dense: Side, moe: Side, short: Side) -> None:
    """Print the results, and whether the bars are met."""
    for side in (dense, moe, short):
        config, seconds = side.run.config, sum(side.step_s)
        n_tokens = config.steps * config.batch_tokens
        stats = side.run.stats
        flops = n_tokens * stats.flops_per_token
        print(
            f"{side.name:10} loss {side.loss:.4f} after {n_tokens / 1e6:.1f}M tokens, {flops / 1e12:.1f} TFLOP, "
            f"{seconds:.0f} s; {stats.n_parameters:,} parameters, {stats.n_active_parameters:,} active"
        )
    met = {True: "met", False: "MISSED"}
    print(
        f"with {FEWER_TOKENS} times fewer tokens {short.loss:.4f}, the dense twin {dense.loss:.4f}: "
        f"{met[short.loss <= dense.loss]}"
    )
    step = statistics.median(a / b for a, b in zip(moe.step_s, dense.step_s, strict=True))
    print(f"a step takes {step:.2f} times the twin's: bar {STEP_TIME}: {met[step <= STEP_TIME]}")
    seconds, theirs = sum(short.step_s), sum(dense.step_s)
    won = short.loss <= dense.loss and seconds < theirs
    print(f"on the clock: {seconds:.0f} s for what takes the twin {theirs:.0f} s: {met[won]}")


def draw(path: Path, runs: list[Side]) -> None:
    """Draw validation loss against tokens, FLOPs and time."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(14, 4.5), layout="constrained", sharey=True)
    for side, color in zip(runs, ("#666666", "#1f66b0", "#d9822b"), strict=True):
        config, flops = side.run.config, side.run.stats.flops_per_token
        losses = [loss for _, _, loss in side.curve]
        tokens = [step * config.batch_tokens for step, _, _ in side.curve]
        label = f"{side.name}: {losses[-1]:.3f}"
        for panel, x in zip(
            panels,
            ([n / 1e6 for n in tokens], [n * flops / 1e12 for n in tokens], [s for _, s, _ in side.curve]),
            strict=True,
        ):
            panel.plot(x, losses, color=color, label=label)
            panel.plot(x[-1], losses[-1], "o", color=color)
    for panel, unit in zip(panels, ("tokens, millions", "training FLOPs, 10¹²", "seconds of training"), strict=True):
        panel.axhline(runs[0].loss, color="#666666", linewidth=0.8, linestyle=":")
        panel.set_xlabel(unit)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("validation loss, nats a token")
    panels[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(Path(__file__).with_suffix(".yaml")), help="YAML file of the MoE's run")
    parser.add_argument("--cache_dir", default="data_cache", help="folder of the token shards (default %(default)s)")
    parser.add_argument("--plot", type=Path, help="draw the curves into this PNG")
    args = parser.parse_args()
    try:
        config = cli.load_config(args.config, {"data.cache_dir": args.cache_dir})
        twin(config)
    except UserError as error:
        parser.error(str(error))
    device = devices.select_device(config.parallel.device)
    print(f"{header(device)}\n{describe_twin(config)}")
    with tempfile.TemporaryDirectory() as folder:
        runs = sides(config, folder, device)
        while any(side.run.n_steps < side.run.config.steps for side in runs):
            for side in runs:
                if side.run.n_steps < side.run.config.steps:
                    side.step()
    report(*runs)
    if args.plot:
        draw(args.plot, runs)


if __name__ == "__main__":
    main()
