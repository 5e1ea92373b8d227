"""Gated attention against the paper's formula, written head by head."""

import torch
import torch.nn.functional as F

from training.config import ModelConfig
from training.kernels.attention.masks import Visibility
from training.kernels.attention.table import ATTENTION_BACKENDS
from training.model.attention import AttentionContexts
from training.model.gated import GatedAttention


def reference(mixer: GatedAttention, x_BTC: torch.Tensor) -> torch.Tensor:
    """Compute arXiv:2505.06708 eq. 5 with an elementwise gate after the attention (their G1), one head at a time."""
    n_head, width = mixer.spec.n_head, mixer.spec.head_dim
    n_tokens = x_BTC.shape[1]
    mask = torch.ones(n_tokens, n_tokens).tril().bool()
    heads = []
    for head in range(n_head):
        shared = head // (n_head // mixer.spec.n_kv_head)
        rows, shared_rows = (slice(i * width, (i + 1) * width) for i in (head, shared))
        q = F.linear(x_BTC, mixer.query.weight[rows], mixer.query.bias[rows])
        k = F.linear(x_BTC, mixer.key.weight[shared_rows], mixer.key.bias[shared_rows])
        v = F.linear(x_BTC, mixer.value.weight[shared_rows], mixer.value.bias[shared_rows])
        scores = (q @ k.mT / width**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
        gate = torch.sigmoid(F.linear(x_BTC, mixer.gate.weight[rows], mixer.gate.bias[rows]))
        heads.append(gate * (scores @ v))
    return F.linear(torch.cat(heads, dim=-1), mixer.out.weight, mixer.out.bias)


def test_outputs_and_all_gradients_equal_the_formula():
    torch.manual_seed(0)
    model = ModelConfig.model_validate(
        {"n_embd": 32, "n_head": 4, "n_positions": 8, "blocks": [{"mixer": {"type": "gated", "n_kv_head": 2}}]}
    )
    mixer = GatedAttention(model.blocks[0].mixer, model)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x_BTC = torch.randn(2, 8, 32, requires_grad=True)
    visibility = Visibility(8, 8, x_BTC.device)
    context = AttentionContexts(visibility, ATTENTION_BACKENDS["reference"], model.rope_theta).for_mixer(mixer)
    ours, theirs = mixer(x_BTC, context, None), reference(mixer, x_BTC)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    inputs = [x_BTC, *mixer.parameters()]
    weight = torch.randn_like(ours)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, weight), torch.autograd.grad(theirs, inputs, weight), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
