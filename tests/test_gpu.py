"""Tests that need a GPU (`make test-gpu`): kernels at real widths, waits for the device, runs that repeat."""

import pytest
import torch
from conftest import BuiltRun, tensors
from torch._dynamo.utils import counters

from training.batch import Batch
from training.config import BlockConfig, ModelConfig, MoEConfig, ParallelConfig
from training.distributed.world import World
from training.kernels.attention.masks import Visibility, find_documents
from training.kernels.attention.table import ATTENTION_BACKENDS, device_info, limits_on, reason_unsupported
from training.kernels.choose import choose_kernels
from training.kernels.experts import sort_by_expert
from training.kernels.interface import AttentionSpec, ExpertsSpec, KernelRequirements, Kernels
from training.kernels.table import EXPERT_KERNELS, LOSS_KERNELS
from training.model import GPT, init_weights, kernel_requirements
from training.model.layers import FeedForwardContext
from training.model.moe import MoE

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
CUDA = torch.device("cuda")
NAMES = [name for name in ATTENTION_BACKENDS if "cuda" in (ATTENTION_BACKENDS[name].limits or {})]
SPECS = {
    "GPT-2": AttentionSpec(12, 12, 64, 64),
    "grouped-query": AttentionSpec(8, 2, 128, 128),
    "multi-query": AttentionSpec(4, 1, 96, 96),
    "latent": AttentionSpec(4, 4, 192, 128),
    "window": AttentionSpec(4, 4, 64, 64, window=100),
    "window of two": AttentionSpec(4, 4, 64, 64, window=2),
    "soft-cap": AttentionSpec(4, 2, 64, 64, softcap=15.0),
    "scale": AttentionSpec(4, 4, 64, 64, scale=0.2),
    "everything": AttentionSpec(8, 4, 128, 64, window=70, softcap=10.0, scale=0.1),
}
ROUNDING = {torch.float16: 4e-3, torch.bfloat16: 2e-2}

over_specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
over_packing = pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
COMPILER_WARNINGS = {"flex": pytest.mark.filterwarnings("ignore")}
over_names = pytest.mark.parametrize("name", [pytest.param(n, marks=COMPILER_WARNINGS.get(n, ())) for n in NAMES])


def skip_if_unsupported(name, spec, packed, dtype):
    if (reason := reason_unsupported(name, spec, packed, device_info(CUDA), dtype)) is not None:
        pytest.skip(f"{name}: {reason}")


def inputs_of(spec, packed, dtype, n_samples, n_tokens):
    """Return queries, keys, values and the gradient of the result, (B, T, H, D) as projections are, and Visibility."""
    generator = torch.Generator().manual_seed(n_tokens)
    tokens = torch.randint(0, 40, (n_samples, n_tokens), generator=generator).to(CUDA)
    heads = [
        (spec.n_head, spec.head_dim),
        (spec.n_kv_head, spec.head_dim),
        (spec.n_kv_head, spec.value_dim),
        (spec.n_head, spec.value_dim),
    ]
    inputs = [torch.randn(n_samples, n_tokens, *head, generator=generator).to(CUDA, dtype) for head in heads]
    return inputs, Visibility(n_tokens, n_tokens, CUDA, spec.window, find_documents(tokens, 0) if packed else None)


def outcome(name, spec, inputs, visibility, dtype):
    """Return the result and the gradients of queries, keys and values."""
    backend, leaves = ATTENTION_BACKENDS[name], [x.detach().to(dtype).requires_grad_() for x in inputs[:3]]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    y = backend.attend(q, k, v, backend.build_mask(visibility), scale=spec.scale, softcap=spec.softcap)
    return [y, *torch.autograd.grad(y, leaves, inputs[3].to(dtype).transpose(1, 2))]


@over_packing
@over_specs
@over_names
@pytest.mark.parametrize("dtype", ROUNDING, ids=["fp16", "bf16"])
def test_a_backend_equals_the_reference_in_float32_forward_and_backward(name, dtype, spec, packed):
    skip_if_unsupported(name, spec, packed, dtype)
    inputs, visibility = inputs_of(spec, packed, dtype, n_samples=3, n_tokens=331)
    expected = outcome("reference", spec, inputs, visibility, torch.float32)
    for ours, theirs in zip(outcome(name, spec, inputs, visibility, dtype), expected, strict=True):
        assert (ours.float() - theirs).norm() < ROUNDING[dtype] * theirs.norm()


