"""Weights & Biases, if `logging.wandb` is set. Its own process sends the rows: training never waits for the network.

An option that is null leaves the choice to W&B's environment variables and settings file.
"""

import json
import os
import re
import struct
import uuid
import zlib
from collections.abc import Iterator
from glob import escape
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from training.config import LoggingConfig, WandbConfig
from training.errors import UserError
from training.files import ensure_folder, read_bytes, write_atomically
from training.logging.heat_map import draw_heat_map, should_draw
from training.logging.jsonl import read_rows
from training.logging.metrics import LOAD_IMAGE, expert_load, scalars
from training.logging.sinks import RunInfo, Sink
from training.terminal import print_note

FINISH_TIMEOUT_S = 120  # rows not sent by then stay on disk for `wandb sync`
BLOCK_BYTES = 2**15  # of W&B's file, LevelDB's log format: github.com/google/leveldb/blob/main/doc/log_format.md
TAIL_BYTES = 2**20  # at the end of W&B's file that a start reads first for its last step
DEFAULT_PROJECT = "training"
# dryrun and run are W&B's old names of offline and online.
ENVIRONMENT_MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")


def open_sink(run: RunInfo, config: LoggingConfig) -> Sink:
    """Open W&B, or a sink that drops all rows if it is disabled."""
    mode, reason = find_mode(config.wandb)
    if mode == "disabled":
        print_note(f"Weights & Biases: disabled by {reason}; nothing is logged to it")
        return DisabledSink()
    return WandbSink(run, config.wandb, config.histogram_every)


def find_mode(config: WandbConfig) -> tuple[str | None, str]:
    """Return (mode, the option or variable that sets it); (None, ""): W&B's default. Raises UserError.

    WANDB_DISABLED is a variable of Transformers, which W&B itself no longer reads.
    """
    if config.mode is not None:
        return config.mode, "logging.wandb.mode"
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "on", "yes", "true"):
        return "disabled", "WANDB_DISABLED"
    if (mode := os.environ.get("WANDB_MODE")) and mode not in ENVIRONMENT_MODES:
        raise UserError(f"WANDB_MODE: {mode!r} is not one of {', '.join(ENVIRONMENT_MODES)}")
    return (mode, "WANDB_MODE") if mode else (None, "")


class DisabledSink(Sink):
    """A sink that drops all rows."""

    def write(self, rows: list[dict]) -> None:
        pass


class WandbSink(Sink):
    """Logs to one W&B run over all restarts; W&B cannot drop rows, so a repeated step is not logged again.

    W&B's own process holds rows in memory, and kill -9 loses them. So a start asks W&B, or its files if it is offline,
    for the last step, and logs the rows after it again from metrics.jsonl.
    """

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
        new_id = os.environ.get("WANDB_RUN_ID") or f"{run.name[:32]}-{uuid.uuid4().hex[:8]}"
        self.id, self.step = new_id, 0
        if is_restart := self.marker.exists():
            try:
                state = json.loads(read_bytes(self.marker))
                if not re.fullmatch(r"[^/\\#?%:\0-\x1f]{1,128}", state["id"]):  # W&B's own limits
                    raise ValueError(state["id"])
                self.id, self.step = state["id"], min(int(state.get("has_steps_to", 0)), run.steps)
            except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
                print_note(f"{self.marker}: no valid W&B run id; starting a new W&B run")
        self._save_marker()
        folder = Path(os.environ.get("WANDB_DIR") or run.dir)
        ensure_folder(folder / "wandb")
        self.run = _init(wandb, config, run, self.id, folder)
        if self.run.offline:
            files = (folder / "wandb").glob(f"*run-*-{escape(self.id)}/run-{escape(self.id)}.wandb")
            logged = [last_step(path, limit=run.steps) for path in files]
            self.step = max([self.step, *logged])  # the files may have been uploaded and removed
        else:
            self.step = max(0, self.run.step - 1)
        self._save_marker()
        before = self.step
        if before > run.start_step and not is_restart:
            print_note(f"Weights & Biases: its run {self.id} has steps to {before}; only later ones are logged to it")
        for row in read_rows(run.dir / "metrics.jsonl", after=before):
            self.write([row])
        if self.step > before:
            lost = f"logged steps {before + 1} to {self.step} from metrics.jsonl"
            print_note(f"Weights & Biases: {lost}, as its run {self.id} did not have them")

    def write(self, rows: list[dict]) -> None:
        for row in rows:
            if row["step"] <= self.step:
                continue
            values: dict[str, Any] = dict(scalars(row, self.moe_layers))
            if should_draw(row, self.histogram_every, self.steps):
                values[LOAD_IMAGE] = self.wandb.Image(draw_heat_map(expert_load(row, self.moe_layers)))
            if row.get("samples"):
                data = [[row["step"], sample["prompt"], sample["text"]] for sample in row["samples"]]
                values["samples"] = self.wandb.Table(columns=["step", "prompt", "text"], data=data)
            self.run.log(values, step=row["step"], commit=True)
            self.step = row["step"]

    def close(self, summary: dict | None) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        if summary is not None:
            self.run.summary.update({key: value for key, value in summary.items() if key != "next"})
        self.run.finish(exit_code=0 if summary is not None else 1)
        self._save_marker()

    def _save_marker(self) -> None:
        """Store the run's id, and the last step: call it only if W&B's process has written all up to that."""
        write_atomically(self.marker, json.dumps({"id": self.id, "has_steps_to": self.step}) + "\n")


