"""Every kernel equals its readable reference, in its result and in all gradients."""

from __future__ import annotations

import itertools
import re
from typing import get_args

import pytest
import torch

from training.config import ParallelConfig
from training.errors import UserError
from training.kernels import ATTENTION, EXPERTS, LOSS, Backend, Call, Needs, choose
from training.kernels.attention import Seen, documents, why_not

CPU = torch.device("cpu")


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


def written_down(q, k, v, visible, scale, softcap):
    """Attention, one query of one head at a time; visible(sample, t) are the keys it sees."""
    rows = []
    for b, h, t in itertools.product(range(q.shape[0]), range(q.shape[1]), range(q.shape[2])):
        g, seen = h * k.shape[1] // q.shape[1], visible(b, t)
        scores = k[b, g, seen] @ q[b, h, t] * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        rows.append(torch.softmax(scores, dim=0) @ v[b, g, seen])
    return torch.stack(rows).view(*q.shape[:3], v.shape[-1])


CALLS = {
    "multi-head": Call(3, 3, 8, 8),
    "grouped-query": Call(4, 2, 8, 8),
    "multi-query": Call(3, 1, 16, 16),
    "narrow values": Call(2, 2, 12, 8),
    "wide values": Call(2, 1, 8, 16),
    "window": Call(2, 2, 8, 8, window=5),
    "window of one": Call(2, 2, 8, 8, window=1),
    "soft-cap": Call(2, 2, 8, 8, softcap=0.7),
    "scale": Call(2, 2, 8, 8, scale=0.3),
    "everything": Call(4, 2, 8, 6, window=7, softcap=1.5, scale=0.5),
}
HERE = [name for name in ATTENTION if "cpu" in ATTENTION[name].devices]


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("name", HERE)
def test_attention_equals_a_loop_over_queries_or_says_that_it_cannot(name, call, packed):
    n, backend = 17, ATTENTION[name]
    tokens = torch.ones(2, n, dtype=torch.int64)
    tokens[0, [4, 5]] = tokens[1, 11] = 0
    document = tokens.eq(0).cumsum(1)
    window = call.window or n

    def visible(b, t):
        return [s for s in range(max(0, t - window + 1), t + 1) if not packed or document[b, s] == document[b, t]]

    seen = Seen(n, n, CPU, call.window, documents(tokens, 0) if packed else None)
    heads = ((call.n_head, call.head_dim), (call.n_kv_head, call.head_dim), (call.n_kv_head, call.value_dim))
    inputs = [random(2, count, n, width) * (i + 1) for i, (count, width) in enumerate(heads)]

    def run(q, k, v):
        return backend.attend(q, k, v, backend.mask(seen), scale=call.scale, softcap=call.softcap)

    if why_not(name, call, packed, CPU, torch.float32):
        _, why = choose(ParallelConfig(), needs(call, packed), device=CPU, dtype=torch.float32)
        assert f"{name}: it does not do" in why["attention"] or why["attention"].startswith(tuple(HERE))
        with pytest.raises(UserError, match=f"parallel.attention: {name}: it does not do .*; use auto"):
            choose(ParallelConfig(attention=name), needs(call, packed), device=CPU, dtype=torch.float32)
        return
    scale = call.scale or call.head_dim**-0.5
    assert_equal(run, lambda q, k, v: written_down(q, k, v, visible, scale, call.softcap), inputs)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("n_queries", [1, 5])
@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_attention_over_a_cache_is_the_end_of_attention_over_everything(name, n_queries, window):
    q, k, v = (random(2, heads, 12, 8) * (i + 1) for i, heads in enumerate((4, 2, 2)))
    backend = ATTENTION[name]
    masks = [backend.mask(Seen(n, 12, CPU, window)) for n in (12, n_queries)]
    whole, end = (backend.attend(q[:, :, -n:], k, v, mask) for n, mask in zip((12, n_queries), masks, strict=True))
    torch.testing.assert_close(end, whole[:, :, -n_queries:])


def test_documents_begin_at_their_end_of_text_token_and_samples_anew():
    found = documents(torch.tensor([[5, 0, 7, 8, 0, 0], [0, 1, 2, 3, 4, 5]]), 0)
    assert found.index_BS.tolist() == [[0, 1, 1, 1, 2, 3], [1] * 6]
    assert found.position_BT.tolist() == [[0, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5]]
    assert found.ends_D.tolist() == [0, 1, 4, 5, 6, 12]


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


@pytest.mark.parametrize(("option", "kernels"), [("attention", ATTENTION), ("experts", EXPERTS)])
def test_what_can_be_asked_for_is_what_answers(option, kernels):
    asked = set(get_args(ParallelConfig.model_fields[option].annotation)) - {"auto"}
    assert asked == set(kernels)


def needs(call=CALLS["multi-head"], packed=False):
    return Needs(frozenset({call}), frozenset({(32, 64), (64, 32)}), packed, n_positions=48)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_choose_runs_what_it_chooses_and_says_why(dtype, call, packed):
    kernels, why = choose(ParallelConfig(), needs(call, packed), device=CPU, dtype=dtype)
    name = why["attention"].split(" (")[0]
    assert kernels.attention is ATTENTION[name]
    assert why_not(name, call, packed, CPU, dtype) is None
    _, why = choose(ParallelConfig(attention="reference"), needs(call, packed), device=CPU, dtype=dtype)
    assert why["attention"] == "reference (asked for)"


def broken(*_, **__):
    raise RuntimeError("no such device function\nat line 3")


def sees_the_future(q, k, v, mask, scale=None, softcap=None):
    return ATTENTION["reference"].attend(q, k, v, torch.ones_like(mask), scale=scale, softcap=softcap)


def wrong_backward(q, k, v, mask, scale=None, softcap=None):
    return ATTENTION["reference"].attend(q, k, v.detach() + 0.9 * (v - v.detach()), mask, scale=scale, softcap=softcap)


def nan_backward(q, k, v, mask, scale=None, softcap=None):
    y = ATTENTION["reference"].attend(q, k, v, mask, scale=scale, softcap=softcap)
    return y + 0 * (v * 0).sqrt().sum()


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        (nan_backward, "it differs from the reference by nan"),
        (broken, "it does not run here: no such device function"),
        (sees_the_future, r"it differs from the reference by \de.\d\d"),
        (wrong_backward, "it differs from the reference by 1e-01"),
    ],
)
def test_a_kernel_that_fails_or_differs_is_passed_over_and_refused_when_asked_for(monkeypatch, kernel, problem):
    monkeypatch.setitem(ATTENTION, "flash", Backend(ATTENTION["reference"].mask, kernel))
    _, why = choose(ParallelConfig(), needs(), device=CPU, dtype=torch.float32)
    assert re.fullmatch(rf"sdpa \(flash: {problem}\)", why["attention"])
    with pytest.raises(UserError, match=f"parallel.attention: flash: {problem}; use auto"):
        choose(ParallelConfig(attention="flash"), needs(), device=CPU, dtype=torch.float32)


def test_experts_that_differ_are_passed_over(monkeypatch):
    monkeypatch.setitem(EXPERTS, "grouped", lambda x, w, count: EXPERTS["loop"](x, w, count.flip(0)))
    _, why = choose(ParallelConfig(), needs(), device=CPU, dtype=torch.float32)
    assert why["experts"].startswith("loop (grouped: it differs from the reference by ")
