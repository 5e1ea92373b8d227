"""The kernels of experts and of the loss equal their readable references, in results and in all gradients."""

import doctest
import textwrap
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch

from training.config import ParallelConfig
from training.kernels import experts, loss
from training.kernels.attention import table as attention_table
from training.kernels.choose import choose_kernels
from training.kernels.experts import (
    TORCH_EXPERTS,
    _loop_matmul,
    _loop_outer,
    _Projection,
    _spans,
    sort_by_expert,
)
from training.kernels.interface import AttentionSpec, ExpertsSpec, KernelRequirements, LossSpec
from training.kernels.table import EXPERT_KERNELS, LOSS_KERNELS, TABLES, saved_operators

NO_GROUPED = not hasattr(torch.nn.functional, "grouped_mm")
KERNELS = [
    pytest.param(name, marks=pytest.mark.skipif(name == "grouped" and NO_GROUPED, reason="grouped: not in this torch"))
    for name in TORCH_EXPERTS
]


def grads(function, inputs, *rest):
    """Return the result and the gradients of a random projection of it."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = function(*inputs, *rest)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y, *torch.autograd.grad(y, inputs, direction)]


def assert_equal(function, reference, inputs, *rest, tolerance=2e-5):
    for ours, theirs in zip(grads(function, inputs, *rest), grads(reference, inputs, *rest), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# --- the tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [attention_table, experts, loss], ids=lambda module: module.__name__)
def test_the_examples_in_docstrings_run(module):
    torch.manual_seed(0)
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted > 1 and not results.failed


@pytest.mark.parametrize("option", TABLES)
def test_config_offers_the_kernels_of_the_table_in_its_order(option):
    assert get_args(ParallelConfig.model_fields[option].annotation) == ("auto", *TABLES[option])
    assert "reference" in TABLES[option]


def test_the_operators_to_save_are_those_that_the_kernels_define():
    """A renamed operator would be recomputed, which only costs time, so that no other test would fail."""
    pytest.importorskip("triton")
    from training.kernels import triton_experts  # noqa: F401

    only_in_backward = {
        "training_kernels_experts::loop_outer",
        "training_kernels_triton_experts::grouped_outer",
        "training_kernels_attention_deterministic::flash_backward",
    }
    defined = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    ours = {name for name in defined if name.startswith("training_kernels_")}
    assert ours - only_in_backward == {name for name in saved_operators() if name.startswith("training_")}
    versioned = {"aten::_grouped_mm"} if NO_GROUPED else set()
    assert {name for name in saved_operators() if name.startswith("aten::")} - versioned <= defined


# --- experts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(
    "topk_ids", [[[0, 2], [2, 3], [2, 0], [3, 2], [2, 0]], [[2], [2], [2]], [[0, 1, 2, 3]], [[3, 1], [1, 3]]], ids=str
)
def test_experts_equal_a_product_for_each_row(name, topk_ids):
    topk_ids_NK = torch.tensor(topk_ids)
    dispatch, n_tokens, top_k = sort_by_expert(topk_ids_NK, 4), *topk_ids_NK.shape
    inputs = [random(n_tokens, 16), random(4, 32, 16), random(4, 32, 16), random(4, 16, 32), random(n_tokens, top_k)]

    def layer(x, up, gate, down, weight):
        up, gate = EXPERT_KERNELS[name].up(x, (up, gate), dispatch)
        return EXPERT_KERNELS[name].down(up * gate, down, weight, dispatch)

    def by_token(x, up, gate, down, weight):
        def expert(e, token):
            return down[e] @ ((up[e] @ token) * (gate[e] @ token))

        tokens = zip(x, weight, topk_ids, strict=True)
        return torch.stack([sum(w * expert(e, t) for w, e in zip(ws, es, strict=True)) for t, ws, es in tokens])

    assert_equal(layer, by_token, inputs, tolerance=1e-4)


COUNTS = [[0, 37, 1, 300, 17], [200, 0, 0, 3, 0], [1, 1, 1, 1, 513], [16, 32, 128, 64, 48], [90, 91, 92, 93, 94]]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("count", COUNTS, ids=str)
def test_experts_in_sixteen_bits_keep_to_their_rows(name, count):
    """On a CPU the loop rounds row counts up: products of other experts' rows must not leak."""
    topk_ids_N1 = torch.arange(5).repeat_interleave(torch.tensor(count))[torch.randperm(sum(count))][:, None]
    dispatch = sort_by_expert(topk_ids_N1, 5)
    shapes = [(sum(count), 16), (5, 32, 16), (5, 32, 16), (5, 16, 32)]
    inputs = [random(*shape).bfloat16() for shape in shapes]

    def layer(kernel, x, up, gate, down):
        up, gate = kernel.up(x, (up, gate), dispatch)
        return kernel.down(up * gate, down, torch.ones(topk_ids_N1.shape), dispatch)

    results = grads(partial(layer, EXPERT_KERNELS[name]), inputs)
    expected = grads(partial(layer, EXPERT_KERNELS["reference"]), [x.float() for x in inputs])
    for ours, theirs in zip(results, expected, strict=True):
        error = (ours.float() - theirs).flatten(1).norm(dim=1) / (theirs.flatten(1).norm(dim=1) + 1e-3)
        assert error.max() < 0.03


