"""The kernels of experts and loss equal their readable references, in results and in all gradients."""

from __future__ import annotations

from functools import partial
from typing import get_args

import pytest
import torch

from training.config import ParallelConfig
from training.kernels.choose import choose_kernels
from training.kernels.experts import (
    TORCH_EXPERTS,
    GroupedMatmul,
    _loop_matmul,
    _loop_outer,
    _spans,
    _Up,
    sort_by_expert,
)
from training.kernels.interface import AttentionSpec, ExpertsSpec, KernelRequirements
from training.kernels.table import EXPERT_KERNELS, LOSS_KERNELS

NO_GROUPED = not hasattr(torch.nn.functional, "grouped_mm")
KERNELS = [
    pytest.param(name, marks=pytest.mark.skipif(name == "grouped" and NO_GROUPED, reason="grouped: not in this torch"))
    for name in TORCH_EXPERTS
]


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


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "sent", [[[0, 2], [2, 3], [2, 0], [3, 2], [2, 0]], [[2], [2], [2]], [[0, 1, 2, 3]], [[3, 1], [1, 3]]], ids=str
)
def test_experts_equal_one_product_a_row(name, sent):
    topk_ids_NK = torch.tensor(sent)
    rows, n_tokens, top_k = sort_by_expert(topk_ids_NK, 4), *topk_ids_NK.shape
    inputs = [random(n_tokens, 16), random(4, 32, 16), random(4, 32, 16), random(4, 16, 32), random(n_tokens, top_k)]

    def layer(x, up, gate, down, weight):
        up, gate = EXPERT_KERNELS[name].up(x, (up, gate), rows)
        return EXPERT_KERNELS[name].down(up * gate, down, weight, rows)

    def by_token(x, up, gate, down, weight):
        def expert(e, token):
            return down[e] @ ((up[e] @ token) * (gate[e] @ token))

        tokens = zip(x, weight, sent, strict=True)
        return torch.stack([sum(w * expert(e, t) for w, e in zip(ws, es, strict=True)) for t, ws, es in tokens])

    assert_equal(layer, by_token, inputs, tolerance=1e-4)


COUNTS = [[0, 37, 1, 300, 17], [200, 0, 0, 3, 0], [1, 1, 1, 1, 513], [16, 32, 128, 64, 48], [90, 91, 92, 93, 94]]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("count", COUNTS, ids=str)
def test_experts_of_sixteen_bits_keep_to_their_rows(name, count):
    """On a CPU the loop rounds numbers of rows up: what is computed for others must stay theirs."""
    expert_N1 = torch.arange(5).repeat_interleave(torch.tensor(count))[torch.randperm(sum(count))][:, None]
    rows = sort_by_expert(expert_N1, 5)
    shapes = [(sum(count), 16), (5, 32, 16), (5, 32, 16), (5, 16, 32)]
    inputs = [random(*shape).bfloat16() for shape in shapes]

    def layer(kernel, x, up, gate, down):
        up, gate = kernel.up(x, (up, gate), rows)
        return kernel.down(up * gate, down, torch.ones(expert_N1.shape), rows)

    found = grads(partial(layer, EXPERT_KERNELS[name]), inputs)
    expected = grads(partial(layer, EXPERT_KERNELS["reference"]), [x.float() for x in inputs])
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours.float() - theirs).flatten(1).norm(dim=1) / (theirs.flatten(1).norm(dim=1) + 1e-3)
        assert error.max() < 0.03


def test_the_loop_has_few_programs_and_little_waste():
    sizes = range(1, 5000)
    rounded = [_spans(torch.empty(0, 4, dtype=torch.bfloat16), torch.tensor([n]))[0][2] for n in sizes]
    assert all(n <= more <= max(n + 15, n * 9 / 8) for n, more in zip(sizes, rounded, strict=True))
    assert len(set(rounded)) < 80


@pytest.mark.parametrize("name", KERNELS)
def test_an_expert_without_tokens_has_a_zero_gradient(name):
    rows = sort_by_expert(torch.tensor([[0], [2], [0]]), 3)
    _, _, grad_up = grads(lambda x, up: EXPERT_KERNELS[name].up(x, (up,), rows)[0], [random(3, 16), random(3, 8, 16)])
    _, _, grad_down = grads(
        lambda h, down: EXPERT_KERNELS[name].down(h, down, torch.ones(3, 1), rows), [random(3, 16), random(3, 8, 16)]
    )
    for grad in (grad_up, grad_down):
        assert grad[1].abs().sum() == 0
        assert grad[0].abs().sum() > 0


