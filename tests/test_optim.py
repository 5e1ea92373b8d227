"""Optimizers compute what their papers say, on the right parameters; contracts over the registries."""

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from training.config import (
    AdamWConfig,
    AverageConfig,
    Config,
    ConstantSchedule,
    CosineSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    LionConfig,
    MuonConfig,
    OptimConfig,
    ScheduleConfig,
    WSDSchedule,
)
from training.optim.muon import Muon, orthogonalize
from training.optim.optimizer import OPTIMIZERS, Optimizer, state_bytes
from training.optim.parameters import PARAMETER_KINDS
from training.optim.schedule import SCHEDULES, lr_factor

SHAPES = {"matrix": (8, 4), "experts": (3, 4, 8), "wte": (16, 4), "router": (3, 4), "norm": (4,)}
KINDS = {"matrix": "matrix", "experts": "matrix", "wte": "embedding", "router": "router", "norm": "vector"}


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def set_gradients(named, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in named.values():
        p.grad = torch.randn(p.shape, generator=generator)


def variants(option):
    """Return the config classes of a union in the configuration."""
    union = get_args(Config.model_fields[option].annotation)
    return [get_args(tagged)[0] for tagged in union]


# --- contracts: every optimizer, every schedule ------------------------------------------------------


def test_the_registries_cover_the_unions():
    assert set(OPTIMIZERS) == set(variants("optim"))
    assert set(SCHEDULES) == set(variants("schedule"))
    assert all(set(classes) == set(PARAMETER_KINDS) for classes in OPTIMIZERS.values())


def test_options_that_the_training_loop_reads_come_from_base_classes():
    assert all(issubclass(config, OptimConfig) for config in OPTIMIZERS)
    assert all(issubclass(config, ScheduleConfig) for config in SCHEDULES)


def run_steps(named, optimizer, seeds):
    for seed in seeds:
        set_gradients(named, seed)
        optimizer.step(lr_factor=1.0)


@pytest.mark.parametrize("config_class", OPTIMIZERS, ids=lambda c: c.__name__)
def test_every_optimizer_trains_and_creates_the_state_that_it_declares(config_class):
    named = parameters()
    optimizer = Optimizer(config_class(), named.items(), KINDS)
    before = {name: p.detach().clone() for name, p in named.items()}
    expected_bytes = state_bytes(config_class(), {name: p.shape for name, p in named.items()}, KINDS)
    assert sum(tensor.nbytes for tensor in optimizer.allocate_missing_state()) == expected_bytes
    run_steps(named, optimizer, [1, 2, 3])
    for name, p in named.items():
        assert p.isfinite().all() and not torch.equal(p, before[name]), name
    state = optimizer.state_dict()
    assert sum(tensor.nbytes for tensor in state.values() if tensor.ndim) == expected_bytes
    assert optimizer.allocate_missing_state() == []


@pytest.mark.parametrize("config_class", OPTIMIZERS, ids=lambda c: c.__name__)
def test_a_restored_optimizer_continues_bit_for_bit(config_class):
    uninterrupted = parameters()
    run_steps(uninterrupted, Optimizer(config_class(), uninterrupted.items(), KINDS), [1, 2, 3, 4])

    first = parameters()
    stopped = Optimizer(config_class(), first.items(), KINDS)
    run_steps(first, stopped, [1, 2])
    second = {name: nn.Parameter(p.detach().clone()) for name, p in first.items()}
    restored = Optimizer(config_class(), second.items(), KINDS)
    restored.load_state_dict({key: tensor.clone() for key, tensor in stopped.state_dict().items()})
    run_steps(second, restored, [3, 4])
    for name, p in uninterrupted.items():
        assert torch.equal(p, second[name]), name


@pytest.mark.parametrize("config_class", OPTIMIZERS, ids=lambda c: c.__name__)
def test_the_average_follows_the_weights_and_is_restored(config_class):
    """It begins as a copy, does not change training, and takes part in `averaged` updates only."""
    plain, named, config = parameters(), parameters(), config_class(average=AverageConfig(decay=0.75))
    run_steps(plain, Optimizer(config_class(), plain.items(), KINDS), [1, 2, 3, 4])
    optimizer, expected = Optimizer(config, named.items(), KINDS), None
    size = state_bytes(config, {name: p.shape for name, p in named.items()}, KINDS)
    assert sum(tensor.nbytes for tensor in optimizer.allocate_missing_state()) == size
    for seed in (1, 2, 3, 4):
        set_gradients(named, seed)
        optimizer.step(lr_factor=1.0, is_averaged=seed > 1)
        weights = {name: p.detach().double() for name, p in named.items()}
        if seed == 1:
            assert optimizer.averages == {}
        elif expected is None:
            expected = weights
        else:
            expected = {name: 0.75 * value + 0.25 * weights[name] for name, value in expected.items()}
    assert all(torch.equal(p, plain[name]) for name, p in named.items())
    assert all(torch.allclose(optimizer.averages[name].double(), expected[name], atol=1e-6) for name in named)
    assert all(optimizer.averages[name].dtype == torch.float32 for name in named)
    state = {key: tensor.clone() for key, tensor in optimizer.state_dict().items()}
    assert sum(tensor.nbytes for tensor in state.values() if tensor.ndim) == size
    restored = Optimizer(config, parameters().items(), KINDS)
    restored.load_state_dict(state)
    assert all(torch.equal(restored.averages[name], optimizer.averages[name]) for name in named)
    without = Optimizer(config_class(), parameters().items(), KINDS)
    without.load_state_dict(state)
    assert without.averages == {}
    begins_later = {key: tensor for key, tensor in state.items() if not key.endswith("/average")}
    restored.averages = {}
    restored.load_state_dict(begins_later)
    assert restored.averages == {}
    del state["norm/average"]
    with pytest.raises(KeyError, match="average of norm"):
        restored.load_state_dict(state)


@pytest.mark.parametrize("config_class", OPTIMIZERS, ids=lambda c: c.__name__)
def test_state_of_other_parameters_is_rejected_by_name(config_class):
    named = parameters()
    optimizer = Optimizer(config_class(), named.items(), KINDS)
    run_steps(named, optimizer, [1])
    state = optimizer.state_dict()
    missing = next(key for key in sorted(state) if key.startswith("norm/"))
    del state[missing]
    with pytest.raises(KeyError, match=f"optimizer state {missing}"):
        Optimizer(config_class(), parameters().items(), KINDS).load_state_dict(state)


def schedule_options(config_class):
    required = {name: 40 for name, field in config_class.model_fields.items() if field.is_required()}
    required |= {names[0]: 40 for names, default in config_class.alternatives if default is None}
    return config_class(warmup_steps=10, **required)


@pytest.mark.parametrize("config_class", SCHEDULES, ids=lambda c: c.__name__)
def test_every_schedule_warms_up_to_one_and_stays_between_zero_and_one(config_class):
    config = schedule_options(config_class)
    factors = [lr_factor(config, step, 100) for step in range(100)]
    assert factors[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert factors[10] == pytest.approx(1.0)
    assert all(a < b for a, b in pairwise(factors[:11]))
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert all(0 <= factor <= 1 for factor in factors)
    if hasattr(config, "final_ratio"):
        assert factors[99] == config.final_ratio < factors[98]


@pytest.mark.parametrize("config_class", SCHEDULES, ids=lambda c: c.__name__)
@settings(max_examples=30, deadline=None)
@example(steps=2, warmup=1, decay=1, ratio=0.5)
@given(steps=st.integers(1, 300), warmup=st.integers(0, 400), decay=st.integers(1, 400), ratio=st.floats(0, 1))
def test_every_schedule_fits_into_any_run_and_ends_at_its_final_ratio(config_class, steps, warmup, decay, ratio):
    """The update after the warm-up has the peak, and the last one `final_ratio`; a run of one step is at the peak."""
    values = {"warmup_steps": warmup, "decay_steps": decay, "final_ratio": ratio}
    options = {name: value for name, value in values.items() if name in config_class.model_fields}
    config = config_class(**options).fitted(steps)
    assert all(getattr(config, name) <= value for name, value in options.items())
    length = config.warmup_steps + getattr(config, "decay_steps", 0)
    assert length <= steps and config.warmup_steps < steps and config == config.fitted(steps)
    needed = warmup + decay if "decay_steps" in options else warmup + 1
    assert needed > steps or config == config_class(**options)
    factors = [lr_factor(config, step, steps) for step in range(steps)]
    assert all(0 <= factor <= 1 for factor in factors)
    peak = config.warmup_steps
    assert all(a < b for a, b in pairwise(factors[: peak or 1]))
    if "final_ratio" in options and steps > 1:
        assert factors[-1] == ratio
    if peak < steps - 1 or steps == 1:
        assert factors[peak] == 1.0
        assert all(a >= b for a, b in pairwise(factors[peak:]))


def test_a_decay_of_one_step_is_the_last_update():
    config = WSDSchedule(warmup_steps=2, decay_steps=1, final_ratio=0.25)
    assert [lr_factor(config, step, 6) for step in range(6)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 0.25])


def test_a_short_run_shortens_warm_up_and_decay_alike():
    wsd, cosine = WSDSchedule(warmup_steps=10, decay_steps=240), CosineSchedule(warmup_steps=10)
    assert wsd.fitted(400) == wsd and wsd.fitted(250) == wsd
    assert wsd.fitted(50) == WSDSchedule(warmup_steps=2, decay_steps=48)
    assert wsd.fitted(3) == WSDSchedule(warmup_steps=0, decay_steps=3)
    assert cosine.fitted(11) == cosine
    assert cosine.fitted(10).warmup_steps == 4
    assert [cosine.fitted(steps).warmup_steps for steps in (1, 2, 3)] == [0, 0, 1]


# --- results of each ----------------------------------------------------------------------------------


def test_adamw_is_the_paper():
    config = AdamWConfig(learning_rate=0.1, weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-6)
    named = parameters()
    optimizer = Optimizer(config, named.items(), KINDS)
    expected = {name: p.detach().clone() for name, p in named.items()}
    mean = {name: torch.zeros_like(p) for name, p in expected.items()}
    square = {name: torch.zeros_like(p) for name, p in expected.items()}
    for t in (1, 2, 3):
        set_gradients(named, seed=t)
        for name, w in expected.items():
            g = named[name].grad
            mean[name] = 0.8 * mean[name] + 0.2 * g
            square[name] = 0.9 * square[name] + 0.1 * g * g
            if KINDS[name] in ("matrix", "router"):
                w *= 1 - 0.1 * 0.5 * 0.3
            w -= 0.1 * 0.5 * (mean[name] / (1 - 0.8**t)) / ((square[name] / (1 - 0.9**t)).sqrt() + 1e-6)
        optimizer.step(lr_factor=0.5)
        for name, w in expected.items():
            torch.testing.assert_close(named[name].data, w, rtol=1e-5, atol=1e-6)


def test_lion_is_the_paper():
    """arXiv:2302.06675 algorithm 2, for three steps, with decay on matrices only."""
    config = LionConfig(learning_rate=0.01, weight_decay=0.5)
    named = parameters()
    optimizer = Optimizer(config, named.items(), KINDS)
    expected = {name: p.detach().clone() for name, p in named.items()}
    average = {name: torch.zeros_like(p) for name, p in named.items()}
    for seed in (1, 2, 3):
        set_gradients(named, seed)
        optimizer.step(lr_factor=0.5)
        for name, p in named.items():
            rate, decay = 0.5 * 0.01, 0.5 if KINDS[name] in ("matrix", "router") else 0.0
            update = (0.9 * average[name] + 0.1 * p.grad).sign() + decay * expected[name]
            expected[name] = expected[name] - rate * update
            average[name] = 0.99 * average[name] + 0.01 * p.grad
    for name, p in named.items():
        torch.testing.assert_close(p.detach(), expected[name])


def test_embeddings_have_a_learning_rate_of_their_own():
    named = parameters()
    before = {name: p.detach().clone() for name, p in named.items()}
    config = AdamWConfig(learning_rate=1e-3, embedding_learning_rate=0.1, weight_decay=0.0)
    optimizer = Optimizer(config, named.items(), KINDS)
    set_gradients(named, seed=1)
    optimizer.step(lr_factor=1.0)
    moved = {name: (p - before[name]).abs().max().item() for name, p in named.items()}
    assert moved["wte"] == pytest.approx(0.1, rel=1e-3)  # Adam's first step is as large as the learning rate
    assert moved["matrix"] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("shape", [(6, 6), (4, 12), (12, 4), (5, 16, 8)])
def test_orthogonalize_keeps_directions_and_evens_out_singular_values(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh = torch.linalg.svd(g, full_matrices=False)
    ours = u.mT @ orthogonalize(g.view(-1, *shape[-2:]), 5, torch.float32).view(shape) @ vh.mT
    diagonal = torch.diagonal(ours, dim1=-2, dim2=-1)
    big = s > 0.05 * s.amax(dim=-1, keepdim=True)
    assert diagonal[big].min() > 0.6 and diagonal.max() < 1.3
    torch.testing.assert_close(ours, torch.diag_embed(diagonal), rtol=0, atol=1e-3)


def build_muon(p, weight_decay=0.0):
    config = MuonConfig(muon_learning_rate=0.1, momentum=0.9, weight_decay=weight_decay, ns_steps=5)
    return Muon(config, {"matrix": [p]}, torch.float32, None)


@pytest.mark.parametrize(("shape", "scale"), [((8, 4), math.sqrt(2)), ((4, 8), 1.0)], ids=["tall", "wide"])
def test_muon_is_momentum_orthogonalized_and_scaled(shape, scale):
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    expected, average = p.detach().clone(), torch.zeros(shape)
    optimizer = build_muon(p, weight_decay=0.2)
    for t in (1, 2):
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(t))
        average = 0.9 * average + 0.1 * p.grad
        nesterov = 0.1 * p.grad + 0.9 * average
        update = orthogonalize(nesterov[None], 5, torch.float32)[0]
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * scale * update
        optimizer.step()
        torch.testing.assert_close(p.data, expected, rtol=1e-5, atol=1e-6)


def test_muon_treats_each_expert_as_a_matrix_of_its_own():
    g = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    stacked, single = nn.Parameter(torch.zeros(3, 4, 8)), [nn.Parameter(torch.zeros(4, 8)) for _ in range(3)]
    stacked.grad = g
    build_muon(stacked).step()
    for i, p in enumerate(single):
        p.grad = g[i] * (i + 1)  # the scale of a gradient does not matter
        build_muon(p).step()
        torch.testing.assert_close(stacked[i].data, p.data, rtol=1e-4, atol=1e-5)


def test_muon_does_not_step_along_rounding_errors():
    g = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    g[1] *= 1e-12 / g[1].norm()  # of a matrix whose gradient is zero, but for the order of sums
    update = orthogonalize(g, 5, torch.float32)
    assert update[1].norm() < 2e-5 * update[0].norm()
    assert torch.equal(update[:1], orthogonalize(g[:1], 5, torch.float32))
    small = orthogonalize(g[:1] * (1.01e-7 / g[0].norm()), 5, torch.float32)
    torch.testing.assert_close(small, update[:1], rtol=1e-4, atol=1e-5)  # above the floor the scale does not matter


def test_a_zero_gradient_moves_nothing():
    p = nn.Parameter(torch.ones(2, 4, 4))
    p.grad = torch.zeros_like(p)
    build_muon(p).step()
    assert torch.equal(p.data, torch.ones(2, 4, 4))


def test_muon_updates_matrices_and_adamw_the_rest():
    named = parameters()
    muon, adamw = Optimizer(MuonConfig(), named.items(), KINDS).optimizers
    assert {id(p) for g in muon.param_groups for p in g["params"]} == {id(named["matrix"]), id(named["experts"])}
    assert {id(p) for g in adamw.param_groups for p in g["params"]} == {id(named[n]) for n in ("wte", "router", "norm")}


def test_known_points_of_the_schedules():
    cosine = CosineSchedule(warmup_steps=10, final_ratio=0.1)
    linear = LinearSchedule(warmup_steps=10, final_ratio=0.1)
    wsd = WSDSchedule(warmup_steps=10, decay_steps=40, final_ratio=0.1)
    assert lr_factor(cosine, 55, 101) == pytest.approx(0.55)
    assert lr_factor(cosine, 32, 101) > lr_factor(linear, 32, 101)
    assert lr_factor(linear, 55, 101) == pytest.approx(0.55)
    assert lr_factor(wsd, 59, 100) == 1.0 > lr_factor(wsd, 60, 100)
    assert lr_factor(wsd, 79, 100) == pytest.approx(0.55)
    assert lr_factor(ConstantSchedule(warmup_steps=10), 99, 100) == 1.0
    inverse = InverseSqrtSchedule(warmup_steps=10)
    assert lr_factor(inverse, 43, 1000) == pytest.approx(0.5)  # 44 steps, four times the warm-up of 11