@pytest.mark.parametrize("count", COUNTS, ids=str)
@pytest.mark.parametrize("n_out", [8, 16, 24])
def test_the_loop_in_sixteen_bits_does_not_write_to_its_inputs(count, n_out):
    """The operators declare that they mutate nothing; compilers rely on it."""
    offsets_E = torch.tensor(count).cumsum(0).to(torch.int32)
    y, x, w = (random(*shape).bfloat16() for shape in ((sum(count), n_out), (sum(count), 16), (5, 16, n_out)))
    before = [each.clone() for each in (y, x, w)]
    versions = [each._version for each in (y, x, w)]
    _loop_outer(y, x, offsets_E)
    _loop_matmul(x, w, offsets_E)
    assert all(map(torch.equal, (y, x, w), before)) and versions == [each._version for each in (y, x, w)]
    torch.library.opcheck(_loop_outer, (y, x, offsets_E), test_utils="test_schema")
    torch.library.opcheck(_loop_matmul, (x, w, offsets_E), test_utils="test_schema")


def test_the_loop_rounds_row_counts_to_few_numbers_at_little_cost():
    sizes = range(1, 5000)
    rounded = [_spans(torch.empty(0, 4, dtype=torch.bfloat16), torch.tensor([n]))[0][2] for n in sizes]
    assert all(n <= more <= max(n + 15, n * 9 / 8) for n, more in zip(sizes, rounded, strict=True))
    assert len(set(rounded)) < 80


@pytest.mark.parametrize("name", KERNELS)
def test_an_expert_without_tokens_has_a_zero_gradient(name):
    dispatch = sort_by_expert(torch.tensor([[0], [2], [0]]), 3)
    kernel, inputs = EXPERT_KERNELS[name], [random(3, 16), random(3, 8, 16)]
    _, _, grad_up = grads(lambda x, up: kernel.up(x, (up,), dispatch)[0], inputs)
    _, _, grad_down = grads(lambda h, down: kernel.down(h, down, torch.ones(3, 1), dispatch), inputs)
    for grad in (grad_up, grad_down):
        assert grad[1].abs().sum() == 0
        assert grad[0].abs().sum() > 0


def test_joined_matrices_compute_the_same_and_are_not_saved_for_backward():
    generator = torch.Generator().manual_seed(0)
    x, *w = (torch.randn(*shape, generator=generator) for shape in ((20, 8), (4, 12, 8), (4, 12, 8)))
    dispatch, results, kept = sort_by_expert(torch.randint(0, 4, (20, 2), generator=generator), 4), [], []
    indices = dispatch.offsets_E, dispatch.token_R, dispatch.inverse_NK

    def keep(tensor):
        kept[-1].append(tensor.data_ptr())
        return tensor

    for join in (False, True):
        leaves = [each.requires_grad_() for each in (x, *w)]
        kept.append([])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = _Projection.apply(_loop_matmul, _loop_outer, join, *indices, *leaves)
        results.append([*y, *torch.autograd.grad(y, leaves, [each.square() for each in y])])
    assert kept[0] == kept[1] and {each.data_ptr() for each in (x, *w)} <= {*kept[0]}
    for separate, joined in zip(*results, strict=True):
        assert (separate - joined).norm() <= 1e-6 * separate.norm()


