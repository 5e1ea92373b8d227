"""The model is GPT-2, and each token depends on visible tokens only. Contracts run over all mechanisms."""

import math
from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch

from training.batch import Batch
from training.config import FeedForward, Mixer, ModelConfig
from training.kernels.attention.masks import Visibility, find_documents
from training.kernels.attention.table import ATTENTION_BACKENDS, DeviceInfo, auto_candidates, reason_unsupported
from training.model import FEED_FORWARDS, GPT, MIXERS, init_weights, model_stats
from training.model.attention import AttentionContext
from training.model.layers import BigramEmbedding, RMSNorm, _ShortConvolution, rotary_table, rotate
from training.model.metrics import step_metrics
from training.model.moe import MoE
from training.model.stats import parameter_kinds

BLOCKS = {
    "mlp": {},
    "gated": {"ffn": {"type": "mlp", "gated": True, "activation": "silu"}},
    "moe": {"ffn": {"type": "moe", "n_experts": 4, "hidden": 24}},
    "gated moe": {"ffn": {"type": "moe", "n_experts": 4, "hidden": 24, "gated": True, "activation": "relu2"}},
    "shared moe": {"ffn": {"type": "moe", "n_experts": 6, "top_k": 3, "n_shared": 2, "hidden": 12}},
    "one expert a token": {"ffn": {"type": "moe", "n_experts": 4, "hidden": 24, "top_k": 1}},
    "sigmoid moe": {
        "ffn": {"type": "moe", "n_experts": 4, "hidden": 24, "scoring": "sigmoid", "route_scale": 2.5, "n_shared": 1}
    },
    "qk_norm": {"mixer": {"qk_norm": True}},
    "grouped-query": {"mixer": {"n_kv_head": 2, "head_dim": 6}},
    "multi-query": {"mixer": {"n_kv_head": 1, "softcap": 2.0}},
    "unrotated": {"mixer": {"rope": False}},
    "latent": {"mixer": {"type": "latent", "kv_rank": 6, "rope_dim": 4}},
    "squeezed latent": {"mixer": {"type": "latent", "kv_rank": 6, "q_rank": 5, "rope_dim": 2, "value_dim": 7}},
    "differential": {"mixer": {"type": "differential"}},
    "gated attention": {"mixer": {"type": "gated", "n_kv_head": 2}},
    "short convolution": {"short_conv": 3, "ffn": {"type": "moe", "n_experts": 4, "hidden": 24}},
    "grouped differential": {"mixer": {"type": "differential", "n_kv_head": 2, "head_dim": 12, "qk_norm": True}},
}
WINDOWS = {
    "window": {"mixer": {"window": 5}},
    "latent window": {"mixer": {"type": "latent", "kv_rank": 6, "rope_dim": 4, "window": 5}},
    "differential window": {"mixer": {"type": "differential", "window": 5}},
    "gated window": {"mixer": {"type": "gated", "window": 5}},
}
STYLES = {
    "gpt2": {},
    "modern": {"position": "rope", "norm": "rmsnorm", "bias": False, "tie_head": False},
    "capped": {"position": "none", "logit_softcap": 3.0, "bigram_rows": 37},
}
CASES = list(product(BLOCKS, STYLES))


def build(block="mlp", style="gpt2", seed=0, **changes):
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 12, "vocab_size": 64}
    options = sizes | STYLES[style] | {"blocks": [(BLOCKS | WINDOWS)[block]]} | changes
    model = init_weights(GPT(ModelConfig.model_validate(options)), seed)
    for name, parameter in model.named_parameters():
        if name.endswith("taps") or name == "bigram.weight":  # they begin as zeros, which have no effect
            largest = 0.5 if name.endswith("taps") else 0.05  # embeddings have a standard deviation of 0.02
            parameter.data.copy_(torch.linspace(-largest, largest, parameter.numel()).view_as(parameter))
    return model


