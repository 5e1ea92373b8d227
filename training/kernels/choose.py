"""The kernels: dicts of functions of one signature, one of them a readable reference.

Which one is used is found by running it, forward and backward, on a small input of the run's shapes, type
and mask, and comparing it with the reference; of experts on a GPU then by the time it takes on a larger one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.config import ParallelConfig
from training.errors import UserError
from training.kernels.attention.table import (
    ATTENTION_BACKENDS,
    AttentionBackend,
    AttentionSpec,
    Visibility,
    auto_candidates,
    device_info,
    find_documents,
    limits_on,
    reason_unsupported,
)
from training.kernels.experts import TORCH_EXPERTS, Dispatch, ExpertKernel, sort_by_expert
from training.kernels.loss import TORCH_LOSS, chunked_cross_entropy

__all__ = [
    "ATTENTION_BACKENDS",
    "EXPERT_KERNELS",
    "LOSS_KERNELS",
    "TORCH_LOSS",
    "AttentionBackend",
    "AttentionSpec",
    "ExpertsSpec",
    "KernelRequirements",
    "Kernels",
    "LossSpec",
    "choose_kernels",
    "kernel_names",
]

# Largest relative error (in the Euclidean norm) that is rounding and nothing else.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
# Of fewer keys, gradients of their scores would be rounding and little else; on a CPU more are computed in another way.
TRIED_TOKENS = {"cpu": (128, 256)}
TRIED_ELSEWHERE = (128,)
TIMED_ON = ("cuda",)  # types of devices where kernels of experts are told apart by time: elsewhere by their order
TIMED_TOKENS = 4096
ELSEWHERE = "it runs on CUDA devices"


def _triton_up(x_NC: Tensor, w_EFC: tuple[Tensor, ...], dispatch: Dispatch) -> tuple[Tensor, ...]:
    from training.kernels.triton_experts import TRITON

    return TRITON.up(x_NC, w_EFC, dispatch)


def _triton_down(h_RF: Tensor, w_ECF: Tensor, weight_NK: Tensor, dispatch: Dispatch) -> Tensor:
    from training.kernels.triton_experts import TRITON

    return TRITON.down(h_RF, w_ECF, weight_NK, dispatch)


def _triton_loss(x_NC: Tensor, w_VC: Tensor, targets_N: Tensor, softcap: float | None = None) -> Tensor:
    from training.kernels.triton_loss import triton_logits_backward

    return chunked_cross_entropy(triton_logits_backward, x_NC, w_VC, targets_N, softcap)


EXPERT_KERNELS = {"triton": ExpertKernel(_triton_up, _triton_down)} | TORCH_EXPERTS
LOSS_KERNELS = {"triton": _triton_loss} | TORCH_LOSS


class Kernels(NamedTuple):
    """The functions a model computes with. The defaults run everywhere."""

    attention: AttentionBackend | None = None  # None: what does everything that the model asks for
    experts: ExpertKernel = TORCH_EXPERTS["loop"]  # names that an exported file has as well
    loss: Callable[..., Tensor] = TORCH_LOSS["chunked"]


class ExpertsSpec(NamedTuple):
    """What a layer asks of its experts' kernel."""

    width: int
    hidden: int
    n_experts: int = 4
    top_k: int = 2
    gated: bool = True


class LossSpec(NamedTuple):
    """What the head asks of the loss."""

    width: int
    n_vocab: int
    softcap: float | None = None


class KernelRequirements(NamedTuple):
    """What a model asks of its kernels."""

    attention: frozenset[AttentionSpec]
    experts: frozenset[ExpertsSpec]
    documents: bool  # packed documents do not see each other
    loss: frozenset[LossSpec] = frozenset()


