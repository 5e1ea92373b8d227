"""Weights & Biases, if `logging.wandb` is set. Its own process sends the rows: training never waits for the network."""

import json
import uuid
from typing import Any

from training.config import LoggingConfig, WandbConfig
from training.errors import UserError
from training.files import write_atomically
from training.logging.heat_map import draw_heat_map, should_draw
from training.logging.metrics import LOAD_IMAGE, expert_load, scalars
from training.logging.sinks import RunInfo, Sink
from training.terminal import print_note

FINISH_TIMEOUT_S = 120  # rows not sent by then stay on disk for `wandb sync`


def open_sink(run: RunInfo, config: LoggingConfig) -> Sink:
    return WandbSink(run, config.wandb, config.histogram_every)


class WandbSink(Sink):
    """Logs to one W&B run over all restarts; W&B cannot drop rows, so a repeated step is not logged again."""

    def __init__(self, run: RunInfo, config: WandbConfig, histogram_every: int) -> None:
        try:
            import wandb
        except ImportError as error:
            reason = "logging.wandb needs Weights & Biases: pip install wandb, or remove logging.wandb"
            raise UserError(reason) from error
        self.wandb, self.is_closed = wandb, False
        self.histogram_every, self.steps, self.moe_layers = histogram_every, run.steps, run.moe_layers
        self.marker = run.dir / "wandb.json"
        # The W&B run's id, which is random as a folder's name may be used again, and the last step logged.
        self.state = {"id": f"{run.name[:32]}-{uuid.uuid4().hex[:8]}", "step": 0}
        if self.marker.exists():
            try:
                state = json.loads(self.marker.read_bytes())
                self.state = {"id": str(state["id"]), "step": int(state["step"])}
            except (ValueError, KeyError, TypeError):
                print_note(f"{self.marker}: no valid W&B run id; starting a new W&B run")
        write_atomically(self.marker, json.dumps(self.state) + "\n")
        self.run = _init(wandb, config, run, self.state["id"])
        self.state["step"] = max(self.state["step"], self.run.step - 1)

    def write(self, rows: list[dict]) -> None:
        for row in rows:
            if row["step"] <= self.state["step"]:
                continue
            values: dict[str, Any] = dict(scalars(row, self.moe_layers))
            if should_draw(row, self.histogram_every, self.steps):
                values[LOAD_IMAGE] = self.wandb.Image(draw_heat_map(expert_load(row, self.moe_layers)))
            if row.get("samples"):
                data = [[row["step"], sample["prompt"], sample["text"]] for sample in row["samples"]]
                values["samples"] = self.wandb.Table(columns=["step", "prompt", "text"], data=data)
            self.run.log(values, step=row["step"])
            self.state["step"] = row["step"]
        write_atomically(self.marker, json.dumps(self.state) + "\n")

    def close(self, summary: dict | None) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        if summary is not None:
            self.run.summary.update({key: value for key, value in summary.items() if key != "next"})
        self.run.finish(exit_code=0 if summary is not None else 1)


def _init(wandb: Any, config: WandbConfig, run: RunInfo, run_id: str) -> Any:
    """Start or resume the W&B run, offline without a network. Raises UserError without a valid API key."""
    options = {"project": config.project, "entity": config.entity, "name": run.name, "id": run_id, "resume": "allow"}
    options |= {"dir": str(run.dir), "config": run.config}
    options["settings"] = wandb.Settings(silent=True, console="off", finish_timeout=FINISH_TIMEOUT_S)
    wandb.setup(settings=wandb.Settings(silent=True))
    try:
        return wandb.init(mode=config.mode, **options)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        remedy = "Run `wandb login`, set WANDB_API_KEY, or pass --logging.wandb.mode offline"
        raise UserError(f"Weights & Biases: {str(error).splitlines()[0]} {remedy}") from error
    except wandb.errors.CommError as error:
        problem = f"does not answer ({str(error).splitlines()[0]}); logging offline to {run.dir / 'wandb'}"
        print_note(f"Weights & Biases {problem}, upload it with `wandb sync`")
        wandb.teardown()  # its process still holds the run's id
        return wandb.init(mode="offline", **options)