def tokens(batch=2, length=12, seed=0):
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("block", "style"), CASES)
def test_a_token_influences_itself_and_later_tokens_only(block, style):
    model, x = build(block, style), tokens(batch=1)
    embedded = model.wte(x).detach().requires_grad_()
    model.wte.forward = lambda _: embedded
    for t in range(12):
        (grad,) = torch.autograd.grad(model.logits(x)[0, t].square().sum(), embedded)
        seen = grad[0].abs().sum(dim=1) > 0
        assert seen.tolist() == [s <= t for s in range(12)]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("block", WINDOWS)
def test_a_window_reaches_exactly_its_tokens(block, style):
    model, x = build(block, style, n_layer=1), tokens(batch=1)
    embedded = model.wte(x).detach().requires_grad_()
    model.wte.forward = lambda _: embedded
    for t in range(12):
        (grad,) = torch.autograd.grad(model.logits(x)[0, t].square().sum(), embedded)
        seen = grad[0].abs().sum(dim=1) > 0
        assert seen.tolist() == [t - 5 < s <= t for s in range(12)]


@pytest.mark.parametrize(
    ("block", "style", "kernel"),
    [
        (block, style, name)
        for block, style, name in product(BLOCKS | WINDOWS, STYLES, auto_candidates(DeviceInfo("cpu")))
        if not reason_unsupported(
            name, build(block, style).blocks[0].mixer.spec, True, DeviceInfo("cpu"), torch.float32
        )
    ],
)
def test_packed_documents_equal_separate_ones(block, style, kernel):
    model, x = build(block, style), tokens(batch=2)
    model.attention = ATTENTION_BACKENDS[kernel]
    x[x == 0] = 1
    borders = [(4, 9), (1, 2)]
    for row, places in enumerate(borders):
        x[row, list(places)] = 0
    packed = model.logits(x, documents=find_documents(x, 0))
    for row, (a, b) in enumerate(borders):
        alone = [model.logits(part[None])[0] for part in x[row].tensor_split([a, b])]
        torch.testing.assert_close(packed[row], torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(packed, model.logits(x), rtol=1e-2, atol=1e-3)


def test_the_loss_over_packed_documents_is_that_of_their_logits():
    model, x = build(), tokens()
    apart = find_documents(x, int(x[0, 5]))
    _, metrics = model(Batch(x, x.roll(-1, 1), n_targets=24, documents=apart))
    log_p = model.logits(x, documents=apart).log_softmax(-1)
    expected = -log_p.gather(2, x.roll(-1, 1)[..., None]).sum()
    torch.testing.assert_close(metrics["loss_sum"], expected.detach())


@pytest.mark.parametrize(("block", "style"), [*CASES, *product(WINDOWS, STYLES)])
def test_padding_before_a_sample_changes_nothing(block, style):
    model, x = build(block, style), tokens(batch=3, length=9)
    n_padding = torch.tensor([2, 0, 5])
    cache = model.new_cache(n_padding)
    together = torch.cat([model.logits(part, cache) for part in x.split([6, 1, 2], dim=1)], dim=1)
    for row, n in enumerate(n_padding):
        torch.testing.assert_close(together[row, n:], model.logits(x[row : row + 1, n:])[0], rtol=1e-4, atol=1e-5)


def test_a_cache_keeps_the_selected_samples():
    model, x = build("latent", "modern"), tokens(batch=3)
    cache = model.new_cache(torch.tensor([1, 0, 2]))
    model.logits(x[:, :8], cache)
    rows = torch.tensor([2, 0, 2, 1])
    cache.select(rows)
    again = model.new_cache(torch.tensor([2, 1, 2, 0]))
    expected = model.logits(x[rows], again)[:, 8:]
    torch.testing.assert_close(model.logits(x[rows, 8:], cache), expected, rtol=1e-4, atol=1e-5)


def test_logits_are_bounded_by_the_softcap_and_keep_their_order():
    model, x = build(style="capped"), tokens()
    model.wte.weight.data *= 100
    capped = model.logits(x)
    model.config = model.config.model_copy(update={"logit_softcap": None})
    plain = model.logits(x)
    assert plain.abs().max() > 6 > 3 >= capped.abs().max()
    torch.testing.assert_close(capped, 3 * torch.tanh(plain / 3))


@pytest.mark.parametrize(("block", "style"), CASES)
def test_every_parameter_gets_a_gradient_from_the_text(block, style):
    model, x = build(block, style), tokens(batch=8)
    for module in model.modules():
        if isinstance(module, MoE):  # without auxiliary losses
            module.config = module.config.model_copy(update={"z_loss_weight": 0.0, "balance": "none"})
    loss, metrics = model(Batch(x, x.roll(-1, 1), n_targets=x.numel()))
    assert loss == metrics["loss_sum"] / x.numel()
    loss.backward()
    for name, parameter in model.named_parameters():
        # A key's bias shifts all scores of a query alike, which softmax ignores; GPT-2 has it all the same.
        smallest = 0.0 if name.endswith("key.bias") else 1e-7  # a gradient that is 0 in theory is 1e-10
        assert parameter.grad is not None and parameter.grad.norm() > smallest, name


@pytest.mark.parametrize(("block", "style"), CASES)
def test_the_first_loss_is_that_of_a_uniform_guess(block, style):
    model, x = build(block, style, vocab_size=512), tokens(batch=8)
    _, metrics = model(Batch(x, x.roll(-1, 1), n_targets=x.numel()))
    assert metrics["loss_sum"].item() / x.numel() == pytest.approx(math.log(512), abs=0.1)


@pytest.mark.parametrize(("block", "style"), CASES)
def test_a_cache_changes_nothing(block, style):
    model, x = build(block, style), tokens()
    cache = model.new_cache()
    parts = [model.logits(part, cache) for part in x.split([5, 4, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.logits(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("block", "style"), CASES)
def test_samples_of_a_batch_do_not_influence_each_other(block, style):
    model, x = build(block, style), tokens(batch=3)
    together = model.logits(x)
    for row in range(3):
        torch.testing.assert_close(model.logits(x[row : row + 1])[0], together[row], rtol=1e-4, atol=1e-5)


def test_the_taps_of_a_short_convolution_are_the_weighted_sum_of_the_last_tokens():
    model, x_BTC = build("short convolution"), torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    conv = model.blocks[0].conv_1
    expected = x_BTC.clone()
    for t, back in product(range(9), range(3)):
        if t >= back:
            expected[:, t] += conv.taps[back] * x_BTC[:, t - back]
    torch.testing.assert_close(conv(x_BTC, 9, None), expected)
    inputs = (
        x_BTC.double().requires_grad_(),
        conv.taps.double(),
        9,
        torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3], [0, 0, *range(7)]]),
    )
    assert torch.autograd.gradcheck(_ShortConvolution.apply, inputs)
    # At the rate of embeddings, without Muon and weight decay.
    assert {kind for name, kind in parameter_kinds(model).items() if name.endswith("taps")} == {"embedding"}
    fresh = init_weights(model, 0)
    plain = build("moe")
    plain.load_state_dict({name: value for name, value in fresh.state_dict().items() if "taps" not in name})
    assert torch.equal(fresh.logits(tokens()), plain.logits(tokens()))  # without an effect at first


def test_an_embedding_of_pairs_depends_on_the_token_before_in_the_same_document():
    table = BigramEmbedding(1000, 2)
    table.weight.data[:, 0] = torch.arange(1000.0)

    def rows(x, position=None):
        return table(torch.tensor([x]), len(x), position)[0, :, 0]

    first, second, third = rows([5, 7, 5])
    assert len({first.item(), second.item(), third.item()}) == 3  # nothing and 5, 5 and 7, 7 and 5
    assert torch.equal(rows([7, 5, 7, 5, 7, 5])[1:], torch.stack([third, second] * 3)[:5])
    assert rows([5, 7, 5], torch.tensor([[0, 1, 0]])).tolist() == [first, second, first]  # two documents
    assert torch.equal(table(torch.tensor([[5, 7, 5]], dtype=torch.int32), 3, None)[0, :, 0], rows([5, 7, 5]))
    pairs = table(torch.cartesian_prod(torch.arange(40), torch.arange(40)), 1, None)[:, 0, 0]
    assert 780 < len(pairs.unique()) < 820  # 1600 pairs in 1000 rows: 1000 x (1 - exp(-1.6)) = 798
    fresh = init_weights(build(style="capped"), 0)
    assert not fresh.bigram.weight.any()  # without an effect at first
    assert parameter_kinds(fresh)["bigram.weight"] == "vector"  # at the low rate, without weight decay


@pytest.mark.parametrize(("block", "style"), list(product(WINDOWS, STYLES)))
def test_a_cache_changes_nothing_in_a_window(block, style):
    test_a_cache_changes_nothing(block, style)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_configured_mechanism_is_built(block):
    config = ModelConfig.model_validate({"blocks": [BLOCKS[block]]}).blocks[0]
    assert type(config.mixer) in MIXERS
    assert type(config.ffn) in FEED_FORWARDS


def test_the_registries_cover_the_unions():
    for union, registry in ((FeedForward, FEED_FORWARDS), (Mixer, MIXERS)):
        tagged, _ = get_args(union)
        assert set(registry) == {get_args(variant)[0] for variant in get_args(tagged)}
    blocks = [ModelConfig.model_validate({"blocks": [block]}).blocks[0] for block in BLOCKS.values()]
    assert {type(block.mixer) for block in blocks} == set(MIXERS), "give each an entry in BLOCKS"
    assert {type(block.ffn) for block in blocks} == set(FEED_FORWARDS), "give each an entry in BLOCKS"


def test_masked_targets_do_not_count():
    model, x = build(), tokens()
    targets = x.roll(-1, 1)
    _, whole = model(Batch(x, targets, n_targets=24))
    targets[:, 6:] = -1
    _, first_half = model(Batch(x, targets, n_targets=24))
    targets = x.roll(-1, 1)
    targets[:, :6] = -1
    _, second_half = model(Batch(x, targets, n_targets=24))
    torch.testing.assert_close(first_half["loss_sum"] + second_half["loss_sum"], whole["loss_sum"])


def test_more_tokens_than_positions_raise_an_error_with_both_numbers():
    with pytest.raises(ValueError, match="13 tokens do not fit n_positions 12"):
        build().logits(tokens(length=13))


@pytest.mark.filterwarnings("ignore")  # compilers warn
@pytest.mark.parametrize("position", [torch.arange(6), torch.arange(12).view(2, 6) % 5], ids=["one for all", "each"])
def test_a_compiled_rotation_equals_the_eager_one_forward_and_backward(position):
    table = rotary_table(position, 8, 100.0)
    heads, direction = torch.randn(2, 2, 3, 6, 8, generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    outcomes = []
    for function in (rotate, torch.compile(rotate, backend="aot_eager", fullgraph=True)):
        x = heads.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()  # strided as after a projection
        y = function(x, table)
        assert y.stride() == x.stride()
        outcomes.append([y, *torch.autograd.grad(y, x, direction)])
    for plain, compiled in zip(*outcomes, strict=True):
        torch.testing.assert_close(plain, compiled)


@pytest.mark.parametrize("block", [block for block in BLOCKS if build(block, "modern").blocks[0].mixer.rotary_dim])
def test_rotary_positions_are_relative(block):
    mixer = build(block, "modern").blocks[0].mixer
    h = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(3))
    backend = ATTENTION_BACKENDS["reference"]
    mask = backend.build_mask(Visibility(6, 6, h.device))

    def at(start):
        return AttentionContext(rotary_table(torch.arange(start, start + 6), mixer.rotary_dim, 10000.0), mask, backend)

    here, there = (mixer(h, at(start), None) for start in (0, 5))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(here, mixer(h, AttentionContext(None, mask, backend), None), rtol=1e-3)


@pytest.mark.parametrize(("block", "style"), CASES)
def test_bfloat16_is_close_to_float32(block, style):
    model, x = build(block, style), tokens()
    exact = model.logits(x)
    model.dtype = torch.bfloat16
    if "moe" not in block:  # if two experts tie, rounding may choose the other
        torch.testing.assert_close(model.logits(x), exact, rtol=0.1, atol=0.03)
    assert model.logits(x).dtype == torch.float32
    assert model.logits(x).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 7, 64)], ids=str)
