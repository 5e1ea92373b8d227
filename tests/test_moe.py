"""The MoE layer equals a loop over tokens, and no split of the batch changes its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from training.batch import Batch
from training.config import BlockConfig, MLPConfig, ModelConfig, MoEConfig
from training.kernels.experts import TORCH_EXPERTS
from training.kernels.interface import Kernels
from training.model import GPT, init_weights, model_stats
from training.model.layers import ACTIVATIONS, uniform_from_keys
from training.model.layers import FeedForwardContext as Context
from training.model.metrics import dead_expert_threshold, step_metrics
from training.model.mlp import MLP
from training.model.moe import MoE, finish_step

MODEL = ModelConfig(n_embd=16, n_head=2, vocab_size=64, n_layer=2, n_positions=8)


NO_GROUPED = not hasattr(torch.nn.functional, "grouped_mm")
KERNELS = [
    pytest.param(name, marks=pytest.mark.skipif(name == "grouped" and NO_GROUPED, reason="grouped: not in this torch"))
    for name in TORCH_EXPERTS
]


def layer(kernel="loop", model=MODEL, **options) -> MoE:
    config = MoEConfig.model_validate({"type": "moe", "n_experts": 4, "hidden": 32} | options)
    moe = MoE(config, model, Kernels(experts=TORCH_EXPERTS[kernel]))
    generator = torch.Generator().manual_seed(0)
    for parameter in moe.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return moe


def by_token(moe: MoE, x_BTC: torch.Tensor) -> torch.Tensor:
    """Compute the layer by its definition: each token through each of its experts."""
    config, experts, rows = moe.config, moe.experts, []
    for x in x_BTC.flatten(0, 1):
        logits = moe.router.weight @ x
        score = F.softmax(logits, dim=0) if config.scoring == "softmax" else 1 / (1 + (-logits).exp())
        chosen = sorted(range(config.n_experts), key=lambda e: -(score + moe.selection_bias)[e])[: config.top_k]
        total = sum(score[e] for e in chosen) if config.is_renormalized else 1.0
        y = torch.zeros_like(x)
        for e in chosen:
            up = experts.up[e] @ x + experts.up_bias[e]
            if config.gated:
                hidden = ACTIVATIONS[config.activation](experts.gate[e] @ x + experts.gate_bias[e]) * up
            else:
                hidden = ACTIVATIONS[config.activation](up)
            y = y + config.route_scale * score[e] / total * (experts.down[e] @ hidden + experts.down_bias[e])
        for one in range(config.n_shared):
            mine = slice(one * config.hidden, (one + 1) * config.hidden)
            up = moe.shared.up.weight[mine] @ x + moe.shared.up.bias[mine]
            if config.gated:
                gate = moe.shared.gate.weight[mine] @ x + moe.shared.gate.bias[mine]
                hidden = ACTIVATIONS[config.activation](gate) * up
            else:
                hidden = ACTIVATIONS[config.activation](up)
            y = y + moe.shared.down.weight[:, mine] @ hidden + moe.shared.down.bias / config.n_shared
        rows.append(y)
    return torch.stack(rows).view_as(x_BTC)


def outputs(function, moe, x):
    """Return the result, and the gradients of the input and of every parameter."""
    x, direction = x.clone().requires_grad_(), torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    y = function(x)
    names = [name for name, _ in moe.named_parameters()]
    grads = torch.autograd.grad(y, [x, *moe.parameters()], direction, allow_unused=True)
    return {"y": y, **dict(zip(["x", *names], grads, strict=True))}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 4},
        {"gated": True, "activation": "silu"},
        {"renormalize": False},
        {"activation": "relu2"},
        {"n_experts": 16, "top_k": 5, "hidden": 8},
        {"n_shared": 2, "hidden": 8},
        {"n_shared": 1, "hidden": 8, "gated": True, "activation": "silu"},
        {"scoring": "sigmoid", "route_scale": 2.5, "n_shared": 1},
        {"scoring": "sigmoid", "renormalize": False, "n_shared": 1},
    ],
    ids=str,
)
def test_the_layer_and_every_gradient_equal_the_loop_over_tokens(kernel, options):
    moe, x = layer(kernel, **options), torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(1))
    moe.selection_bias[:4] = torch.tensor([0.1, -0.2, 0.0, 0.05])
    ours, theirs = (
        outputs(lambda x: moe(x, Context(18))[0], moe, x),
        outputs(lambda x: by_token(moe, x), moe, x),
    )
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_one_expert_is_the_dense_layer():
    moe = layer(n_experts=1, top_k=1)
    dense = MLP(MLPConfig(hidden=32), MODEL, Kernels())
    for name in ("up", "down"):
        getattr(dense, name).weight.data = getattr(moe.experts, name)[0].data
        getattr(dense, name).bias.data = getattr(moe.experts, f"{name}_bias")[0].data
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(2))
    ours, theirs = (outputs(lambda x, one=one: one(x, Context())[0], one, x) for one in (moe, dense))
    for name, expected in theirs.items():
        name = name if name in ("y", "x") else f"experts.{name}".removesuffix(".weight").replace(".bias", "_bias")
        torch.testing.assert_close(ours[name].view_as(expected), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("favourites", [[2], [0, 3], [1, 2, 3]])
def test_experts_without_tokens_get_zero_gradients_without_nan(kernel, favourites):
    moe = layer(kernel, top_k=len(favourites))
    moe.selection_bias[favourites] = 100.0
    x = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(2), requires_grad=True)
    y, routing = moe(x, Context(7))
    y.sum().backward()
    assert routing.count_E.tolist() == [7.0 if e in favourites else 0.0 for e in range(4)]
    for e in range(4):
        assert (moe.experts.up.grad[e].abs().sum() > 0) == (e in favourites)
    assert all(p.grad is None or p.grad.isfinite().all() for p in moe.parameters())


def test_the_router_gradient_is_that_of_finite_differences():
    moe = layer("loop").double()
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def f(weight):
        return torch.func.functional_call(moe, {"router.weight": weight}, (x, Context()))[0].square().sum()

    weight = moe.router.weight.detach().clone().requires_grad_()
    moe.router.forward = lambda h: F.linear(h.double(), moe.router.weight)
    (grad,) = torch.autograd.grad(f(weight), weight)
    for index in [(0, 0), (1, 7), (3, 15)]:
        step = torch.zeros_like(weight)
        step[index] = 1e-6
        difference = (f(weight + step) - f(weight - step)) / 2e-6
        assert grad[index].item() == pytest.approx(difference.item(), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"balance": "bias"},
        {"balance": "switch"},
        {"balance": "both"},
        {"balance": "none"},
        {"balance": "both", "scoring": "sigmoid", "n_shared": 1, "route_scale": 2.0},
        {"jitter": 0.1},
    ],
    ids=str,
)
def test_no_split_of_the_batch_changes_a_gradient(options):
    ffn = {"type": "moe", "n_experts": 4, "hidden": 32, "switch_weight": 0.5, "z_loss_weight": 0.1} | options
    config = ModelConfig.model_validate(MODEL.model_dump() | {"blocks": [{"ffn": ffn}]})
    x = torch.randint(0, 64, (8, 8), generator=torch.Generator().manual_seed(3))
    key_B = torch.arange(100, 108)
    gradients = []
    for size in (8, 4, 3, 1):
        model = init_weights(GPT(config), 0)
        for moe in (block.ffn for block in model.blocks):
            moe.load[:] = torch.tensor([0.4, 0.3, 0.2, 0.1])
        counts = 0
        for rows, keys in zip(x.split(size), key_B.split(size), strict=True):
            loss, metrics = model(Batch(rows, rows.roll(-1, 1), keys, x.numel()))
            loss.backward()
            counts += metrics["expert_count.1"]
        assert counts.sum() == x.numel() * 2
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for other in gradients[1:]:
        for name, expected in gradients[0].items():
            if not name.endswith("key.bias"):  # zero but for rounding: softmax is invariant to it
                error = (other[name] - expected).norm() / expected.norm()
                assert error < 1e-6, name


def test_the_selection_bias_moves_towards_idle_experts_and_the_load_is_remembered():
    moe = layer(bias_rate=0.01)
    finish_step([moe], [torch.tensor([10.0, 2.0, 4.0, 0.0])])
    torch.testing.assert_close(moe.selection_bias, torch.tensor([-0.01, 0.01, 0.0, 0.01]))
    torch.testing.assert_close(moe.load, torch.tensor([10.0, 2.0, 4.0, 0.0]) / 16)


def test_layers_with_different_configs_use_their_own_counts():
    kinds = [{"n_experts": 4, "bias_rate": 0.01}, {"n_experts": 3, "balance": "switch"}]
    blocks = [BlockConfig.model_validate({"ffn": {"type": "moe", "hidden": 8} | kind}) for kind in kinds]
    sizes = {"n_layer": 4, "n_head": 2, "n_embd": 8, "n_positions": 8, "vocab_size": 16}
    model = init_weights(GPT(ModelConfig(**sizes, blocks=tuple(blocks))), 0)
    counts = [torch.tensor(count) for count in ([9.0, 1, 1, 1], [5.0, 0, 1], [1.0, 1, 1, 9], [2.0, 3, 1])]
    metrics = model.finish_step({f"expert_count.{i}": count for i, count in enumerate(counts)})
    assert [name for name in metrics if name.startswith("bias_range")] == [f"bias_range.{i}" for i in range(4)]
    for i, (block, count) in enumerate(zip(model.blocks, counts, strict=True)):
        assert torch.equal(block.ffn.load, count / count.sum())
        moved = torch.zeros(len(count)) if i % 2 else 0.01 * (count.mean() - count).sign()
        assert torch.equal(block.ffn.selection_bias, moved)
        assert metrics[f"bias_range.{i}"] == moved.max() - moved.min()


def test_bias_balancing_evens_out_a_skewed_router():
    moe = layer(bias_rate=0.003)
    moe.router.weight.data[0] += 0.4
    x = torch.randn(4, 32, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    loads = []
    for _ in range(150):
        finish_step([moe], [moe(x, Context(128))[1].count_E])
        loads.append(moe.load.max().item())
    assert loads[0] > 0.4
    assert loads[-1] < 0.3


def test_the_switch_loss_is_the_papers_with_the_previous_updates_fractions():
    moe = layer(balance="switch", switch_weight=1.0, z_loss_weight=0.0)
    moe.load[:] = torch.tensor([0.7, 0.1, 0.1, 0.1])
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1))
    mean_probability = F.softmax(x[0] @ moe.router.weight.T, dim=1).mean(dim=0)
    torch.testing.assert_close(moe(x, Context(6))[1].aux_loss, 4 * (moe.load * mean_probability).sum())


def test_the_z_loss_is_the_papers():
    moe = layer(balance="none", z_loss_weight=0.5)
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(1))
    expected = (x[0] @ moe.router.weight.T).exp().sum(dim=1).log().square().mean()
    torch.testing.assert_close(moe(x, Context(6))[1].aux_loss, 0.5 * expected)


def test_routing_is_in_float32_under_bfloat16():
    moe = layer("loop")
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = (x.float()[0] @ moe.router.weight.T).softmax(dim=1).topk(2).indices
    assert moe(x, Context(64))[1].count_E.tolist() == exact.flatten().bincount(minlength=4).tolist()
    assert moe(x, Context(64))[0].dtype == torch.bfloat16


GROUPED_BF16 = pytest.param(
    "grouped", torch.bfloat16, marks=pytest.mark.skipif(NO_GROUPED, reason="grouped: not in this torch")
)
EVERYTHING = {"scoring": "sigmoid", "n_shared": 1, "jitter": 0.1, "capacity_factor": 1.0, "balance": "both"}


def model_of(ffn, kernel="loop", dtype=torch.float32, **changes) -> GPT:
    options = MODEL.model_dump() | changes | {"blocks": [{"ffn": {"type": "moe", "n_experts": 4, "hidden": 32} | ffn}]}
    return init_weights(GPT(ModelConfig.model_validate(options), Kernels(experts=TORCH_EXPERTS[kernel]), dtype), 0)


def random_tokens(n_samples=4):
    return torch.randint(0, 64, (n_samples, 8), generator=torch.Generator().manual_seed(3))


def test_capacity_keeps_the_first_tokens_and_counts_what_it_drops():
    moe = layer(capacity_factor=0.5, top_k=1, n_experts=2)
    moe.selection_bias[:] = torch.tensor([100.0, 0.0])
    x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(2))
    y, routing = moe(x, Context(12, torch.tensor([7]), is_training=True))
    assert routing.count_E.tolist() == [12, 0]
    assert routing.n_dropped == 9  # capacity is half of six
    whole, none = moe(x, Context(12))
    assert none.n_dropped == 0  # evaluation drops nothing
    torch.testing.assert_close(y[0, :3], whole[0, :3])
    assert not y[0, 3:].any()


def test_a_capacity_beyond_every_number_of_rows_drops_nothing():
    moe, x = layer(capacity_factor=1e37), torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(2))
    y, routing = moe(x, Context(12, torch.tensor([7]), is_training=True))
    assert routing.n_dropped == 0 and torch.equal(y, moe(x, Context(12))[0])


def test_capacity_is_causal():
    # The reference computes every row with every expert: its rounding does not depend on the number of rows.
    model, x = model_of({"capacity_factor": 0.6}, "reference"), random_tokens(2)
    other = x.clone()
    other[1, 4:] = 63 - other[1, 4:]
    outcomes = []
    for tokens in (x, other):
        hidden, routings = model._hidden(
            tokens, None, Context(16, torch.tensor([1, 2]), is_training=True), model.attention
        )
        outcomes.append(hidden)
        assert all(routing.n_dropped > 0 for routing in routings.values())
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert torch.equal(outcomes[0][1, :4], outcomes[1][1, :4])
    assert not torch.equal(outcomes[0][1, 4:], outcomes[1][1, 4:])


def test_jitter_differs_by_sample_token_channel_layer_and_step_and_is_off_in_evaluation():
    key_B = torch.tensor([5, 6, 5 + (1 << 40)])
    noise = uniform_from_keys(key_B, 50, 16)
    assert noise.min() >= 0 and noise.max() < 1
    assert noise.mean() == pytest.approx(0.5, abs=0.02) and noise.std() == pytest.approx(12**-0.5, abs=0.02)
    assert noise.unique().numel() > 0.999 * noise.numel()
    assert torch.equal(uniform_from_keys(key_B[1:2], 50, 16)[0], noise[1])
    assert not torch.equal(uniform_from_keys(Context(1, key_B).for_layer(1).key_B, 50, 16), noise)
    flat = torch.corrcoef(noise.flatten(1))
    assert (flat - torch.eye(3)).abs().max() < 0.1

    moe = layer(jitter=0.3)
    x = torch.randn(1, 200, 16, generator=torch.Generator().manual_seed(2)) + 1
    router_inputs = []
    moe.router.register_forward_pre_hook(lambda _, args: router_inputs.append(args[0]))
    moe(x, Context(1, key_B[:1], is_training=True))
    ratio = router_inputs[0].view_as(x) / x
    assert ratio.min() == pytest.approx(0.7, abs=0.01) and ratio.max() == pytest.approx(1.3, abs=0.01)
    plain = layer()
    assert torch.equal(moe(x, Context(200))[0], plain(x, Context(200))[0])
    assert not torch.equal(moe(x, Context(200, key_B[:1], is_training=True))[0], plain(x, Context(200))[0])


def test_activation_checkpointing_counts_no_token_twice_and_draws_the_same_noise():
    outcomes = []
    for recompute in (False, True):
        model, x = model_of({"jitter": 0.2, "balance": "both"}), random_tokens()
        if recompute:
            for block in model.blocks:
                forward = block.forward
                block.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
        loss, metrics = model(Batch(x, x, torch.arange(4), x.numel()))
        loss.backward()
        metrics = model.finish_step(metrics)
        assert metrics["expert_count.0"].sum() == 2 * x.numel()
        outcomes.append([loss, *metrics.values(), *(p.grad for p in model.parameters())])
        outcomes[-1] += [block.ffn.selection_bias for block in model.blocks]
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.filterwarnings("ignore")  # compilers warn
@pytest.mark.parametrize(("kernel", "dtype"), [("loop", torch.float32), GROUPED_BF16], ids=str)
@pytest.mark.parametrize("ffn", [{}, EVERYTHING], ids=["default", "everything"])
def test_a_block_compiles_without_a_graph_break_and_computes_the_same(ffn, kernel, dtype):
    model, plain = model_of(ffn, kernel, dtype), model_of(ffn, kernel, dtype)
    torch._dynamo.reset()
    counters.clear()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for seed in (3, 4, 5):  # with different numbers of rows per expert
        x = torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(seed))
        outcomes = []
        for each in (model, plain):
            loss, metrics = each(Batch(x, x, torch.arange(4), x.numel()))
            outcomes.append([loss, *metrics.values(), *torch.autograd.grad(loss, list(each.parameters()))])
        for ours, theirs in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert counters["stats"]["unique_graphs"] <= 2


def test_an_evaluation_has_no_auxiliary_terms():
    x, losses = random_tokens(), []
    for weight in (1e-3, 10.0):
        model = model_of({"balance": "both", "switch_weight": weight, "z_loss_weight": weight, "jitter": 0.5})
        loss, metrics = model(Batch(x, x, n_targets=x.numel()))
        losses.append(metrics["loss_sum"] / x.numel())
        assert loss > losses[-1]
    assert losses[0] == losses[1]
    logits = model.logits(x)
    torch.testing.assert_close(losses[0], F.cross_entropy(logits.flatten(0, 1), x.flatten()))


@pytest.mark.parametrize("ffn", [{}, {"n_experts": 16, "top_k": 4, "n_shared": 2, "gated": True}], ids=str)
def test_flops_equal_those_that_pytorch_counts(ffn):
    """Compare all but attention (PyTorch counts the masked half too) and the head (computed twice)."""
    model, x = model_of(ffn, n_embd=32, tie_head=False, bias=False), random_tokens()

    def product(*shapes, out_shape, **_):  # noqa: ARG001 (PyTorch's signature)
        (n_rows, width), other = shapes[:2]  # R rows times matrices, or times R other rows
        return 2 * n_rows * width * other[-1]

    ops = torch.ops.training_kernels_experts
    with FlopCounterMode(display=False, custom_mapping={ops.loop_matmul: product, ops.loop_outer: product}) as counter:
        loss, _ = model(Batch(x, x, n_targets=x.numel()))
        loss.backward()
    counted = counter.get_flop_counts()
    inside = sum(sum(counted[f"GPT.blocks.{i}.ffn"].values()) for i in range(2))
    config = model.blocks[0].ffn.config
    matrices = 3 if config.gated else 2
    active = (config.top_k + config.n_shared) * matrices * config.hidden * 32 + 32 * config.n_experts
    assert inside == 2 * 6 * active * x.numel()
    assert model_stats(model.config).flops_per_token == 6 * 2 * (active + 4 * 32 * 32 + 8 * 32 * 2) + 6 * 32 * 64


def test_active_parameters_are_counted():
    model = model_of({"n_experts": 8, "top_k": 2, "n_shared": 1}, bias=False)
    stats = model_stats(model.config)
    total, active = stats.n_parameters, stats.n_active_parameters
    assert total == sum(p.numel() for p in model.parameters())
    assert total - active == 2 * 6 * 2 * 32 * 16


def test_routing_metrics_are_by_layer_and_over_all_layers():
    layers = {
        "expert_count": [[4.0, 4.0, 4.0, 4.0], [16.0, 0.0, 0.0, 0.0]],
        "dropped": [[0.0], [8.0]],
        "confidence": [[4.0], [8.0]],
        "z_loss": [[8.0], [16.0]],
        "bias_range": [[0.0], [0.25]],
    }
    metrics = {f"{name}.{i}": value for name, values in layers.items() for i, value in enumerate(values)}
    row = step_metrics(metrics | {"loss_sum": [8.0]}, 8, [2, 2])
    assert row["loss"] == 1
    assert row["expert_load"] == [[0.25] * 4, [1.0, 0.0, 0.0, 0.0]]
    assert row["expert_load_max"] == 4 and row["dead_experts"] == 3
    assert row["expert_entropy"] == 0 and row["router_bias_range"] == 0.25
    assert row["router_confidence"] == 0.75 and row["router_z_loss"] == 1.5 and row["dropped_share"] == 0.25
    assert row["router_layers"] == {
        "entropy": [pytest.approx(1), 0],
        "confidence": [0.5, 1.0],
        "z_loss": [1.0, 2.0],
        "bias_range": [0.0, 0.25],
        "dropped": [0.0, 0.5],
    }


def test_an_expert_is_dead_below_one_percent_or_a_tenth_of_its_even_share():
    assert dead_expert_threshold(4) == dead_expert_threshold(8) == 0.01
    assert dead_expert_threshold(64) == pytest.approx(0.1 / 64)