def test_joined_matrices_of_experts_give_the_same_and_nothing_more_is_kept():
    products = GroupedMatmul(_loop_matmul, _loop_outer)
    generator = torch.Generator().manual_seed(0)
    x, *w = (torch.randn(*shape, generator=generator) for shape in ((20, 8), (4, 12, 8), (4, 12, 8)))
    rows, found, kept = sort_by_expert(torch.randint(0, 4, (20, 2), generator=generator), 4), [], []

    def keep(tensor):
        kept[-1].append(tensor.data_ptr())
        return tensor

    for join in (False, True):
        leaves = [each.requires_grad_() for each in (x, *w)]
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = _Up.apply(products, join, rows.token_R, rows.inverse_NK, rows.offsets_E, *leaves)
        grads = torch.autograd.grad(y, leaves, [each.square() for each in y])
        found.append([*y, *grads])
    assert kept[0] == kept[1] and {each.data_ptr() for each in (x, *w)} <= {*kept[0]}
    for separate, joined in zip(*found, strict=True):
        assert (separate - joined).norm() <= 1e-6 * separate.norm()


def test_a_plan_sorts_tokens_by_expert_and_then_by_order():
    rows = sort_by_expert(torch.tensor([[3, 0], [0, 1], [3, 1]]), 5)
    assert rows.token_R.tolist() == [0, 1, 1, 2, 0, 2]
    assert rows.expert_R.tolist() == [0, 0, 1, 1, 3, 3]
    assert rows.offsets_E.tolist() == [2, 4, 4, 6, 6]
    assert rows.inverse_NK.tolist() == [[4, 0], [1, 2], [5, 3]]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [7, 64, 10_000])
@pytest.mark.parametrize("name", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_equals_log_softmax_at_the_targets(dtype, name, chunk, softcap, monkeypatch):
    """Logits of `chunk` tokens at a time, and of these of three."""
    monkeypatch.setattr("training.kernels.loss.CHUNK_BYTES", {"cpu": (dtype.itemsize * chunk, 2**28)})
    monkeypatch.setattr("training.kernels.loss.BLOCK_ELEMENTS", 150)
    x, w, targets = random(23, 8), random(50, 8), torch.randint(-1, 50, (23,))
    targets[:2] = -1

    def by_hand(x, w, targets, softcap):
        logits, kept = x @ w.T, targets >= 0
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        return -logits.log_softmax(dim=1)[kept, targets[kept]].sum()

    if dtype == torch.float32:
        assert_equal(LOSS_KERNELS[name], by_hand, [x, w], targets, softcap)
        return
    loss, grad_x, grad_w = grads(LOSS_KERNELS[name], [x.to(dtype), w], targets, softcap)
    for ours, theirs in zip((loss, grad_x, grad_w), grads(by_hand, [x, w], targets, softcap), strict=True):
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_the_chunked_loss_skips_the_gradient_nobody_wants(frozen):
    x, w, targets = random(9, 8), random(20, 8), torch.arange(9)
    wanted = w if frozen == "x" else x
    wanted.requires_grad_()
    LOSS_KERNELS["chunked"](x, w, targets).backward()
    ours, wanted.grad = wanted.grad, None
    LOSS_KERNELS["reference"](x, w, targets).backward()
    torch.testing.assert_close(ours, wanted.grad)


def test_the_chunked_loss_survives_logits_that_overflow_exp():
    x, w = torch.full((2, 4), 100.0), torch.stack([torch.full((4,), 1.0), torch.full((4,), -1.0)])
    targets = torch.tensor([0, 1])
    torch.testing.assert_close(LOSS_KERNELS["chunked"](x, w, targets), torch.tensor(800.0))


def test_what_can_be_asked_for_is_what_answers():
    for option, kernels in (("experts", EXPERT_KERNELS), ("loss", LOSS_KERNELS)):
        assert get_args(ParallelConfig.model_fields[option].annotation) == ("auto", *kernels)


def test_experts_that_differ_are_passed_over(monkeypatch):
    right = EXPERT_KERNELS["loop"]
    wrong = [
        right._replace(up=lambda x, w, rows: right.up(x, w[::-1], rows)),
        right._replace(down=lambda h, w, weight, rows: right.down(h, w, weight.flip(1), rows)),
        right._replace(down=lambda h, w, weight, rows: right.down(h, w, weight.detach(), rows)),
        right._replace(
            down=lambda h, w, weight, rows: right.down(h, w, weight, rows._replace(offsets_E=rows.offsets_E - 1))
        ),
    ]
    needs = KernelRequirements(frozenset({AttentionSpec(3, 3, 8, 8)}), frozenset({ExpertsSpec(32, 64)}), False)
    for kernel in wrong:
        monkeypatch.setitem(EXPERT_KERNELS, "grouped", kernel)
        _, why = choose_kernels(ParallelConfig(), needs, device=torch.device("cpu"), dtype=torch.float32)
        assert why["experts"].startswith("loop (grouped: it ")