def test_tokens_are_sorted_by_expert_and_then_by_order():
    dispatch = sort_by_expert(torch.tensor([[3, 0], [0, 1], [3, 1]]), 5)
    assert dispatch.token_R.tolist() == [0, 1, 1, 2, 0, 2]
    assert dispatch.expert_R.tolist() == [0, 0, 1, 1, 3, 3]
    assert dispatch.offsets_E.tolist() == [2, 4, 4, 6, 6]
    assert dispatch.inverse_NK.tolist() == [[4, 0], [1, 2], [5, 3]]


def test_experts_that_differ_from_the_reference_are_not_chosen(monkeypatch):
    right = EXPERT_KERNELS["loop"]

    def shifted(dispatch):
        return dispatch._replace(offsets_E=dispatch.offsets_E - 1)

    wrong = [
        right._replace(up=lambda x, w, dispatch: right.up(x, w[::-1], dispatch)),
        right._replace(down=lambda h, w, weight, dispatch: right.down(h, w, weight.flip(1), dispatch)),
        right._replace(down=lambda h, w, weight, dispatch: right.down(h, w, weight.detach(), dispatch)),
        right._replace(down=lambda h, w, weight, dispatch: right.down(h, w, weight, shifted(dispatch))),
    ]
    requirements = KernelRequirements(frozenset({AttentionSpec(3, 3, 8, 8)}), frozenset({ExpertsSpec(32, 64)}), False)
    for kernel in wrong:
        monkeypatch.setitem(EXPERT_KERNELS, "grouped", kernel)
        choice = choose_kernels(ParallelConfig(), requirements, device=torch.device("cpu"), dtype=torch.float32)
        assert choice.names["experts"] == "loop" and choice.reasons["experts"].startswith("grouped: ")


# --- the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [7, 64, 10_000])
@pytest.mark.parametrize("name", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_equals_log_softmax_at_the_targets(dtype, name, chunk, softcap, monkeypatch):
    """A chunk has `chunk` tokens, a block within it three."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", {"cpu": (dtype.itemsize * chunk, 2**28)})
    monkeypatch.setattr(loss, "BLOCK_ELEMENTS", 150)
    x, w, targets = random(23, 8), random(50, 8), torch.randint(-1, 47, (23,))  # three rows of padding
    targets[:2] = -1

    def by_hand(x, w, targets, softcap, n_vocab):
        logits, is_counted = x @ w[:n_vocab].T, targets >= 0
        logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
        return -logits.log_softmax(dim=1)[is_counted, targets[is_counted]].sum()

    if dtype == torch.float32:
        assert_equal(LOSS_KERNELS[name], by_hand, [x, w], targets, softcap, 47)
        return
    results = grads(LOSS_KERNELS[name], [x.to(dtype), w], targets, softcap, 47)
    assert not results[-1][47:].any()
    for ours, theirs in zip(results, grads(by_hand, [x, w], targets, softcap, 47), strict=True):
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_the_chunked_loss_skips_the_gradient_of_a_frozen_input(frozen):
    x, w, targets = random(9, 8), random(20, 8), torch.arange(9)
    learned = w if frozen == "x" else x
    learned.requires_grad_()
    LOSS_KERNELS["chunked"](x, w, targets).backward()
    ours, learned.grad = learned.grad, None
    LOSS_KERNELS["reference"](x, w, targets).backward()
    torch.testing.assert_close(ours, learned.grad)


def test_the_chunked_loss_survives_logits_that_overflow_exp():
    x, w = torch.full((2, 4), 100.0), torch.stack([torch.full((4,), 1.0), torch.full((4,), -1.0)])
    targets = torch.tensor([0, 1])
    torch.testing.assert_close(LOSS_KERNELS["chunked"](x, w, targets), torch.tensor(800.0))


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_example_of_the_playbook_works(dtype, softcap, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "playbooks" / "add_a_kernel.md").read_text()
    namespace = {}
    exec(textwrap.dedent(page.split("```python\n")[1].split("```")[0]), namespace)
    monkeypatch.setitem(LOSS_KERNELS, "whole", namespace["whole_loss"])
    config = ParallelConfig().model_copy(update={"loss": "whole"})
    requirements = KernelRequirements(frozenset(), frozenset(), False, frozenset({LossSpec(64, 5000, softcap)}))
    choice = choose_kernels(config, requirements, device=torch.device("cpu"), dtype=dtype)
    assert choice.as_text()["loss"] == "whole (requested)"
