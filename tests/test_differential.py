"""Differential attention equals its definition in the paper, computed one query of one head at a time."""

import math

import pytest
import torch
from torch import Tensor

from training.config import ModelConfig
from training.kernels.attention.masks import Visibility
from training.kernels.attention.table import ATTENTION_BACKENDS, device_info, reason_unsupported
from training.model import model_stats
from training.model.attention import AttentionContext
from training.model.differential import DifferentialAttention
from training.model.layers import rotary_table

CPU = torch.device("cpu")
OPTIONS = [
    {},
    {"n_kv_head": 2},
    {"n_kv_head": 1, "head_dim": 12},
    {"qk_norm": True},
    {"window": 3},
    {"rope": False, "lambda_init": 0.0},
    {"softcap": 0.5, "lambda_init": 0.3},
]


def layer(options) -> tuple[DifferentialAttention, ModelConfig]:
    """Return the layer, with random parameters everywhere, and its model's config."""
    blocks = [{"mixer": {"type": "differential"} | options}]
    model = ModelConfig.model_validate({"n_embd": 32, "n_head": 4, "position": "rope", "blocks": blocks})
    mixer = DifferentialAttention(model.blocks[0].mixer, model)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in mixer.named_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name)
    return mixer, model


def rotate(x_D: Tensor, position: int) -> Tensor:
    """Rotate each pair (i, i + D/2), as a complex number, by position x 10000^(-2i/D)."""
    half = len(x_D) // 2
    pairs = torch.complex(x_D[:half], x_D[half:])
    angle = position * 10000.0 ** (-torch.arange(half) / half)
    pairs = pairs * torch.polar(torch.ones(half), angle)
    return torch.cat([pairs.real, pairs.imag])


