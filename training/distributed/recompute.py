"""Activation checkpointing: recompute a block's forward during backward (arXiv:1604.06174)."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from training.kernels.table import saved_operators

# Operators whose results "selective" saves: matmuls and kernels, which take most of the time.
SAVED_OPERATORS = {"aten::mm", "aten::addmm", "aten::bmm"} | saved_operators()


def with_recompute(forward: Callable, mode: str) -> Callable:
    """Return `forward` with activation checkpointing.

    Mode "full" saves only the inputs; "selective" also saves the results of SAVED_OPERATORS.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # blocks use no global random state
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return lambda *inputs: checkpoint(forward, *inputs, **options)


def _policy(_context: object, operator: Any, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    is_saved = operator.name().partition(".")[0] in SAVED_OPERATORS
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE
