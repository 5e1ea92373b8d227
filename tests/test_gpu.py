"""What only a GPU can tell: `make test-gpu`. Attention back-ends at real widths, and runs that repeat to the bit."""

from __future__ import annotations

import pytest
import torch
from conftest import tensors
from torch._dynamo.utils import counters

from training.config import BlockConfig, ModelConfig, ParallelConfig
from training.kernels import ATTENTION, Call, choose
from training.kernels.attention import Seen, documents, limits, machine, why_not
from training.model import GPT, needs

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
NAMES = [name for name in ATTENTION if "cuda" in (ATTENTION[name].on or {})]
CALLS = {
    "GPT-2": Call(12, 12, 64, 64),
    "grouped-query": Call(8, 2, 128, 128),
    "multi-query": Call(4, 1, 96, 96),
    "latent": Call(4, 4, 192, 128),
    "window": Call(4, 4, 64, 64, window=100),
    "window of two": Call(4, 4, 64, 64, window=2),
    "soft-cap": Call(4, 2, 64, 64, softcap=15.0),
    "scale": Call(4, 4, 64, 64, scale=0.2),
    "everything": Call(8, 4, 128, 64, window=70, softcap=10.0, scale=0.1),
}
ROUNDING = {torch.float16: 4e-3, torch.bfloat16: 2e-2}

over_calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
over_packing = pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
over_names = pytest.mark.parametrize("name", NAMES)


def skip_what_it_cannot(name, call, packed, dtype):
    if (problem := why_not(name, call, packed, machine(CUDA), dtype)) is not None:
        pytest.skip(f"{name}: {problem}")


def inputs_of(call, packed, dtype, n_samples, n_tokens):
    """(queries, keys, values and gradient of the result as projections have them (B, T, H, D), who sees whom)."""
    generator = torch.Generator().manual_seed(n_tokens)
    tokens = torch.randint(0, 40, (n_samples, n_tokens), generator=generator).to(CUDA)
    heads = [
        (call.n_head, call.head_dim),
        (call.n_kv_head, call.head_dim),
        (call.n_kv_head, call.value_dim),
        (call.n_head, call.value_dim),
    ]
    made = [torch.randn(n_samples, n_tokens, *head, generator=generator).to(CUDA, dtype) for head in heads]
    return made, Seen(n_tokens, n_tokens, CUDA, call.window, documents(tokens, 0) if packed else None)


def outcome(name, call, made, seen, dtype):
    """The result and the gradients of queries, keys and values."""
    backend, leaves = ATTENTION[name], [x.detach().to(dtype).requires_grad_() for x in made[:3]]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    y = backend.attend(q, k, v, backend.mask(seen), scale=call.scale, softcap=call.softcap)
    return [y, *torch.autograd.grad(y, leaves, made[3].to(dtype).transpose(1, 2))]


@over_packing
@over_calls
@over_names
@pytest.mark.parametrize("dtype", ROUNDING, ids=["fp16", "bf16"])
def test_a_backend_equals_the_reference_in_float32_forward_and_backward(name, dtype, call, packed):
    skip_what_it_cannot(name, call, packed, dtype)
    made, seen = inputs_of(call, packed, dtype, n_samples=3, n_tokens=331)
    expected = outcome("reference", call, made, seen, torch.float32)
    for ours, theirs in zip(outcome(name, call, made, seen, dtype), expected, strict=True):
        assert (ours.float() - theirs).norm() < ROUNDING[dtype] * theirs.norm()


@over_packing
@over_calls
@over_names
def test_gradients_are_the_same_bits_every_time_where_the_table_says_so(name, call, packed):
    skip_what_it_cannot(name, call, packed, torch.bfloat16)
    if not limits(name, machine(CUDA)).deterministic:
        pytest.skip(f"{name}: its backward is not deterministic")
    made, seen = inputs_of(call, packed, torch.bfloat16, n_samples=4, n_tokens=2048)
    first = outcome(name, call, made, seen, torch.bfloat16)
    for _ in range(20):
        again = outcome(name, call, made, seen, torch.bfloat16)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))


@pytest.mark.filterwarnings("ignore")  # of compilers
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@over_names
def test_a_model_computes_the_same_with_it_and_no_step_compiles_anew(name, packed, compiled):
    mixers = [{"n_kv_head": 2}, {"n_kv_head": 2, "window": 64}] if packed else [{}]
    blocks = tuple(BlockConfig.model_validate({"mixer": mixer}) for mixer in mixers)
    sizes = {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256, "vocab_size": 512}
    config = ModelConfig(**sizes, isolate_documents=packed, blocks=blocks)
    asked = needs(config)
    for call in asked.attention:
        skip_what_it_cannot(name, call, packed, torch.bfloat16)
    kernels, _ = choose(ParallelConfig(attention=name, compile=compiled), asked, device=CUDA, dtype=torch.bfloat16)
    both = (kernels, kernels._replace(attention=ATTENTION["reference"]))
    model, plain = (GPT(config, each, torch.bfloat16).init_weights(0).to(CUDA) for each in both)
    torch._dynamo.reset()
    counters.clear()
    for block in model.blocks if compiled else ():
        block.compile()
    n_graphs = []
    for n_documents in (1, 5, 2, 17, 9):
        tokens = torch.randint(1, 512, (4, 256), device=CUDA)
        tokens.view(-1)[3 : 3 + 5 * n_documents : 5] = 0
        found = []
        for each in (model, plain):
            loss, _ = each(tokens, tokens, tokens.numel(), documents=documents(tokens, 0) if packed else None)
            found.append(torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(each.parameters()))]))
        assert (found[0] - found[1]).norm() < 0.05 * found[1].norm()
        n_graphs.append(counters["stats"]["unique_graphs"])
    assert n_graphs[1:] == [n_graphs[1]] * 4


@pytest.mark.parametrize("isolate", [False, True], ids=["one document", "documents"])
def test_two_runs_are_the_same_to_the_bit(run, options, isolate):
    model = options()["model"] | {"n_embd": 256, "n_head": 4, "n_positions": 128, "isolate_documents": isolate}
    changes = {"model": model, "batch_tokens": 2048, "precision": "bf16"}
    first, second = (tensors(run(name=name, **changes), 8) for name in ("first", "second"))
    assert first == second