@over_packing
@over_specs
@over_names
def test_gradients_repeat_their_bits_if_the_table_says_so(name, spec, packed):
    skip_if_unsupported(name, spec, packed, torch.bfloat16)
    if not limits_on(name, device_info(CUDA)).deterministic:
        pytest.skip(f"{name}: its backward is not deterministic")
    inputs, visibility = inputs_of(spec, packed, torch.bfloat16, n_samples=4, n_tokens=2048)
    first = outcome(name, spec, inputs, visibility, torch.bfloat16)
    for _ in range(20):
        again = outcome(name, spec, inputs, visibility, torch.bfloat16)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))


@pytest.mark.filterwarnings("ignore")  # compilers warn
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@over_names
def test_a_model_computes_the_same_and_is_compiled_once(name, packed, compiled):
    mixers = [{"n_kv_head": 2}, {"n_kv_head": 2, "window": 64}] if packed else [{}]
    blocks = tuple(BlockConfig.model_validate({"mixer": mixer}) for mixer in mixers)
    sizes = {"n_layer": 4, "n_head": 4, "n_embd": 256, "n_positions": 256, "vocab_size": 512}
    config = ModelConfig(**sizes, isolate_documents=packed, blocks=blocks)
    requirements = kernel_requirements(config)
    for spec in requirements.attention:
        skip_if_unsupported(name, spec, packed, torch.bfloat16)
    parallel = ParallelConfig(attention=name, compile=compiled)
    kernels = choose_kernels(parallel, requirements, device=CUDA, dtype=torch.bfloat16).kernels
    both = (kernels, kernels._replace(attention=ATTENTION_BACKENDS["reference"]))
    model, plain = (init_weights(GPT(config, each, torch.bfloat16), 0).to(CUDA) for each in both)
    torch._dynamo.reset()
    counters.clear()
    for block in model.blocks if compiled else ():
        block.compile()
    n_graphs = []
    for n_documents in (1, 5, 2, 17, 9):
        tokens = torch.randint(1, 512, (4, 256), device=CUDA)
        tokens.view(-1)[3 : 3 + 5 * n_documents : 5] = 0
        grads = []
        for each in (model, plain):
            documents = find_documents(tokens, 0) if packed else None
            loss, _ = each(Batch(tokens, tokens, n_targets=tokens.numel(), documents=documents))
            grads.append(torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(each.parameters()))]))
        assert (grads[0] - grads[1]).norm() < 0.05 * grads[1].norm()
        n_graphs.append(counters["stats"]["unique_graphs"])
    assert n_graphs[1:] == [n_graphs[1]] * 4


# --- experts ---------------------------------------------------------------------------------------

TYPES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
over_experts = pytest.mark.parametrize("name", ["triton", "grouped", "loop"])
over_types = pytest.mark.parametrize("dtype", TYPES, ids=["fp32", "bf16"])
over_counts = pytest.mark.parametrize("n_experts", [8, 64])


def skip_without(name, dtype):
    if name == "triton":
        pytest.importorskip("triton")
    elif name == "grouped" and dtype != torch.bfloat16:
        pytest.skip("grouped: PyTorch supports bf16")


