"""Trials: small problems with the model's shapes, dtype and masks, on which a kernel must match its reference."""

import timeit
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.kernels.attention.masks import Visibility, find_documents
from training.kernels.attention.table import device_info, reason_unsupported
from training.kernels.experts import ExpertKernel, sort_by_expert
from training.kernels.interface import AttentionBackend, AttentionSpec, ExpertsSpec, KernelRequirements, LossSpec
from training.kernels.table import reason_needs_cuda

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # max relative error (Euclidean norm)
TIMED_TOKENS = 4096


class Trial(NamedTuple):
    """A problem on which a kernel must match its reference."""

    run: Callable[..., Tensor]  # takes the kernel and the inputs, returns the result
    inputs: list[Tensor]  # in the dtype of the run; gradients of all of them are compared
    unsupported: Callable[[str], str | None]  # name -> why the kernel cannot run, or None

    def failure(self, name: str, table: Mapping[str, Any]) -> str | None:
        """Run the kernel, and the reference in float32. Return why the kernel fails, or None."""
        if reason := self.unsupported(name):
            return reason
        try:
            with warnings.catch_warnings(action="ignore"):  # PyTorch warns about each of its kernels that it rejects
                results = self._outcome(table[name], self.inputs)
            expected = self._outcome(table["reference"], [x.float() for x in self.inputs])
        except Exception as error:  # third-party kernels may fail in any way on hardware we have not tested
            lines = str(error).splitlines() or [type(error).__name__]
            return f"fails here: {lines[0].rstrip('.')}"
        errors = [(x.float() - y).norm() / (y.norm() + 1e-6) for x, y in zip(results, expected, strict=True)]
        worst = float(torch.stack(errors).max())  # NaN if any error is NaN
        return None if worst <= TOLERANCE[self.inputs[0].dtype] else f"differs from the reference by {worst:.0e}"

    def seconds(self, kernel: Any) -> float:
        """Return the seconds of one forward and backward: the minimum of 5 rounds, each the mean of 5 calls."""
        synchronize = torch.cuda.synchronize if self.inputs[0].is_cuda else lambda: None

        def round_of_5() -> None:
            for _ in range(5):
                self._outcome(kernel, self.inputs)
            synchronize()

        round_of_5()  # compiles
        return min(timeit.repeat(round_of_5, number=1, repeat=5)) / 5

    def _outcome(self, kernel: Any, inputs: list[Tensor]) -> list[Tensor]:
        """Return the result and the gradients of all inputs."""
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = self.run(kernel, *leaves)
        # in float32: the indices inside linspace overflow fp16
        direction = torch.linspace(-1, 1, y.numel(), device=y.device).to(y.dtype).view_as(y)
        return [y.detach(), *torch.autograd.grad(y, leaves, direction)]


def build_trials(
    option: str, requirements: KernelRequirements, device: torch.device, dtype: torch.dtype, compiled: bool
) -> list[Trial]:
    """Return the trials of `parallel.<option>` for all layers of the model."""
    if option == "loss":
        return [_loss_trial(spec, device, dtype) for spec in requirements.loss]
    if option == "experts":  # 64 tokens, top 2 of 4 experts; one expert has no tokens
        topk_ids_NK = torch.tensor([[0, 3], [3, 1], [0, 1], [1, 0]], device=device).repeat(16, 1)
        specs = [spec._replace(n_experts=4, top_k=2, gated=True) for spec in sorted(requirements.experts)]
        return [_experts_trial(spec, topk_ids_NK, dtype, compiled) for spec in specs]
    # Score gradients of fewer keys are mostly rounding error. On a CPU, more than 192 keys run different code.
    return [
        _attention_trial(spec, n_tokens, requirements.isolate_documents, device, dtype, compiled)
        for spec in sorted(requirements.attention, key=str)
        for n_tokens in ((128, 256) if device.type == "cpu" else (128,))
    ]


