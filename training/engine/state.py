"""The state of a run: `TrainState`, stored in state.json, and `Checkpoints`, which saves it with the tensors."""

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, ValidationError
from typing_extensions import TypedDict  # typing's own lacks what pydantic needs before Python 3.12

from training import checkpoint
from training.checkpoint import CheckpointWriter, TensorShard, WriterGroup
from training.config import Config
from training.distributed.sharded_model import ShardedModel
from training.engine.guard import StepGuard
from training.errors import UserError
from training.logging.jsonl import nan_to_null
from training.logging.rows import RunLog
from training.optim.loss_scale import LossScale
from training.optim.optimizer import Optimizer


class Best(TypedDict):
    """The lowest validation loss and its step."""

    step: int
    val_loss: float


class KnownMicroBatch(TypedDict):
    """A micro-batch that fits, and the activation checkpointing that it needs."""

    micro_batch: PositiveInt
    recompute: str


class StoredLossScale(TypedDict):
    """The fields of `LossScale`."""

    scale: float
    good_steps: int


class StateFile(BaseModel):
    """The schema of state.json. Older versions did not write the fields with a default."""

    model_config = ConfigDict(strict=True, extra="ignore")

    step: NonNegativeInt
    time_s: float
    best: Best | None
    last_row: dict[str, Any]
    loss_scale: StoredLossScale | None
    skips: dict[str, int | list[float]]
    data: str
    config: dict[str, Any]
    ledger: dict[str, dict[str, float]] = {}
    kernels: dict[str, str] = {}
    micro_batch: dict[str, KnownMicroBatch] = {}


@dataclass
class TrainState:
    """All of a run that is neither weights nor optimizer state."""

    config: dict[str, Any]  # resolved options as plain data
    data: str  # fingerprint of text and tokenizer
    kernels: dict[str, str] = field(default_factory=dict)  # chosen kernel by option
    step: int = 0  # updates done, skipped ones included
    best: Best | None = None
    last_row: dict[str, Any] = field(default_factory=dict)  # the newest row of metrics
    guard: StepGuard = field(default_factory=StepGuard)
    loss_scale: LossScale | None = None  # fp16 only
    micro_batches: dict[str, KnownMicroBatch] = field(default_factory=dict)  # by hardware key
    time_s: float = 0.0  # spent training, without evaluations and saves
    phases: dict[str, dict[str, float]] = field(default_factory=dict)  # state of the phase timer

    def update_best(self, val_loss: float, *, is_saved: bool) -> bool:
        """Record the validation loss as `best` if it is the lowest so far; return True if so.

        After a non-finite update `best` changes only if this step is saved anyway (`is_saved`).
        """
        if self.best is not None and val_loss >= self.best["val_loss"]:
            return False
        if self.guard.consecutive and not is_saved:
            return False
        self.best = {"step": self.step, "val_loss": val_loss}
        return True

    def to_json(self) -> dict[str, Any]:
        """Return the contents of state.json."""
        return {
            "step": self.step,
            "time_s": self.time_s,
            "best": self.best,
            "last_row": self.last_row,
            "loss_scale": self.loss_scale and asdict(self.loss_scale),
            "skips": self.guard.to_json(),
            "data": self.data,
            "config": self.config,
            "ledger": self.phases,
            "kernels": self.kernels,
            "micro_batch": self.micro_batches,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any], path: Path, spike_limit: float | None) -> "TrainState":
        """Build the state from the contents of state.json at `path`; `spike_limit` is that of the StepGuard.

        Raises UserError for a missing key or a value of another type.
        """
        guard = StepGuard(spike_limit)
        try:
            stored = StateFile.model_validate(content)
            guard.load_json(stored.skips)
        except (ValidationError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not the state of a run; start over with --resume never") from error
        return cls(
            config=stored.config,
            data=stored.data,
            kernels=stored.kernels,
            step=stored.step,
            best=stored.best,
            last_row=stored.last_row,
            guard=guard,
            loss_scale=stored.loss_scale and LossScale(**stored.loss_scale),
            micro_batches=stored.micro_batch,
            time_s=stored.time_s,
            phases=stored.ledger,
        )


class Checkpoints:
    """The checkpoints of a run: saved one at a time, in the background unless `checkpoint.background` is false."""

    def __init__(self, config: Config, model: ShardedModel, optimizer: Optimizer, log: RunLog):
        self.config, self.model, self.optimizer, self.log = config, model, optimizer, log
        world = model.world
        group = WriterGroup(world.rank, world.size, partial(world.gather, background=True))
        self.writer = CheckpointWriter(config.run_dir / "checkpoints", group, config.checkpoint)

    def preallocate(self) -> None:
        """Allocate the buffers of a save in the background, once the first step has created the optimizer state."""
        if not self.writer.is_preallocated:
            self.writer.preallocate(self._tensors())

    def save(self, state: TrainState) -> None:
        """Start saving weights, optimizer and state, then removing older checkpoints. Collective."""
        state.last_row = nan_to_null({key: value for key, value in self.log.last_row.items() if key != "samples"})
        state.time_s, state.phases = self.log.time_s, self.log.timer.state_dict()
        best = state.best["step"] if state.best and self.config.checkpoint.keep_best else None
        self.writer.save(self._tensors(), state.to_json(), best)

    @property
    def has_failed(self) -> bool:
        """True after a save that failed on any rank."""
        return self.writer.failure is not None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the save in progress, whether it fails or not."""
        self.writer.close()

    def wait(self) -> None:
        """Wait for the save in progress. Raises UserError if it failed."""
        self.writer.wait()

    def _tensors(self) -> dict[str, dict[str, TensorShard]]:
        """Return this rank's part of every saved tensor, by kind and name."""
        shards = self.model.tensors
        model = {
            name: TensorShard(shard.local_rows(), shard.rows.start, shard.shape, shard.is_owner)
            for name, shard in shards.items()
        }
        optimizer, is_main = {}, self.model.world.is_main
        for key, tensor in self.optimizer.state_dict().items():
            shard = shards[key.rpartition("/")[0]]
            place = (shard.rows.start, shard.shape, shard.is_owner) if tensor.ndim else (0, tensor.shape, is_main)
            optimizer[key] = TensorShard(tensor, *place)
        return {"model": model, "optimizer": optimizer}


def load_tensors(path: Path, model: ShardedModel, optimizer: Optimizer) -> None:
    """Load weights and optimizer state from the checkpoint at `path`; each rank reads only its rows.

    Raises UserError if the checkpoint holds another model or optimizer.
    """
    shards = model.tensors
    try:
        shapes = {(name, shard.shape) for name, shard in shards.items()}
        if differing := sorted(checkpoint.tensor_shapes(path, "model").items() ^ shapes):
            raise KeyError(f"{differing[0][0]} {tuple(differing[0][1])}")
        rows = {name: (shard.rows.start, shard.rows.stop) for name, shard in shards.items()}
        for name, tensor in checkpoint.read_tensors(path, "model", rows).items():
            shards[name].local_rows().copy_(tensor)
        shapes = checkpoint.tensor_shapes(path, "optimizer")
        rows = {key: rows[key.rpartition("/")[0]] if shape else None for key, shape in shapes.items()}
        optimizer.load_state_dict(checkpoint.read_tensors(path, "optimizer", rows))
    except (RuntimeError, KeyError) as error:
        raise UserError(f"the checkpoint does not fit this model: {' '.join(str(error).split())}") from error