def routed_inputs(n_tokens, n_experts, dtype, width=768, hidden=3072):
    """Return inputs of a layer of experts and top-k ids: a third of the experts get most tokens, one gets none."""
    generator = torch.Generator(CUDA).manual_seed(n_tokens)
    scores = torch.rand(n_tokens, n_experts, device=CUDA, generator=generator)
    scores[:, : n_experts // 3] += 0.5
    scores[:, -1] = -1
    matrices = [(n_experts, hidden, width), (n_experts, hidden, width), (n_experts, width, hidden)]
    weights = [torch.randn(shape, device=CUDA, generator=generator) / shape[-1] ** 0.5 for shape in matrices]
    x, weight = (torch.randn(n_tokens, n, device=CUDA, generator=generator) for n in (width, 2))
    return [*(each.to(dtype) for each in (x, *weights)), weight], scores.topk(2).indices


def experts_layer(name, topk_ids_NK, x, up, gate, down, weight):
    dispatch = sort_by_expert(topk_ids_NK, len(up))
    up_RF, gate_RF = EXPERT_KERNELS[name].up(x, (up, gate), dispatch)
    return EXPERT_KERNELS[name].down(up_RF * gate_RF.tanh(), down, weight, dispatch)


def experts_outcome(name, inputs, topk_ids_NK, layer=experts_layer):
    """Return the result and the gradients of tokens, matrices and weights."""
    leaves = [each.detach().requires_grad_() for each in inputs]
    y = layer(name, topk_ids_NK, *leaves)
    direction = torch.randn(y.shape, device=CUDA, generator=torch.Generator(CUDA).manual_seed(0))
    return [y, *torch.autograd.grad(y, leaves, direction.to(y.dtype))]


@over_counts
@over_types
@over_experts
@pytest.mark.parametrize(
    ("n_tokens", "than"), [(48, "reference"), (4099, "loop")], ids=["the reference", "a loop over many tokens"]
)
def test_a_kernel_of_experts_equals(name, dtype, n_experts, n_tokens, than):
    skip_without(name, dtype)
    inputs, topk_ids_NK = routed_inputs(n_tokens, n_experts, dtype)
    expected = experts_outcome(than, [each.float() for each in inputs], topk_ids_NK)
    for ours, theirs in zip(experts_outcome(name, inputs, topk_ids_NK), expected, strict=True):
        assert (ours.float() - theirs).norm() <= TYPES[dtype] * theirs.norm()


@over_counts
@over_types
@over_experts
def test_gradients_of_experts_repeat_their_bits(name, dtype, n_experts):
    skip_without(name, dtype)
    inputs, topk_ids_NK = routed_inputs(4099, n_experts, dtype)
    first = experts_outcome(name, inputs, topk_ids_NK)
    for _ in range(10):
        again = experts_outcome(name, inputs, topk_ids_NK)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", ["triton", "grouped"])
def test_nothing_in_a_layer_of_experts_waits_for_the_device(name, top_k):
    skip_without(name, torch.bfloat16)
    if name == "grouped" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("grouped: PyTorch loops over experts before Hopper, and waits for their row counts")
    section = MoEConfig(n_experts=8, top_k=top_k, hidden=3072, activation="silu", gated=True, balance="both")
    layer = MoE(section, ModelConfig(n_embd=768, n_head=12), Kernels(experts=EXPERT_KERNELS[name])).to(CUDA)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(2, 1024, 768, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    context = FeedForwardContext(x[..., 0].numel(), torch.arange(2, device=CUDA), True)
    for mode in ("default", "error"):  # the first pass compiles and loads kernels
        torch.cuda.set_sync_debug_mode(mode)
        try:
            y, routing = layer(x, context)
            (y.float().square().sum() + routing.aux_loss).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_offsets_beyond_32_bits_are_right():
    """The tokens, the rows and their gradients each have more than 2**31 elements."""
    pytest.importorskip("triton")
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free memory")
    n_tokens, width, hidden = 2**19 + 77, 4096, 16
    generator = torch.Generator(CUDA).manual_seed(0)
    x = torch.randn(n_tokens, width, device=CUDA, dtype=torch.bfloat16, generator=generator).requires_grad_()
    shapes = [(2, hidden, width), (2, width, hidden)]
    up, down = (torch.randn(s, device=CUDA, dtype=torch.bfloat16, generator=generator) / s[2] ** 0.5 for s in shapes)
    topk_ids_NK = torch.arange(n_tokens, device=CUDA)[:, None] % 2
    dispatch, weight = sort_by_expert(topk_ids_NK, 2), torch.ones(n_tokens, 1, device=CUDA)
    (h,) = EXPERT_KERNELS["triton"].up(x, (up,), dispatch)
    y = EXPERT_KERNELS["triton"].down(h, down, weight, dispatch)
    (grad,) = torch.autograd.grad(y, x, x.detach())
    for ours, one, other in ((y, up, down), (grad, down.mT, up.mT)):
        for token in (0, 1, n_tokens // 2, n_tokens - 2, n_tokens - 1):
            expert = token % 2
            theirs = other[expert].float() @ (one[expert].float() @ x[token].detach().float())
            assert (ours[token].float() - theirs).norm() < 2e-2 * theirs.norm()


@over_types
def test_the_fastest_kernel_of_experts_is_chosen_and_kept(dtype):
    requirements = KernelRequirements(frozenset(), frozenset({ExpertsSpec(768, 3072, 8)}), False)
    choice = choose_kernels(ParallelConfig(), requirements, device=CUDA, dtype=dtype)
    reason = choice.reasons["experts"]
    assert choice.names["experts"] != "reference" and ("fastest: " in reason) == (reason.count(" ms") > 1)
    for name in ("grouped", "loop") if dtype == torch.bfloat16 else ("loop",):
        choice = choose_kernels(ParallelConfig(), requirements, device=CUDA, dtype=dtype, previous={"experts": name})
        assert choice.as_text()["experts"] == f"{name} (matches the reference)"


@pytest.mark.filterwarnings("ignore")  # compilers warn
@pytest.mark.parametrize("name", ["triton", "grouped"])
def test_a_compiled_layer_of_experts_is_one_graph_and_computes_the_same(name):
    skip_without(name, torch.bfloat16)
    inputs, topk_ids_NK = routed_inputs(1024, 8, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(experts_layer, fullgraph=True)
    for turn in range(3):  # with different row counts
        shifted_NK = torch.where(topk_ids_NK < 2 * turn, 7 - topk_ids_NK, topk_ids_NK)
        expected = experts_outcome(name, inputs, shifted_NK)
        for ours, theirs in zip(experts_outcome(name, inputs, shifted_NK, compiled), expected, strict=True):
            assert (ours.float() - theirs.float()).norm() < 2e-2 * theirs.float().norm()


# --- the loss --------------------------------------------------------------------------------------


def loss_outcome(name, softcap, dtype):
    """Return the loss of 2050 tokens, a third of them not counted, over GPT-2's vocabulary, and its gradients."""
    generator = torch.Generator(CUDA).manual_seed(0)
    x, w = (torch.randn(n, 256, device=CUDA, generator=generator) for n in (2050, 50257))
    targets = torch.randint(0, 50257, (2050,), device=CUDA, generator=generator)
    targets[::3] = -1
    leaves = [x.to(dtype).requires_grad_(), (w / 16).requires_grad_()]
    loss = LOSS_KERNELS[name](*leaves, targets, softcap)
    return [loss, *torch.autograd.grad(loss, leaves)]


@over_types
@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("name", ["triton", "chunked"])
def test_a_loss_equals_the_reference_and_repeats_its_bits(name, softcap, dtype):
    if name == "triton":
        pytest.importorskip("triton")
    ours = loss_outcome(name, softcap, dtype)
    for one, other in zip(ours, loss_outcome("reference", softcap, dtype), strict=True):
        assert (one.float() - other.float()).norm() <= TYPES[dtype] * other.float().norm()
    for _ in range(5):
        assert all(map(torch.equal, ours, loss_outcome(name, softcap, dtype)))


# --- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", ["triton", "grouped"])
@pytest.mark.parametrize("isolate", [False, True], ids=["one document", "documents"])
def test_two_runs_are_bit_identical(run, options, isolate, experts):
    skip_without(experts, torch.bfloat16)
    model = options()["model"] | {"n_embd": 256, "n_head": 4, "n_positions": 128, "isolate_documents": isolate}
    changes = {"model": model, "batch_tokens": 2048, "precision": "bf16", "parallel": {"experts": experts}}
    first, second = (tensors(run(name=name, **changes), 8) for name in ("first", "second"))
    assert first == second


@pytest.fixture
def limit_memory():
    """Return a function that limits PyTorch's allocator to some more bytes, until the end of the test."""
    total = torch.cuda.get_device_properties(CUDA).total_memory

    def limit(more: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(CUDA) + more) / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


WIDE = {
    "batch_tokens": 64 * 256,
    "model": {"n_layer": 2, "n_head": 2, "n_embd": 128, "n_positions": 256, "vocab_size": 50304},
    "optim": {"type": "adamw"},
}


def build_on_cuda(config, **changes):
    on_cuda = config(precision="fp32", parallel={"device": "cuda", "loss": "reference"}, **WIDE, **changes)
    return BuiltRun(on_cuda, World(0, 1, CUDA))


def test_a_step_that_runs_out_of_memory_is_repeated_in_halves(config, limit_memory):
    """Logits, log-probabilities and gradients of 64 samples take 3.3 GB each."""
    small, large = (
        build_on_cuda(config, name="small", micro_batch=16),
        build_on_cuda(config, name="large", micro_batch=64),
    )
    small.train_step()
    limit_memory(2 * 2**30)
    large.train_step()
    assert large.setup.micro_batch.n_out_of_memory > 0 and large.setup.micro_batch.size < 64
    for (name, ours), theirs in zip(large.model.named_parameters(), small.model.parameters(), strict=True):
        assert (ours - theirs).abs().max() < 1e-5, name
    for run in (small, large):
        run.close()


def test_auto_finds_a_micro_batch_that_fits(config, limit_memory):
    limit_memory(2 * 2**30)
    run = build_on_cuda(config, name="auto", micro_batch="auto")
    assert 1 < run.setup.micro_batch.size < 64
    run.train_step()
    assert run.setup.micro_batch.n_out_of_memory == 0
    run.close()
