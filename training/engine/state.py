"""The state of a run: `TrainState`, stored in state.json, and `Checkpoints`, which saves it with the tensors."""

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator
from typing_extensions import TypedDict  # typing's own lacks what pydantic needs before Python 3.12

from training import checkpoint
from training import device as devices
from training.checkpoint import STOP_S, CheckpointWriter, Copier, TensorShard, WriterGroup
from training.config import AVERAGE, Config
from training.distributed.sharded_model import ShardedModel
from training.engine.guard import StepGuard
from training.errors import UserError
from training.files import read_bytes
from training.logging.history import span_of
from training.logging.jsonl import nan_to_null
from training.logging.rows import RunLog
from training.optim.optimizer import LossScale, Optimizer

Finite = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(allow_inf_nan=False, ge=0)]


class Best(TypedDict):
    """The lowest validation loss and its step."""

    step: PositiveInt
    val_loss: Finite
    of: NotRequired[str | None]  # the source whose validation text it is, or AVERAGE; None: all of it


class KnownMicroBatch(TypedDict):
    """A micro-batch that fits, and the activation checkpointing that it needs."""

    micro_batch: PositiveInt
    recompute: Literal["none", "selective", "full"]


class Ancestor(TypedDict):
    """The checkpoint that a run branched off from, and the options that it changed there."""

    run: str  # its folder
    step: PositiveInt
    checkpoint_sha256: str  # of its manifest.json, which has the SHA-256 of every file
    changes: dict[str, list[Any]]  # option: [the parent's value, the branch's]


class TrainState(BaseModel):
    """All of a run that is neither weights nor optimizer state: state.json. Old ones lack the fields with defaults."""

    model_config = ConfigDict(strict=True, populate_by_name=True, extra="forbid")

    step: NonNegativeInt  # updates done, skipped ones included
    time_s: Seconds  # spent training, without evaluations and saves
    best: Best | None
    last_row: dict[str, Any]  # the newest row of metrics
    loss_scale: LossScale | None  # fp16 only
    guard: StepGuard = Field(alias="skips")
    data: str  # fingerprint of text and tokenizer
    init_from_sha256: str | None = None  # of the weights that the run started from; None: random ones
    n_vocab: PositiveInt | None = None  # tokens: later rows of the embedding are padding; None: all rows are tokens
    config: dict[str, Any]  # resolved options as plain data
    phases: dict[str, dict[str, Seconds]] = Field({}, alias="ledger")  # state of the phase timer
    kernels: dict[str, str] = {}  # chosen kernel by option
    micro_batches: dict[str, KnownMicroBatch] = Field({}, alias="micro_batch")  # by hardware key
    lineage: list[Ancestor] = []  # of a branch, the oldest first

    @model_validator(mode="after")
    def _check_values(self) -> "TrainState":
        """Raise ValueError for values of the right type that no run writes."""
        scale, precision = self.loss_scale, self.config.get("precision", "fp32")
        if self.step and not self.time_s:
            raise ValueError("time_s: 0 after the first step")
        if self.step and (self.last_row.get("step") != self.step or self.last_row.get("tokens") is None):
            raise ValueError(f"last_row: not the row of step {self.step}")
        if self.step:
            try:
                span_of(self.last_row)
            except ValueError as error:
                raise ValueError(f"last_row: {error}") from error
        if self.best is not None and self.best["step"] > self.step:
            raise ValueError(f"best: step {self.best['step']} is after step {self.step}")
        if scale is not None and not (0 < scale.scale < math.inf and scale.good_steps >= 0):
            raise ValueError(f"loss_scale: {scale.scale:g} after {scale.good_steps} good steps")
        if precision not in list(devices.DTYPES):  # which may not be hashable
            raise ValueError(f"config: precision {precision!r}")
        return self

    @classmethod
    def new(cls) -> "TrainState":
        """Return the state before the first step."""
        guard = StepGuard(n_skipped=0, consecutive=0, consecutive_spikes=0)
        return cls(step=0, time_s=0.0, best=None, last_row={}, loss_scale=None, guard=guard, data="", config={})

    @classmethod
    def load(cls, path: Path) -> "TrainState":
        """Read the state.json at `path`. Raises UserError as `parse`."""
        return cls.parse(read_bytes(path), str(path))

    @classmethod
    def parse(cls, content: bytes, source: str) -> "TrainState":
        """Return a state.json's content. Raises UserError for a missing key or a value of another type."""
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            problem = f"{key}: {first['msg']}" if key else first["msg"].removeprefix("Value error, ")
            raise UserError(f"{source}: not the state of a run: {problem}; start over with --resume never") from error

    def to_json(self) -> dict[str, Any]:
        """Return the contents of state.json."""
        windows = None if self.config.get("skip_spikes") is not None else {"losses", "norms"}  # stale if it is off
        guard = self.guard.model_dump(by_alias=True, exclude_defaults=True, exclude=windows)
        return self.model_dump(by_alias=True) | {"skips": guard}

    def update_best(self, row: dict[str, Any], source: str | None, *, is_saved: bool) -> bool:
        """Record the row's validation loss, as `eval.best` chooses it (`source`), as `best` if it is the lowest so far.

        Returns True if so. After a non-finite update `best` changes only if this step is saved anyway (`is_saved`).
        """
        if source == AVERAGE:
            val_loss = row.get("averaged_val_loss", math.inf)
        else:
            val_loss = row["val_loss"] if source is None else row["val_sets"]["loss"][source]
        if not math.isfinite(val_loss):  # the average has not begun
            return False
        if self.best is not None and self.best.get("of") == source and val_loss >= self.best["val_loss"]:
            return False
        if self.guard.consecutive and not is_saved:
            return False
        self.best = {"step": self.step, "val_loss": val_loss} | ({} if source is None else {"of": source})
        return True