class Trial(NamedTuple):
    """One thing that a kernel has to do: `run` takes the kernel and inputs, and returns the result."""

    run: Callable[..., Tensor]
    inputs: list[Tensor]  # differentiable, float32
    cannot: Callable[[str], str | None] = lambda _: None  # what is known without running

    def outcome(self, kernel: Any, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """The result and the gradients of all inputs, in float32."""
        return [x.detach().float() for x in self._pass(kernel, self._leaves(device, dtype))]

    def seconds(self, kernel: Any, device: torch.device, dtype: torch.dtype) -> float:
        """Of a forward and a backward, in the best of some rounds; where it waits for the device is in it."""
        leaves, wait = self._leaves(device, dtype), torch.cuda.synchronize if device.type == "cuda" else lambda: None

        def round_of(n: int) -> float:
            wait()
            start = time.perf_counter()
            for _ in range(n):
                self._pass(kernel, leaves)
            wait()
            return (time.perf_counter() - start) / n

        round_of(1)  # compiles
        return min(round_of(5) for _ in range(5))

    def _leaves(self, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        return [x.to(device, dtype).requires_grad_() for x in self.inputs]

    def _pass(self, kernel: Any, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        y = self.run(kernel, *leaves)
        direction = torch.linspace(-1, 1, y.numel(), device=y.device).to(y.dtype).view_as(y)  # fp16 cannot count so far
        return y, *torch.autograd.grad(y, leaves, direction)

    def problem(self, name: str, kernel: Any, reference: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        """Run the kernel beside the reference in float32; None if they agree, else in words why not."""
        if cannot := self.cannot(name):
            return cannot
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what is refused, PyTorch warns at length
                found = self.outcome(kernel, device, dtype)
            rounded = self._replace(inputs=[x.to(dtype).float() for x in self.inputs])
            expected = rounded.outcome(reference, device, torch.float32)
        except Exception as error:  # of a package or a compiler, on a machine that nobody here has seen
            said = str(error).splitlines() or [type(error).__name__]
            return f"it does not run here: {said[0].rstrip('.')}"
        errors = [(x - y).norm() / (y.norm() + 1e-6) for x, y in zip(found, expected, strict=True)]
        worst = float(torch.stack(errors).max())  # NaN where one is
        return None if worst <= TOLERANCE[dtype] else f"it differs from the reference by {worst:.0e}"


def _attention_trial(
    spec: AttentionSpec,
    n_tokens: int,
    needs: KernelRequirements,
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
) -> Trial:
    """A batch of two, each of two documents, with a window that bites."""
    tokens_BT = torch.ones(2, n_tokens, dtype=torch.int64, device=device)
    tokens_BT[0, n_tokens // 3] = tokens_BT[1, n_tokens // 2] = 0
    window = None if spec.window is None else max(2, min(spec.window, n_tokens // 2))
    visibility = Visibility(
        n_tokens, n_tokens, device, window, find_documents(tokens_BT, 0) if needs.documents else None
    )

    def run(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = torch.compile(backend.attend, backend="aot_eager") if compiled else backend.attend
        return attend(
            q, k, v, backend.build_mask(visibility._replace(dtype=q.dtype)), scale=spec.scale, softcap=spec.softcap
        )

    heads = [(spec.n_head, spec.head_dim), (spec.n_kv_head, spec.head_dim), (spec.n_kv_head, spec.value_dim)]
    inputs = [_random(2, n, n_tokens, width, seed=seed) for seed, (n, width) in enumerate(heads)]
    return Trial(run, inputs, lambda name: reason_unsupported(name, spec, needs.documents, device_info(device), dtype))


def _experts_trial(spec: ExpertsSpec, topk_ids_NK: Tensor, dtype: torch.dtype, compiled: bool) -> Trial:
    """Tokens to their experts and back, at the layer's widths."""
    rows, device = sort_by_expert(topk_ids_NK, spec.n_experts), topk_ids_NK.device

    def layer(kernel: ExpertKernel, x_NC: Tensor, weight_NK: Tensor, down: Tensor, *ups: Tensor) -> Tensor:
        up_RF, *gate_RF = kernel.up(x_NC, ups, rows)
        return kernel.down(up_RF * gate_RF[0].tanh() if gate_RF else up_RF, down, weight_NK.float(), rows)

    def run(kernel: ExpertKernel, *inputs: Tensor) -> Tensor:
        return (torch.compile(layer, backend="aot_eager") if compiled else layer)(kernel, *inputs)

    def cannot(name: str) -> str | None:
        if not _is_for(name, device):
            return ELSEWHERE
        return "compiled, it is for bf16 alone" if name == "grouped" and compiled and dtype != torch.bfloat16 else None

    n_experts, width, hidden = spec.n_experts, spec.width, spec.hidden
    shapes = [(len(topk_ids_NK), width), topk_ids_NK.shape, (n_experts, width, hidden)]
    shapes += [(n_experts, hidden, width)] * (1 + spec.gated)
    return Trial(run, [_random(*shape, seed=seed, device=device) for seed, shape in enumerate(shapes)], cannot)


def _small_trial(spec: ExpertsSpec, device: torch.device, dtype: torch.dtype, compiled: bool) -> Trial:
    """Tokens to two of four experts each, one of which gets none."""
    topk_ids_NK = torch.tensor([[0, 3], [3, 1], [0, 1], [1, 0]], device=device).repeat(16, 1)
    return _experts_trial(spec._replace(n_experts=4, top_k=2, gated=True), topk_ids_NK, dtype, compiled)


def _large_trial(spec: ExpertsSpec, device: torch.device, dtype: torch.dtype) -> Trial:
    """As many tokens as tell how fast a kernel is, to as many experts as the layer has, evenly by chance."""
    score_NE = _random(TIMED_TOKENS, spec.n_experts, seed=0, device=device)
    return _experts_trial(spec, score_NE.topk(spec.top_k).indices, dtype, compiled=False)


def _loss_trial(spec: LossSpec, device: torch.device) -> Trial:
    """A few tokens, some of which are not counted; of a large vocabulary a part that takes more than one round."""
    n_tokens, n_vocab = 24, min(spec.n_vocab, 9000)
    targets_N = torch.arange(n_tokens, device=device) * (n_vocab // n_tokens)
    targets_N[::5] = -1

    def run(kernel: Callable[..., Tensor], x_NC: Tensor, w_VC: Tensor) -> Tensor:
        return kernel(x_NC, w_VC, targets_N, spec.softcap)

    inputs = [_random(n, spec.width, seed=seed, device=device) for seed, n in enumerate((n_tokens, n_vocab))]
    inputs[1] *= spec.width**-0.5
    return Trial(run, inputs, lambda name: None if _is_for(name, device) else ELSEWHERE)


def _experts_in_order(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Those that could run there, in the order in which `auto` tries them."""
    # On a CPU the loop alone rounds numbers of 16-bit rows, which there makes experts twice as fast.
    loop_first = device.type == "cpu" and dtype.itemsize == 2
    return sorted(
        (name for name in EXPERT_KERNELS if _is_for(name, device)), key=lambda name: loop_first and name != "loop"
    )


def _is_for(name: str, device: torch.device) -> bool:
    """Whether a kernel of experts, or of the loss, could run there."""
    return name != "triton" or device.type == "cuda"


def _random(*shape: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def choose_kernels(
    config: ParallelConfig,
    needs: KernelRequirements,
    *,
    device: torch.device,
    dtype: torch.dtype,
    previous: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Kernels, dict[str, str]]:
    """The kernels for this device, type and what the model asks for, and for each the reason, in words.

    `auto` tries those named in `previous` first: a run goes on with what it began with, and so in the same bits. Of
    experts' kernels that do it, a run that begins on a GPU takes the fastest.
    With `compile` what runs has to compile as well; tracing alone tells, and is quick. Raises UserError where
    the kernel that was asked for does not do it.
    """
    here = device_info(device)
    attention = [
        _attention_trial(spec, n_tokens, needs, device, dtype, config.compile)
        for spec in sorted(needs.attention, key=str)
        for n_tokens in TRIED_TOKENS.get(device.type, TRIED_ELSEWHERE)
    ]
    experts = [_small_trial(spec, device, dtype, config.compile) for spec in sorted(needs.experts)]
    loss = [_loss_trial(spec, device) for spec in needs.loss]
    chosen, why = {}, {}
    for option, kernels, automatically, trials in (
        ("attention", ATTENTION_BACKENDS, auto_candidates(here), attention),
        ("experts", EXPERT_KERNELS, _experts_in_order(device, dtype), experts),
        ("loss", LOSS_KERNELS, [name for name in LOSS_KERNELS if _is_for(name, device)], loss),
    ):
        asked, first = getattr(config, option), previous.get(option)
        refused: dict[str, list[str]] = {}  # names by what their problem is
        automatically = sorted(automatically, key=lambda name: name != first)
        able = _able(automatically if asked == "auto" else [asked], kernels, trials, device, dtype, refused)
        if (name := next(able, None)) is None:
            raise UserError(f"parallel.{option}: {_said(refused)}; use auto")
        granted, timed = "ran, and equals the reference" if asked == "auto" else "asked for", ""
        if kernels is EXPERT_KERNELS and trials and name != first and device.type in TIMED_ON:
            name, timed = _fastest([name, *able], needs, device, dtype)
        if kernels is ATTENTION_BACKENDS and not limits_on(name, here).deterministic:
            granted += "; a restart does not repeat its gradients to the bit"
        if first is not None and name != first:
            granted += f"; it was {first} before"
        reason = "; ".join(filter(None, (_said(refused), timed))) or granted
        chosen[option], why[option] = kernels[name], f"{name} ({reason})"
    return Kernels(**chosen), why


def _able(
    names: list[str],
    kernels: Mapping[str, Any],
    trials: list[Trial],
    device: torch.device,
    dtype: torch.dtype,
    refused: dict[str, list[str]],
) -> Iterator[str]:
    """Those of the kernels that pass every trial, one after the other; the names of the rest are put into `refused`."""
    for name in names:
        outcomes = (trial.problem(name, kernels[name], kernels["reference"], device, dtype) for trial in trials)
        if problem := next(filter(None, outcomes), None):
            refused.setdefault(problem, []).append(name)
        else:
            yield name


def _fastest(able: list[str], needs: KernelRequirements, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The kernel of experts that takes the least time over all widths, and in words how long each took."""
    rivals = [name for name in able if name != "reference"]  # which does the work of all experts for each row
    if len(rivals) < 2:
        return able[0], ""
    trials = [_large_trial(spec, device, dtype) for spec in sorted(needs.experts)]
    taken = {name: sum(trial.seconds(EXPERT_KERNELS[name], device, dtype) for trial in trials) for name in rivals}
    if device.type == "cuda":  # what this took is no memory of the run
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    ordered = sorted(taken, key=taken.__getitem__)
    return ordered[0], "the fastest: " + ", ".join(f"{name} {1e3 * taken[name]:.2f} ms" for name in ordered)


def kernel_names(kernels: Kernels) -> dict[str, str]:
    """What the chosen kernels are called."""
    registries = {"attention": ATTENTION_BACKENDS, "experts": EXPERT_KERNELS, "loss": LOSS_KERNELS}
    chosen = kernels._asdict()
    return {option: next(n for n in of if of[n] is chosen[option]) for option, of in registries.items()}


def _said(refused: dict[str, list[str]]) -> str:
    return "; ".join(f"{', '.join(names)}: {problem}" for problem, names in refused.items())
