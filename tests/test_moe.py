"""The MoE layer equals a loop over tokens, and no split of the batch changes its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from training.config import MLPConfig, ModelConfig, MoEConfig
from training.kernels import EXPERTS, Kernels
from training.model import GPT
from training.model.layers import ACTIVATIONS, Batch
from training.model.mlp import MLP
from training.model.moe import MoE

MODEL = ModelConfig(n_embd=16, n_head=2, vocab_size=64, n_layer=2, n_positions=8)


def layer(kernel="loop", model=MODEL, **options) -> MoE:
    section = MoEConfig.model_validate({"type": "moe", "n_experts": 4, "hidden": 32} | options)
    moe = MoE(section, model, Kernels(experts=EXPERTS[kernel]))
    generator = torch.Generator().manual_seed(0)
    for parameter in moe.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return moe


def by_token(moe: MoE, x_BTC: torch.Tensor) -> torch.Tensor:
    """The layer as it is written down: each token through each of its experts."""
    section, experts, rows = moe.section, moe.experts, []
    for x in x_BTC.flatten(0, 1):
        probability = F.softmax(moe.router.weight @ x, dim=0)
        chosen = sorted(range(section.n_experts), key=lambda e: -(probability + moe.selection_bias)[e])[: section.top_k]
        total = sum(probability[e] for e in chosen) if section.renormalize else 1.0
        y = torch.zeros_like(x)
        for e in chosen:
            up = experts.up[e] @ x + experts.up_bias[e]
            if section.gated:
                hidden = ACTIVATIONS[section.activation](experts.gate[e] @ x + experts.gate_bias[e]) * up
            else:
                hidden = ACTIVATIONS[section.activation](up)
            y = y + probability[e] / total * (experts.down[e] @ hidden + experts.down_bias[e])
        rows.append(y)
    return torch.stack(rows).view_as(x_BTC)


def outputs(function, moe, x):
    """The result, and the gradients of the input and of every parameter."""
    x, direction = x.clone().requires_grad_(), torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    y = function(x)
    names = [name for name, _ in moe.named_parameters()]
    grads = torch.autograd.grad(y, [x, *moe.parameters()], direction, allow_unused=True)
    return {"y": y, **dict(zip(["x", *names], grads, strict=True))}


@pytest.mark.parametrize("kernel", EXPERTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 4},
        {"gated": True, "activation": "silu"},
        {"renormalize": False},
        {"activation": "relu2"},
    ],
    ids=str,
)
def test_the_layer_and_every_gradient_equal_the_loop_over_tokens(kernel, options):
    moe, x = layer(kernel, **options), torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    moe.selection_bias[:] = torch.tensor([0.1, -0.2, 0.0, 0.05])
    ours, theirs = outputs(lambda x: moe(x, Batch(18))[0], moe, x), outputs(lambda x: by_token(moe, x), moe, x)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_one_expert_is_the_dense_layer():
    moe = layer(n_experts=1, top_k=1)
    dense = MLP(MLPConfig(hidden=32), MODEL, Kernels())
    for name in ("up", "down"):
        getattr(dense, name).weight.data = getattr(moe.experts, name)[0].data
        getattr(dense, name).bias.data = getattr(moe.experts, f"{name}_bias")[0].data
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(moe(x, None)[0], dense(x, None)[0])


@pytest.mark.parametrize("kernel", EXPERTS)
@pytest.mark.parametrize("favourites", [[2], [0, 3], [1, 2, 3]])
def test_experts_without_tokens_get_zero_gradients_and_nothing_is_nan(kernel, favourites):
    moe = layer(kernel, top_k=len(favourites))
    moe.selection_bias[favourites] = 100.0
    x = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    y, routing = moe(x, Batch(7))
    y.sum().backward()
    assert routing.count_E.tolist() == [7.0 if e in favourites else 0.0 for e in range(4)]
    for e in range(4):
        assert (moe.experts.up.grad[e].abs().sum() > 0) == (e in favourites)
    assert all(p.grad is None or p.grad.isfinite().all() for p in moe.parameters())


def test_the_router_gradient_is_that_of_finite_differences():
    moe = layer("loop").double()
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def f(weight):
        return torch.func.functional_call(moe, {"router.weight": weight}, (x, None))[0].square().sum()

    weight = moe.router.weight.detach().clone().requires_grad_()
    moe.router.forward = lambda h: F.linear(h.double(), moe.router.weight)
    (grad,) = torch.autograd.grad(f(weight), weight)
    for index in [(0, 0), (1, 7), (3, 15)]:
        step = torch.zeros_like(weight)
        step[index] = 1e-6
        difference = (f(weight + step) - f(weight - step)) / 2e-6
        assert grad[index].item() == pytest.approx(difference.item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("balance", ["bias", "switch", "both", "none"])
def test_no_split_of_the_batch_changes_a_gradient(balance):
    ffn = {"type": "moe", "n_experts": 4, "hidden": 32, "balance": balance, "switch_weight": 0.5, "z_loss_weight": 0.1}
    config = ModelConfig.model_validate(MODEL.model_dump() | {"blocks": [{"ffn": ffn}]})
    x = torch.randint(0, 64, (8, 8), generator=torch.Generator().manual_seed(3))
    gradients = []
    for size in (8, 4, 3, 1):
        model = GPT(config).init_weights(0)
        for moe in (block.ffn for block in model.blocks):
            moe.load[:] = torch.tensor([0.4, 0.3, 0.2, 0.1])
        counts = 0
        for rows in x.split(size):
            loss, metrics = model(rows, rows.roll(-1, 1), x.numel())
            loss.backward()
            counts += metrics["expert_count.1"]
        assert counts.sum() == x.numel() * 2
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        for name, expected in gradients[0].items():
            if not name.endswith("key.bias"):  # zero but for rounding: softmax does not see it
                error = (other[name] - expected).norm() / expected.norm()
                assert error < 1e-6, name


def test_the_selection_bias_moves_towards_idle_experts_and_the_load_is_remembered():
    moe = layer(bias_rate=0.01)
    moe.finish_step(torch.tensor([10.0, 2.0, 4.0, 0.0]))
    torch.testing.assert_close(moe.selection_bias, torch.tensor([-0.01, 0.01, 0.0, 0.01]))
    torch.testing.assert_close(moe.load, torch.tensor([10.0, 2.0, 4.0, 0.0]) / 16)


def test_bias_balancing_evens_out_a_skewed_router():
    moe = layer(bias_rate=0.003)
    moe.router.weight.data[0] += 0.4
    x = torch.randn(4, 32, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    loads = []
    for _ in range(150):
        moe.finish_step(moe(x, Batch(128))[1].count_E)
        loads.append(moe.load.max().item())
    assert loads[0] > 0.4
    assert loads[-1] < 0.3


def test_the_switch_loss_is_that_of_the_paper_with_the_last_steps_fractions():
    moe = layer(balance="switch", switch_weight=1.0, z_loss_weight=0.0)
    moe.load[:] = torch.tensor([0.7, 0.1, 0.1, 0.1])
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1))
    mean_probability = F.softmax(x[0] @ moe.router.weight.T, dim=1).mean(dim=0)
    torch.testing.assert_close(moe(x, Batch(6))[1].aux_loss, 4 * (moe.load * mean_probability).sum())


def test_the_z_loss_is_that_of_the_paper():
    moe = layer(balance="none", z_loss_weight=0.5)
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1))
    expected = (x[0] @ moe.router.weight.T).exp().sum(dim=1).log().square().mean()
    torch.testing.assert_close(moe(x, Batch(6))[1].aux_loss, 0.5 * expected)


def test_routing_is_in_float32_under_bfloat16():
    moe = layer("loop")
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = (x.float()[0] @ moe.router.weight.T).softmax(dim=1).topk(2).indices
    assert moe(x, Batch(64))[1].count_E.tolist() == exact.flatten().bincount(minlength=4).tolist()
    assert moe(x, Batch(64))[0].dtype == torch.bfloat16
