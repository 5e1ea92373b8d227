"""The kernels: dicts of functions of one signature, one of them a readable reference.

Which one is used is found by running it, forward and backward, on a small input of the run's shapes, type
and mask, and comparing it with the reference.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.config import ParallelConfig
from training.errors import UserError
from training.kernels.attention import (
    ATTENTION,
    Backend,
    Call,
    Seen,
    automatic,
    documents,
    limits,
    machine,
    why_not,
)
from training.kernels.experts import EXPERTS, ExpertKernel, plan
from training.kernels.loss import LOSS

__all__ = ["ATTENTION", "EXPERTS", "LOSS", "Backend", "Call", "Kernels", "Needs", "choose", "names"]

# Largest relative error (in the Euclidean norm) that is rounding and nothing else.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


class Kernels(NamedTuple):
    """The functions a model computes with. The defaults run everywhere."""

    attention: Backend | None = None  # None: what does everything that the model asks for
    experts: ExpertKernel = EXPERTS["loop"]
    loss: Callable[..., Tensor] = LOSS["chunked"]


class Needs(NamedTuple):
    """What a model asks of its kernels."""

    attention: frozenset[Call]
    experts: frozenset[tuple[int, int]]  # (channels, hidden channels) of the experts
    documents: bool  # packed documents do not see each other


class Trial(NamedTuple):
    """One thing that a kernel has to do: `run` takes the kernel and inputs, and returns the result."""

    run: Callable[..., Tensor]
    inputs: list[Tensor]  # differentiable, float32
    cannot: Callable[[str], str | None] = lambda _: None  # what is known without running

    def outcome(self, kernel: Any, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """The result and the gradients of all inputs, in float32."""
        inputs = [x.to(device, dtype).requires_grad_() for x in self.inputs]
        y = self.run(kernel, *inputs)
        direction = torch.linspace(-1, 1, y.numel(), device=device).to(dtype).view_as(y)  # fp16 cannot count so far
        return [x.detach().float() for x in (y, *torch.autograd.grad(y, inputs, direction))]

    def problem(self, name: str, kernel: Any, reference: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        """Run the kernel beside the reference in float32; None if they agree, else in words why not."""
        if cannot := self.cannot(name):
            return cannot
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is refused, PyTorch warns at length
                found = self.outcome(kernel, device, dtype)
        except Exception as error:  # of a package or a compiler, on a machine that nobody here has seen
            said = str(error).splitlines() or [type(error).__name__]
            return f"it does not run here: {said[0].rstrip('.')}"
        rounded = self._replace(inputs=[x.to(dtype).float() for x in self.inputs])
        expected = rounded.outcome(reference, device, torch.float32)
        errors = [(x - y).norm() / (y.norm() + 1e-6) for x, y in zip(found, expected, strict=True)]
        worst = float(torch.stack(errors).max())  # NaN where one is
        return None if worst <= TOLERANCE[dtype] else f"it differs from the reference by {worst:.0e}"


def _attention_trial(call: Call, needs: Needs, device: torch.device, dtype: torch.dtype, compiled: bool) -> Trial:
    """A batch of two, each of two documents, with a window that bites."""
    n_tokens = 128  # of a few keys, gradients of their scores would be rounding and little else
    tokens_BT = torch.ones(2, n_tokens, dtype=torch.int64, device=device)
    tokens_BT[0, n_tokens // 3] = tokens_BT[1, n_tokens // 2] = 0
    window = None if call.window is None else max(2, min(call.window, n_tokens // 2))
    seen = Seen(n_tokens, n_tokens, device, window, documents(tokens_BT, 0) if needs.documents else None)

    def run(backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = torch.compile(backend.attend, backend="aot_eager") if compiled else backend.attend
        return attend(q, k, v, backend.mask(seen._replace(dtype=q.dtype)), scale=call.scale, softcap=call.softcap)

    heads = [(call.n_head, call.head_dim), (call.n_kv_head, call.head_dim), (call.n_kv_head, call.value_dim)]
    inputs = [_random(2, n, n_tokens, width, seed=seed) for seed, (n, width) in enumerate(heads)]
    return Trial(run, inputs, lambda name: why_not(name, call, needs.documents, machine(device), dtype))


def _experts_trial(width: int, hidden: int, device: torch.device, compiled: bool) -> Trial:
    """Tokens to two of four experts each, one of which gets none."""
    expert_NK = torch.tensor([[0, 3], [3, 1], [0, 1], [1, 0]], device=device).repeat(16, 1)
    rows = plan(expert_NK, 4)

    def layer(kernel: ExpertKernel, x_NC: Tensor, up: Tensor, gate: Tensor, down: Tensor, weight_NK: Tensor) -> Tensor:
        up_RF, gate_RF = kernel.up(x_NC, (up, gate), rows)
        return kernel.down(up_RF * gate_RF.tanh(), down, weight_NK.float(), rows)

    def run(kernel: ExpertKernel, *inputs: Tensor) -> Tensor:
        return (torch.compile(layer, backend="aot_eager") if compiled else layer)(kernel, *inputs)

    shapes = [(64, width), (4, hidden, width), (4, hidden, width), (4, width, hidden), (64, 2)]
    return Trial(run, [_random(*shape, seed=seed) for seed, shape in enumerate(shapes)])


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def choose(
    config: ParallelConfig,
    needs: Needs,
    *,
    device: torch.device,
    dtype: torch.dtype,
    before: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Kernels, dict[str, str]]:
    """The kernels for this device, type and what the model asks for, and for each the reason, in words.

    `auto` tries those named in `before` first: a run goes on with what it began with, and so in the same bits.
    With `compile` what runs has to compile as well; tracing alone tells, and is quick. Raises UserError where
    the kernel that was asked for does not do it.
    """
    here = machine(device)
    attention = [
        _attention_trial(call, needs, device, dtype, config.compile) for call in sorted(needs.attention, key=str)
    ]
    experts = [_experts_trial(*widths, device, config.compile) for widths in sorted(needs.experts)]
    chosen, why = {}, {}
    for option, kernels, automatically, trials in (
        ("attention", ATTENTION, automatic(here), attention),
        ("experts", EXPERTS, list(EXPERTS), experts),
    ):
        asked, refused = getattr(config, option), {}  # names by what their problem is
        first = before.get(option)
        automatically = sorted(automatically, key=lambda name: name != first)
        for name in automatically if asked == "auto" else [asked]:
            outcomes = (trial.problem(name, kernels[name], kernels["reference"], device, dtype) for trial in trials)
            if problem := next(filter(None, outcomes), None):
                refused.setdefault(problem, []).append(name)
                continue
            granted = "ran, and equals the reference" if asked == "auto" else "asked for"
            if kernels is ATTENTION and not limits(name, here).deterministic:
                granted += "; a restart does not repeat its gradients to the bit"
            if first is not None and name != first:
                granted += f"; it was {first} before"
            chosen[option], why[option] = kernels[name], f"{name} ({_said(refused) or granted})"
            break
        else:
            raise UserError(f"parallel.{option}: {_said(refused)}; use auto")
    return Kernels(**chosen), why


def names(kernels: Kernels) -> dict[str, str]:
    """What the chosen kernels are called."""
    registries = {"attention": (ATTENTION, kernels.attention), "experts": (EXPERTS, kernels.experts)}
    return {option: next(n for n in of if of[n] is chosen) for option, (of, chosen) in registries.items()}


def _said(refused: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(names)}: {problem}" for problem, names in refused.items())
