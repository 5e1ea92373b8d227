"""Every kernel equals its readable reference, in its result and in all gradients."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from training.config import ModelConfig, ParallelConfig
from training.errors import UserError
from training.kernels import ATTENTION, EXPERTS, LOSS, choose

CPU = torch.device("cpu")
MODEL = ModelConfig.model_validate({"n_embd": 32, "n_head": 2, "blocks": [{"ffn": {"type": "moe", "hidden": 32}}]})


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


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("shape", [(2, 3, 17, 8), (1, 2, 64, 16), (1, 1, 1, 8)])
def test_attention_equals_the_reference(name, shape):
    q, k, v = (random(*shape) + i for i in range(3))
    assert_equal(ATTENTION[name], ATTENTION["reference"], [q, k, v])


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("n_queries", [1, 5])
def test_attention_over_a_cache_is_the_end_of_attention_over_everything(name, n_queries):
    q, k, v = (random(1, 2, 12, 8) * (i + 1) for i in range(3))
    whole = ATTENTION["reference"](q, k, v)
    torch.testing.assert_close(ATTENTION[name](q[:, :, -n_queries:], k, v), whole[:, :, -n_queries:])


def test_the_attention_reference_is_the_sum_over_visible_keys():
    q, k, v = (random(1, 1, 6, 4) + i for i in range(3))
    y = ATTENTION["reference"](q, k, v)[0, 0]
    for t in range(6):
        weights = torch.softmax(k[0, 0, : t + 1] @ q[0, 0, t] / 2.0, dim=0)
        torch.testing.assert_close(y[t], weights @ v[0, 0, : t + 1])


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


@pytest.mark.parametrize("chunk", [7, 64, 10_000])
@pytest.mark.parametrize("name", LOSS)
def test_the_loss_equals_log_softmax_at_the_targets(name, chunk, monkeypatch):
    monkeypatch.setattr("training.kernels.loss.CHUNK_LOGITS", chunk * 50)
    x, w, targets = random(23, 8), random(50, 8), torch.randint(-1, 50, (23,))
    targets[:2] = -1

    def written_down(x, w, targets):
        kept = targets >= 0
        return -(x @ w.T).log_softmax(dim=1)[kept, targets[kept]].sum()

    assert_equal(LOSS[name], written_down, [x, w], targets)


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


@pytest.mark.parametrize(("option", "kernels"), [("attention", ATTENTION), ("experts", EXPERTS)])
def test_what_can_be_asked_for_is_what_answers(option, kernels):
    asked = set(get_args(ParallelConfig.model_fields[option].annotation)) - {"auto"}
    assert asked == set(kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_choose_runs_what_it_chooses_and_says_why(dtype):
    kernels, why = choose(ParallelConfig(), MODEL, device=CPU, dtype=dtype)
    assert kernels.attention in ATTENTION.values()
    assert why["attention"].startswith(("flash (", "sdpa (", "reference ("))
    _, why = choose(ParallelConfig(attention="reference"), MODEL, device=CPU, dtype=dtype)
    assert why["attention"] == "reference (asked for)"


def test_a_kernel_that_does_not_run_is_passed_over_and_refused_when_asked_for(monkeypatch):
    def broken(*_):
        raise RuntimeError("no such device function\nat line 3")

    monkeypatch.setitem(ATTENTION, "flash", broken)
    _, why = choose(ParallelConfig(), MODEL, device=CPU, dtype=torch.float32)
    assert why["attention"] == "sdpa (flash does not run here: no such device function)"
    with pytest.raises(UserError, match=r"parallel.attention: flash does not run here: .*; use auto"):
        choose(ParallelConfig(attention="flash"), MODEL, device=CPU, dtype=torch.float32)