def normalize(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def by_query(mixer: DifferentialAttention, model: ModelConfig, x_BTC: Tensor) -> Tensor:
    """Compute the layer by the paper's definition (arXiv:2410.05258 eq. 1, 3), query by query, key by key."""
    config, n_head = model.blocks[0].mixer, model.n_head
    n_kv_head, width = config.n_kv_head or n_head, config.head_dim or model.n_embd // n_head
    half = width // 2
    a, b = mixer.exponents
    lambda_ = a.exp() - b.exp() + config.lambda_init

    def vector(projection, norm, token: Tensor, position: int, softmax: int, head: int, n: int) -> Tensor:
        """Return the query or key of one head of n, of the first (0) or second (1) softmax."""
        start = (softmax * n + head) * half
        z = projection.weight[start : start + half] @ token + projection.bias[start : start + half]
        z = normalize(z, norm.weight, model.norm_eps) if config.qk_norm else z
        return rotate(z, position) if config.rope else z

    def result(sample: Tensor, t: int, h: int) -> Tensor:
        """Return the result of head h for query t."""
        g = h * n_kv_head // n_head
        visible = range(max(0, t - (config.window or t + 1) + 1), t + 1)
        rows = slice(g * width, (g + 1) * width)
        values = [mixer.value.weight[rows] @ sample[s] + mixer.value.bias[rows] for s in visible]
        y = torch.zeros(width)
        for softmax, sign in ((0, 1.0), (1, -lambda_)):
            q = vector(mixer.query, mixer.query_norm, sample[t], t, softmax, h, n_head)
            keys = [vector(mixer.key, mixer.key_norm, sample[s], s, softmax, g, n_kv_head) for s in visible]
            scores = [(q * k).sum() / math.sqrt(half) for k in keys]
            if config.softcap:
                scores = [config.softcap * (score / config.softcap).tanh() for score in scores]
            total = sum(score.exp() for score in scores)
            y = y + sign * sum(score.exp() / total * v for score, v in zip(scores, values, strict=True))
        return normalize(y, mixer.head_norm.weight, model.norm_eps) * (1 - config.lambda_init)

    rows = [
        mixer.out.weight @ torch.cat([result(sample, t, h) for h in range(n_head)]) + mixer.out.bias
        for sample in x_BTC
        for t in range(len(sample))
    ]
    return torch.stack(rows).view_as(x_BTC)


def outputs(function, mixer, x_BTC: Tensor) -> dict[str, Tensor]:
    """Return the result, and the gradients of the input and of every parameter."""
    x, direction = x_BTC.clone().requires_grad_(), torch.randn(x_BTC.shape, generator=torch.Generator().manual_seed(5))
    y = function(x)
    names = [name for name, _ in mixer.named_parameters()]
    return {
        "y": y,
        **dict(zip(["x", *names], torch.autograd.grad(y, [x, *mixer.parameters()], direction), strict=True)),
    }


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_layer_and_every_gradient_equal_those_of_the_paper_on_every_back_end(options):
    mixer, model = layer(options)
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    theirs = outputs(lambda x: by_query(mixer, model, x), mixer, x)
    able = [
        name
        for name in ATTENTION_BACKENDS
        if reason_unsupported(name, mixer.spec, False, device_info(CPU), x.dtype) is None
    ]
    assert "reference" in able
    for name in able:
        backend, config = ATTENTION_BACKENDS[name], model.blocks[0].mixer
        rotation = rotary_table(torch.arange(6), mixer.rotary_dim, 10000.0) if config.rope else None
        context = AttentionContext(rotation, backend.build_mask(Visibility(6, 6, CPU, config.window)), backend)
        ours = outputs(lambda x, context=context: mixer(x, context, None), mixer, x)
        for what, expected in theirs.items():
            rounding = 1e-5 * (1 + expected.norm().item())
            torch.testing.assert_close(
                ours[what], expected, rtol=1e-4, atol=rounding, msg=lambda m, at=(name, what): f"{at}: {m}"
            )


def test_it_has_the_parameters_of_plain_attention_and_ten_more():
    sizes = {"n_layer": 1, "n_head": 4, "n_embd": 32, "n_positions": 8, "vocab_size": 64}
    plain, ours = (
        model_stats(ModelConfig.model_validate(sizes | {"blocks": [{"mixer": {"type": kind, "n_kv_head": 2}}]}))
        for kind in ("attention", "differential")
    )
    extra = 2 + 8  # the exponents and the norm of a head
    assert ours.n_parameters == plain.n_parameters + extra
    # A visible token costs two scores of half the width and two results: 1.5 times plain attention.
    per_token = 6 * 8 * 32
    assert plain.flops_per_token + per_token == ours.flops_per_token


def test_equal_softmaxes_cancel():
    mixer, _ = layer({"rope": False, "lambda_init": 0.5})
    mixer.exponents.data = torch.tensor([0.5, 0.0]).add(1).log()  # lambda: 1.5 - 1 + 0.5
    for projection in (mixer.query, mixer.key):  # make the second softmax equal to the first
        projection.weight.data[16:], projection.bias.data[16:] = projection.weight.data[:16], projection.bias.data[:16]
    backend = ATTENTION_BACKENDS["reference"]
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(1))
    y = mixer(x, AttentionContext(None, backend.build_mask(Visibility(6, 6, CPU)), backend), None)
    torch.testing.assert_close(y, mixer.out.bias.expand_as(y))


@pytest.mark.parametrize(
    ("options", "position", "message"),
    [
        ({"head_dim": 6}, "rope", "two halves and rope need a multiple of 4, not 6"),
        ({"head_dim": 7}, "learned", "two halves need a multiple of 2, not 7"),
        ({"head_dim": 8, "n_kv_head": 3}, "rope", "3 does not divide n_head 4"),
    ],
)
def test_sizes_that_do_not_fit_raise_an_error_with_the_number(options, position, message):
    blocks = [{"mixer": {"type": "differential"} | options}]
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate({"n_head": 4, "n_embd": 32, "position": position, "blocks": blocks})
    fine = {"type": "differential", "head_dim": 6, "rope": False}
    ModelConfig.model_validate({"n_head": 4, "n_embd": 32, "position": "rope", "blocks": [{"mixer": fine}]})
