"""Branches: a run that goes on from another run's checkpoint with other options.

It has the parent's weights, optimizer state, step and position in the data, and a copy of its rows up to there. Its
lineage is in its checkpoints and in summary.json. Once it has a checkpoint of its own it no longer needs the parent.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training import checkpoint
from training.config import Config
from training.data import Dataset, Tokenizer
from training.engine.changes import changed_options
from training.engine.longer import parse_options
from training.engine.state import Ancestor, TrainState
from training.errors import UserError
from training.files import read_bytes
from training.optim.batch_schedule import BatchSchedule
from training.weights.hf.architecture import BALANCING

# Options of the model that may change, as they do not change what its weights mean.
FREE_IN_MODEL = BALANCING | {"dropout", "isolate_documents"}
N_LISTED = 4  # changed options in a line


def run_of(path: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to."""
    return path.parent.parent


def check_own(config: Config, branch: str, own: Path) -> str:
    """Return a line for a branch that resumes from its own checkpoint. Raises UserError for another run."""
    lineage = checkpoint.read_state(own).get("lineage")
    if not is_branch_of(lineage, branch):
        holds = f"a branch of {lineage[-1]['run']}" if lineage else "a run that is no branch"
        raise UserError(f"--branch {branch}: {config.run_dir} holds {holds}; choose another --name")
    return f"{config.run_dir}: resuming from its own {own.name}; it branched off at step {lineage[-1]['step']}"


def is_branch_of(lineage: Sequence[Mapping[str, Any]] | None, branch: str) -> bool:
    """Return True if a run with this lineage branched off from the run or checkpoint at `branch`."""
    parents = {Path(branch).resolve().name, run_of(Path(branch).resolve()).name}
    return bool(lineage) and Path(lineage[-1]["run"]).name in parents


def start_branch(config: Config, dataset: Dataset, path: Path, state: TrainState) -> None:
    """Turn the state of the parent's checkpoint at `path` into that of a branch with a resolved `config`.

    Raises UserError if an option differs that the weights, the optimizer's state or the position in the data rest on.
    """
    run = run_of(path)
    old = parse_options(state.config)
    if old is None:
        raise UserError(f"--branch {path}: its options are not those of this version")
    is_same_data = dataset.is_same_as(state.data)
    changes = changed_options(
        old, config, ignored={"init_from", "upcycle_noise"} | ({"data"} if is_same_data else set())
    )
    keeps_position = BatchSchedule.of(old).tokens(state.step) == BatchSchedule.of(config).tokens(state.step)
    if fixed := [name for name in changes if is_fixed(name, keeps_position)]:
        listed = describe_changes({name: changes[name] for name in fixed})
        reason = "a branch keeps the model, the type of the optimizer and the batches before it"
        raise UserError(f"--branch {path}: {reason}, but {listed}; leave them as they are")
    if frozen_patterns(old) != frozen_patterns(config):
        raise UserError(
            f"--branch {path}: a branch keeps which weights are frozen; leave freeze in optim.groups as it is"
        )
    if (run / "tokenizer").is_dir() and not has_same_tokens(Tokenizer.load(run / "tokenizer"), dataset.tokenizer):
        raise UserError(
            f"--branch {path}: data.tokenizer gives other tokens than {run / 'tokenizer'}, which it learned"
        )
    if not is_same_data and not any(name.startswith("data") for name in changes):
        changes["data"] = (state.data[:12], dataset.fingerprint[:12])
    sha256 = hashlib.sha256(read_bytes(path / checkpoint.MANIFEST)).hexdigest()
    state.lineage.append(
        Ancestor(
            run=str(run), step=state.step, checkpoint_sha256=sha256, changes={k: list(v) for k, v in changes.items()}
        )
    )
    state.best = None  # its checkpoint is the parent's


def frozen_patterns(config: Config) -> list[tuple[str, bool]]:
    """Return the patterns of `optim.groups`, if some freeze weights, each with True if it does."""
    patterns = [(group.match, group.freeze) for group in config.optim.groups]
    return patterns if any(freeze for _, freeze in patterns) else []


def is_fixed(name: str, keeps_position: bool) -> bool:
    """Return True for an option, by its dotted name, that a branch has to keep."""
    if name.startswith("model."):
        return name.rpartition(".")[2] not in FREE_IN_MODEL
    return name == "optim.type" or (name.startswith("batch_") and not keeps_position)


def has_same_tokens(tokenizer: Tokenizer, other: Tokenizer) -> bool:
    """Return True if two tokenizers have the same numbered tokens and end of text."""
    return tokenizer.end_of_text == other.end_of_text and tokenizer.inner.get_vocab() == other.inner.get_vocab()


def describe_changes(changes: dict[str, tuple[Any, Any] | list[Any]]) -> str:
    """Return changed options on one line, at most N_LISTED of them."""
    listed = [f"{name}: {old} -> {new}" for name, (old, new) in changes.items()]
    more = [f"{len(listed) - N_LISTED} more"] if len(listed) > N_LISTED else []
    return "; ".join(listed[:N_LISTED] + more)


def describe_lineage(lineage: list[Ancestor]) -> str:
    """Return where a run branched off, and with which options; "" for a run that is no branch."""
    if not lineage:
        return ""
    last, before = lineage[-1], [f"{one['run']} at step {one['step']:,}" for one in lineage[-2::-1]]
    changes = describe_changes(last["changes"])
    where = f"{last['run']} at step {last['step']:,}" + f" ({changes})" * bool(changes)
    return ", before that ".join([where, *before])