class Checkpoints:
    """The checkpoints of a run: saved one at a time, in the background unless `checkpoint.background` is false.

    On the main rank they are also copied to `remote`.
    """

    def __init__(
        self,
        config: Config,
        model: ShardedModel,
        optimizer: Optimizer,
        log: RunLog,
        remote: checkpoint.RemoteRun | None = None,
    ):
        self.config, self.model, self.optimizer, self.log = config, model, optimizer, log
        world = model.world
        group = WriterGroup(world.rank, world.size, partial(world.gather, background=True))
        self.writer = CheckpointWriter(config.run_dir / "checkpoints", group, config.checkpoint)
        keep_best = config.checkpoint.keep_best
        self.copier = remote and Copier(config.run_dir, remote, self.writer, keep_best=keep_best)

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

    def wait(self) -> None:
        """Wait for the save in progress. Raises UserError if it failed."""
        self.writer.wait()

    def finish_copy(self, *, is_finished: bool) -> None:
        """Wait for the copy of the newest checkpoint and say whether it is there; of a finished run, copy all of it.

        The wait for a run that is not finished has a limit, and all ranks wait: a launcher may end all of them as soon
        as one has stopped. Collective.
        """
        if self.copier is not None:
            self.copier.finish(None if is_finished else STOP_S)
        if not is_finished and self.config.checkpoint.copy_to is not None:
            self.model.world.max_int(0)

    def close(self) -> None:
        """Wait for the save in progress, whether it fails or not."""
        self.writer.close()
        if self.copier is not None:
            self.copier.close()

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
            rows = (shard.rows.start, shard.shape, shard.is_owner) if tensor.ndim else (0, tensor.shape, is_main)
            optimizer[key] = TensorShard(tensor, *rows)
        return {"model": model, "optimizer": optimizer}


def load_tensors(path: Path, model: ShardedModel, optimizer: Optimizer) -> None:
    """Load weights and optimizer state; each rank reads only its rows. Raises UserError for another model."""
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
