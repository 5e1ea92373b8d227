"""Activation checkpointing: recompute a block's forward during backward (arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Selective recomputation saves the results of these operators, matmuls and attention, because they take most of the
# time. The custom operators of kernels/ are named after the module that defines them.
SAVED_OPERATORS = {
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm"),
    *("training_kernels_experts::loop_matmul", "training_kernels_triton_experts::gather_matmul"),
    *("training_kernels_triton_experts::matmul_scatter", "training_kernels_attention_deterministic::flash"),
    *("aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention"),
    *("aten::_scaled_dot_product_cudnn_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"),
    *("flash_attn::_flash_attn_forward", "flash_attn_3::fwd"),
}


def with_recompute(forward: Callable, mode: str) -> Callable:
    """Return `forward` with activation checkpointing.

    `mode` "full" saves only the inputs; "selective" also saves the results of SAVED_OPERATORS.
    """
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # blocks use no generator
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    return lambda *inputs: checkpoint(forward, *inputs, **options)


def _policy(_context: object, operator: Any, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    is_saved = operator.name().partition(".")[0] in SAVED_OPERATORS
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE
