"""The kernels: each file is a dict of functions of one signature, one of them a readable reference.

Which one is used is found by running it, forward and backward, on a tiny input of the run's type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from training.config import ModelConfig, ParallelConfig
from training.errors import UserError
from training.kernels.attention import ATTENTION
from training.kernels.experts import EXPERTS
from training.kernels.loss import LOSS

__all__ = ["ATTENTION", "EXPERTS", "LOSS", "Kernels", "choose"]


class Kernels(NamedTuple):
    """The functions a model computes with. The defaults run everywhere."""

    attention: Callable[[Tensor, Tensor, Tensor], Tensor] = ATTENTION["sdpa"]
    experts: Callable[[Tensor, Tensor, Tensor], Tensor] = EXPERTS["loop"]
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = LOSS["chunked"]


def _failure(kernel: Callable[..., Tensor], differentiable: list[Tensor], *rest: Tensor) -> str | None:
    """Run the kernel forward and backward; None if it worked, else the first line of what went wrong."""
    try:
        inputs = [x.requires_grad_() for x in differentiable]
        y = kernel(*inputs, *rest)
        finite = [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]
        ok = all(bool(t.isfinite().all()) for t in finite)
        return None if ok else "its result is not finite"
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__


def _first_that_runs(
    name: str, config: ParallelConfig, kernels: dict, trials: list[list[Tensor]], *rest: Tensor
) -> tuple[Callable[..., Tensor], str]:
    """(kernel, its name and the reason) for the option parallel.`name`; it has to run all the trials."""
    asked, refused = getattr(config, name), []
    for candidate in kernels if asked == "auto" else [asked]:
        kernel = kernels[candidate]
        if config.compile:  # what runs as it is may not compile; tracing alone tells, and is quick
            kernel = torch.compile(kernel, backend="aot_eager")
        problems = [_failure(kernel, [x.clone() for x in trial], *rest) for trial in trials]
        problem = next(filter(None, problems), None)
        if problem is None:
            reason = "; ".join(refused) or ("asked for" if asked != "auto" else "ran forward and backward")
            return kernels[candidate], f"{candidate} ({reason})"
        refused.append(f"{candidate} does not run here: {problem}")
    raise UserError(f"parallel.{name}: {'; '.join(refused)}; use auto")


def choose(
    config: ParallelConfig, model: ModelConfig, *, device: torch.device, dtype: torch.dtype
) -> tuple[Kernels, dict[str, str]]:
    """The kernels for this device, type and the model's widths, and for each the reason, in words.

    Raises UserError where the kernel that was asked for does not run.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    qkv = [random(1, 2, 16, model.n_embd // model.n_head) for _ in range(3)]
    attention, attention_why = _first_that_runs("attention", config, ATTENTION, [qkv])
    hidden = {block.ffn.hidden or 4 * model.n_embd for block in model.blocks if block.ffn.type == "moe"}
    widths = [pair for width in hidden for pair in ((model.n_embd, width), (width, model.n_embd))]
    trials = [[random(32, inputs), random(2, outputs, inputs)] for inputs, outputs in widths]
    experts, experts_why = _first_that_runs("experts", config, EXPERTS, trials, torch.tensor([20, 12], device=device))
    return Kernels(attention, experts), {"attention": attention_why, "experts": experts_why}