def time_experts(
    kernels: Mapping[str, ExpertKernel], requirements: KernelRequirements, device: torch.device, dtype: torch.dtype
) -> dict[str, float]:
    """Return each kernel's seconds on 4096 tokens, routed at random, summed over the model's expert layers."""
    seconds = dict.fromkeys(kernels, 0.0)
    for spec in sorted(requirements.experts):
        topk_ids_NK = _random(TIMED_TOKENS, spec.n_experts, seed=0, device=device).topk(spec.top_k).indices
        trial = _experts_trial(spec, topk_ids_NK, dtype, compiled=False)
        for name, kernel in kernels.items():
            seconds[name] += trial.seconds(kernel)
    if device.type == "cuda":  # so that the run's memory statistics exclude the timing
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return seconds


def _attention_trial(
    spec: AttentionSpec, n_tokens: int, documents: bool, device: torch.device, dtype: torch.dtype, compiled: bool
) -> Trial:
    """Return a trial of two samples with two documents each, and a window of at most half a sample."""
    tokens_BT = torch.ones(2, n_tokens, dtype=torch.int64, device=device)
    tokens_BT[0, n_tokens // 3] = tokens_BT[1, n_tokens // 2] = 0
    window = None if spec.window is None else max(2, min(spec.window, n_tokens // 2))
    visibility = Visibility(n_tokens, n_tokens, device, window, find_documents(tokens_BT, 0) if documents else None)

    def run(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # tracing is quick, and shows if the kernel compiles
        attend = torch.compile(backend.attend, backend="aot_eager") if compiled else backend.attend
        mask = backend.build_mask(visibility._replace(dtype=q.dtype))
        return attend(q, k, v, mask, scale=spec.scale, softcap=spec.softcap)

    heads = [(spec.n_head, spec.head_dim), (spec.n_kv_head, spec.head_dim), (spec.n_kv_head, spec.value_dim)]
    inputs = [_random(2, n, n_tokens, width, seed=seed).to(device, dtype) for seed, (n, width) in enumerate(heads)]
    return Trial(run, inputs, lambda name: reason_unsupported(name, spec, documents, device_info(device), dtype))


def _experts_trial(spec: ExpertsSpec, topk_ids_NK: Tensor, dtype: torch.dtype, compiled: bool) -> Trial:
    """Return a trial of a layer of experts with the sizes of `spec`."""
    dispatch, device = sort_by_expert(topk_ids_NK, spec.n_experts), topk_ids_NK.device

    def layer(kernel: ExpertKernel, x_NC: Tensor, weight_NK: Tensor, down: Tensor, *ups: Tensor) -> Tensor:
        up_RF, *gate_RF = kernel.up(x_NC, ups, dispatch)
        return kernel.down(up_RF * gate_RF[0].tanh() if gate_RF else up_RF, down, weight_NK.float(), dispatch)

    def unsupported(name: str) -> str | None:
        if name == "grouped" and compiled and dtype != torch.bfloat16:
            return "supports bf16 only if compiled"
        return reason_needs_cuda("experts", name, device)

    n_experts, width, hidden = spec.n_experts, spec.width, spec.hidden
    shapes = [(len(topk_ids_NK), width), topk_ids_NK.shape, (n_experts, width, hidden)]
    shapes += [(n_experts, hidden, width)] * (1 + spec.gated)
    inputs = [_random(*shape, seed=seed, device=device).to(dtype) for seed, shape in enumerate(shapes)]
    return Trial(torch.compile(layer, backend="aot_eager") if compiled else layer, inputs, unsupported)


def _loss_trial(spec: LossSpec, device: torch.device, dtype: torch.dtype) -> Trial:
    """Return a trial of 24 tokens, some with target -1, and up to 9000 rows, the last of them padding.

    In Triton these are two blocks.
    """
    n_tokens, n_rows = 24, min(spec.n_rows, 9000)
    targets_N = torch.arange(n_tokens, device=device) * ((n_rows - 1) // n_tokens)
    targets_N[::5] = -1

    def run(kernel: Callable[..., Tensor], x_NC: Tensor, w_VC: Tensor) -> Tensor:
        return kernel(x_NC, w_VC, targets_N, spec.softcap, n_rows - 1)

    x_NC, w_VC = (_random(n, spec.width, seed=seed, device=device) for seed, n in enumerate((n_tokens, n_rows)))
    inputs = [x_NC.to(dtype), (w_VC * spec.width**-0.5).to(dtype)]
    return Trial(run, inputs, lambda name: reason_needs_cuda("loss", name, device))


def _random(*shape: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(device).manual_seed(seed), device=device)
