"""The kernels of experts and loss equal their readable references, in results and in all gradients."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from training.config import ParallelConfig
from training.kernels import EXPERTS, LOSS, Call, Needs, choose


def grads(function, inputs, *rest):
    """(result, gradients of a random projection of it)."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = function(*inputs, *rest)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y, *torch.autograd.grad(y, inputs, direction)]


def assert_equal(function, reference, inputs, *rest, tolerance=2e-5):
    for ours, theirs in zip(grads(function, inputs, *rest), grads(reference, inputs, *rest), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 9, 0], [1, 1, 1, 1]])
def test_experts_equal_one_product_a_row(name, counts):
    x, w, count = random(sum(counts), 16), random(4, 32, 16), torch.tensor(counts)
    expert = [e for e, n in enumerate(counts) for _ in range(n)]

    def rows(x, w, _):
        return torch.stack([w[e] @ row for e, row in zip(expert, x, strict=True)])

    assert_equal(EXPERTS[name], rows, [x, w], count, tolerance=1e-4)


@pytest.mark.parametrize("name", EXPERTS)
def test_an_expert_without_tokens_has_a_zero_gradient(name):
    _, _, grad_w = grads(EXPERTS[name], [random(6, 16), random(3, 16, 16)], torch.tensor([4, 0, 2]))
    assert grad_w[1].abs().sum() == 0
    assert grad_w[0].abs().sum() > 0


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [7, 64, 10_000])
@pytest.mark.parametrize("name", LOSS)
def test_the_loss_equals_log_softmax_at_the_targets(name, chunk, softcap, monkeypatch):
    monkeypatch.setattr("training.kernels.loss.CHUNK_LOGITS", chunk * 50)
    x, w, targets = random(23, 8), random(50, 8), torch.randint(-1, 50, (23,))
    targets[:2] = -1

    def by_hand(x, w, targets, softcap):
        logits, kept = x @ w.T, targets >= 0
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        return -logits.log_softmax(dim=1)[kept, targets[kept]].sum()

    assert_equal(LOSS[name], by_hand, [x, w], targets, softcap)


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_the_chunked_loss_skips_the_gradient_nobody_wants(frozen):
    x, w, targets = random(9, 8), random(20, 8), torch.arange(9)
    wanted = w if frozen == "x" else x
    wanted.requires_grad_()
    LOSS["chunked"](x, w, targets).backward()
    ours, wanted.grad = wanted.grad, None
    LOSS["reference"](x, w, targets).backward()
    torch.testing.assert_close(ours, wanted.grad)


def test_the_chunked_loss_survives_logits_that_overflow_exp():
    x, w = torch.full((2, 4), 100.0), torch.stack([torch.full((4,), 1.0), torch.full((4,), -1.0)])
    targets = torch.tensor([0, 1])
    torch.testing.assert_close(LOSS["chunked"](x, w, targets), torch.tensor(800.0))


def test_what_can_be_asked_for_is_what_answers():
    asked = get_args(ParallelConfig.model_fields["experts"].annotation)
    assert asked == ("auto", *EXPERTS)


def test_experts_that_differ_are_passed_over(monkeypatch):
    monkeypatch.setitem(EXPERTS, "grouped", lambda x, w, count: EXPERTS["loop"](x, w, count.flip(0)))
    needs = Needs(frozenset({Call(3, 3, 8, 8)}), frozenset({(32, 64), (64, 32)}), False)
    _, why = choose(ParallelConfig(), needs, device=torch.device("cpu"), dtype=torch.float32)
    assert why["experts"].startswith("loop (grouped: it differs from the reference by ")