def test_rmsnorm_equals_pytorchs(shape, eps, dtype):
    """In float64 too, which has its own code path, and for strided views, as heads are."""
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(shape[-1], eps)
    norm.weight.data = torch.randn(shape[-1], generator=generator).to(dtype).float()
    x, direction = (
        torch.randn(shape[1], shape[0], *shape[2:], generator=generator).to(dtype).transpose(0, 1) for _ in range(2)
    )
    outcomes = []
    for computed in (dtype, torch.float64):
        leaf = x.to(computed).requires_grad_()
        y = norm(leaf)
        assert y.dtype == computed
        outcomes.append([y, *torch.autograd.grad(y, [leaf, norm.weight], direction.to(computed))])
    for ours, theirs in zip(*outcomes, strict=True):
        assert (ours - theirs).norm() <= (1e-6 if dtype == torch.float32 else 3e-3) * theirs.norm()
    with torch.no_grad():
        assert torch.equal(norm(x), outcomes[0][0])


def test_initial_weights_depend_on_seed_and_name_only():
    a, b, c = build(seed=1), build(seed=1, n_layer=1), build(seed=2)
    assert torch.equal(a.blocks[0].mixer.query.weight, b.blocks[0].mixer.query.weight)
    assert not torch.equal(a.wte.weight, c.wte.weight)
    assert not torch.equal(a.blocks[0].mixer.query.weight, a.blocks[0].mixer.key.weight)