def _init(wandb: Any, config: WandbConfig, run: RunInfo, run_id: str, folder: Path) -> Any:
    """Start or resume the W&B run, offline without a network. Raises UserError without a valid API key."""
    mode, reason = find_mode(config)
    os.environ.pop("WANDB_SERVICE", None)  # of a parent: a killed run would stay "in use" there until the parent ends
    try:
        theirs = wandb.setup(settings=wandb.Settings(silent=True)).settings
    except ValidationError as error:  # of a variable such as WANDB_INIT_TIMEOUT
        problem = error.errors()[0]
        name = f"WANDB_{problem['loc'][0]}".upper()
        raise UserError(f"{name}: {problem['input']!r}: {problem['msg']}") from error
    lineage = {"lineage": run.facts["lineage"]} if run.facts.get("lineage") else {}
    options = {"project": config.project or theirs.project or DEFAULT_PROJECT, "entity": config.entity, "id": run_id}
    options |= {"name": theirs.run_name or run.name, "resume": "allow", "config": run.config | lineage}
    options |= {"group": config.group, "tags": list(config.tags) or None, "notes": config.notes, "dir": str(folder)}
    options["settings"] = wandb.Settings(silent=True, console="off", finish_timeout=FINISH_TIMEOUT_S)
    try:
        started = wandb.init(mode=mode, **options)
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        remedy = "Run `wandb login`, set WANDB_API_KEY, or pass --logging.wandb.mode offline"
        raise UserError(f"Weights & Biases: {str(error).splitlines()[0]} {remedy}") from error
    except wandb.errors.CommError as error:
        problem = f"does not answer ({str(error).splitlines()[0]}); logging offline to {folder}/wandb"
        print_note(f"Weights & Biases {problem}, upload it with `wandb sync`")
        wandb.teardown()  # its process still holds the run's id
        return wandb.init(mode="offline", **options)
    by = f" by {reason}" if reason else ""
    where = started.url or f"{folder}/wandb"
    print_note(f"Weights & Biases: {started.settings.mode}{by}, project {options['project']}, {where}")
    return started


def last_step(path: Path, limit: int) -> int:
    """Return the last step, at most `limit`, that W&B's process has written to its file; 0 if there is none."""
    from google.protobuf.message import DecodeError
    from wandb.proto.wandb_internal_pb2 import Record

    n_bytes = TAIL_BYTES
    while True:
        try:
            start = max(0, path.stat().st_size - n_bytes) // BLOCK_BYTES * BLOCK_BYTES
            records = list(_records(path, start))
        except OSError as error:
            print_note(f"{path}: {error.strerror}; its steps are logged to Weights & Biases again")
            return 0
        for record in reversed(records):
            try:
                parsed = Record.FromString(record)
            except DecodeError:  # damaged
                continue
            if parsed.HasField("history") and parsed.history.step.num <= limit:
                return parsed.history.step.num
        if start == 0:
            return 0
        n_bytes *= 4


def _records(path: Path, start: int) -> Iterator[bytes]:
    """Yield the complete records from byte `start` on, a multiple of BLOCK_BYTES; the first block has a header."""
    with path.open("rb") as file:
        file.seek(start)
        data, record = file.read(), None
    at = 0 if start else 7
    while at + 7 <= len(data):
        left = BLOCK_BYTES - at % BLOCK_BYTES
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        is_intact = 1 <= kind <= 4 and length + 7 <= left and checksum == zlib.crc32(data[at + 6 : at + 7 + length])
        if left < 7 or not is_intact:  # padding or damage: go on at the next block
            at, record = at + left, None if left >= 7 else record
            continue
        part, at = data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 2):  # a whole record, or its first part
            record = part
        elif record is not None:
            record += part
        if kind in (1, 4) and record is not None and at <= len(data):
            yield record
            record = None