def test_initial_deviations_are_those_of_gpt2():
    model = build("moe", n_embd=128, n_layer=8)
    moe = model.blocks[0].ffn
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert moe.experts.up.std().item() == pytest.approx(0.02, rel=0.05)
    assert moe.experts.down.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.blocks[0].mixer.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    mlp = build("gated", n_embd=128, n_layer=8).blocks[0].ffn
    assert mlp.up.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_counts_of_gpt2_124m():
    stats = model_stats(ModelConfig(vocab_size=50257))
    assert (stats.n_parameters, stats.n_active_parameters) == (124_439_808, 124_439_808)
    assert stats.flops_per_token == pytest.approx(0.855e9, rel=1e-3)


def test_active_parameters_are_those_of_a_dense_model_with_top_k_experts():
    moe = {"type": "moe", "n_experts": 8, "top_k": 2, "hidden": 32}
    sparse = model_stats(build(blocks=[{"ffn": moe}]).config)
    dense = model_stats(build(blocks=[{"ffn": moe | {"n_experts": 2}}]).config)
    routers = 2 * 32 * (8 - 2)
    assert sparse.n_active_parameters == dense.n_parameters + routers
    assert sparse.flops_per_token == dense.flops_per_token + 6 * routers


def test_step_metrics_are_per_target():
    model, x = build("moe"), tokens()
    _, metrics = model(Batch(x, x.roll(-1, 1), n_targets=24))
    metrics = model.finish_step(metrics)
    row = step_metrics({name: value.flatten().tolist() for name, value in metrics.items()}, 24, [2, 2])
    assert row["loss"] == pytest.approx(metrics["loss_sum"].item() / 24)
    assert np.sum(row["expert_load"], axis=1) == pytest.approx([1, 1])
    assert row["expert_load_max"] == pytest.approx(4 * np.max(row["expert_load"]))
