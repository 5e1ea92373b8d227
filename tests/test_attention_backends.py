"""Attention back-ends: each equals its readable reference, and states its limits without being run.

Back-ends of packages that need CUDA run here on stand-ins for the packages' functions (`stand_ins.py`), which shows
that the calls are right. Only the tests marked `gpu` show that the packages themselves are.
"""

import itertools
import re
from pathlib import Path

import pytest
import stand_ins
import torch
from stand_ins import mode
from torch._dynamo.utils import counters

from training.batch import Batch
from training.config import BlockConfig, ModelConfig, ParallelConfig
from training.errors import UserError
from training.kernels.attention.deterministic import (
    DeterministicBackward,
    deterministic_flash,
    deterministic_mode,
    with_deterministic_backward,
)
from training.kernels.attention.masks import Visibility, find_documents
from training.kernels.attention.sdpa import FP32_MAX_KEYS
from training.kernels.attention.table import (
    ATTENTION_BACKENDS,
    DeviceInfo,
    auto_candidates,
    limits_on,
    reason_unsupported,
)
from training.kernels.choose import choose_kernels
from training.kernels.interface import AttentionBackend, AttentionSpec, ExpertsSpec, KernelRequirements, Kernels, Limits
from training.model import GPT, init_weights

CPU = torch.device("cpu")
HOPPER = DeviceInfo("cuda", 9)


def grads(function, inputs, *rest):
    """Return the result and the gradients of a random projection of it."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = function(*inputs, *rest)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return [y, *torch.autograd.grad(y, inputs, direction)]


def assert_equal(function, reference, inputs, *rest, tolerance=2e-5):
    for ours, theirs in zip(grads(function, inputs, *rest), grads(reference, inputs, *rest), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attend_in_loops(q, k, v, visible, scale, softcap):
    """Compute attention one query of one head at a time; visible(sample, t) lists the keys it sees."""
    rows = []
    for b, h, t in itertools.product(range(q.shape[0]), range(q.shape[1]), range(q.shape[2])):
        g, keys = h * k.shape[1] // q.shape[1], visible(b, t)
        scores = k[b, g, keys] @ q[b, h, t] * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        rows.append(torch.softmax(scores, dim=0) @ v[b, g, keys])
    return torch.stack(rows).view(*q.shape[:3], v.shape[-1])


SPECS = {
    "multi-head": AttentionSpec(3, 3, 8, 8),
    "grouped-query": AttentionSpec(4, 2, 8, 8),
    "multi-query": AttentionSpec(3, 1, 16, 16),
    "narrow values": AttentionSpec(2, 2, 12, 8),
    "wide values": AttentionSpec(2, 1, 8, 16),
    "window": AttentionSpec(2, 2, 8, 8, window=5),
    "window of one": AttentionSpec(2, 2, 8, 8, window=1),
    "window of all": AttentionSpec(2, 2, 8, 8, window=17),
    "window of all but one": AttentionSpec(2, 2, 8, 8, window=16),
    "soft-cap": AttentionSpec(2, 2, 8, 8, softcap=0.7),
    "scale": AttentionSpec(2, 2, 8, 8, scale=0.3),
    "everything": AttentionSpec(4, 2, 8, 6, window=7, softcap=1.5, scale=0.5),
}
HERE = [name for name in ATTENTION_BACKENDS if limits_on(name, DeviceInfo("cpu")) is not None]
STAND_INS = ["flash2", "flash3", "flash4", "varlen"]  # run here on stand-ins for the functions they call


def requirements(spec=SPECS["multi-head"], packed=False):
    return KernelRequirements(frozenset({spec}), frozenset({ExpertsSpec(32, 64)}), packed)


def choose(needed=None, dtype=torch.float32, **options):
    return choose_kernels(ParallelConfig(**options), needed or requirements(), device=CPU, dtype=dtype)


@pytest.fixture
def packages(monkeypatch):
    """Stand-ins for the packages' functions."""
    stand_ins.install(monkeypatch)
    library = stand_ins.install_in_torch()
    yield
    library._destroy()


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("name", [*HERE, *STAND_INS])
def test_attention_equals_a_loop_over_queries_or_states_its_limit(name, spec, packed):
    n, backend = 17, ATTENTION_BACKENDS[name]
    tokens = torch.ones(2, n, dtype=torch.int64)
    tokens[0, [4, 5]] = tokens[1, 11] = 0
    document = tokens.eq(0).cumsum(1)
    window = spec.window or n

    def visible(b, t):
        return [s for s in range(max(0, t - window + 1), t + 1) if not packed or document[b, s] == document[b, t]]

    visibility = Visibility(n, n, CPU, spec.window, find_documents(tokens, 0) if packed else None)
    heads = ((spec.n_head, spec.head_dim), (spec.n_kv_head, spec.head_dim), (spec.n_kv_head, spec.value_dim))
    inputs = [random(2, count, n, width, seed=i) * (i + 1) for i, (count, width) in enumerate(heads)]

    def run(q, k, v):
        return backend.attend(q, k, v, backend.build_mask(visibility), scale=spec.scale, softcap=spec.softcap)

    if name in STAND_INS and spec.softcap is not None and not limits_on(name, HOPPER).softcap:
        assert reason_unsupported(name, spec, packed, HOPPER, torch.bfloat16).startswith("does not support ")
        return
    if name in HERE and reason_unsupported(name, spec, packed, DeviceInfo("cpu"), torch.float32):
        reason = choose(requirements(spec, packed)).reasons["attention"]
        assert re.match(rf"(.* )?{name}(, \w+)*: does not support", reason)
        with pytest.raises(UserError, match=f"parallel.attention: {name}: does not support .*; use auto"):
            choose(requirements(spec, packed), attention=name)
        return
    scale = spec.scale or spec.head_dim**-0.5
    assert_equal(run, lambda q, k, v: attend_in_loops(q, k, v, visible, scale, spec.softcap), inputs)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("name", STAND_INS)
def test_packages_get_views_document_lengths_and_a_request_for_a_deterministic_backward(name, packed):
    backend, tokens = ATTENTION_BACKENDS[name], torch.ones(2, 6, dtype=torch.int64)
    tokens[0, 4] = tokens[1, 0] = 0
    visibility = Visibility(6, 6, CPU, None, find_documents(tokens, 0) if packed else None)
    projections = random(2, 6, 3, 4, 8)
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in projections.unbind(2))
    y = backend.attend(q, k, v, backend.build_mask(visibility))
    assert y.transpose(1, 2).is_contiguous()  # in the layout of the projections, without a copy
    (call,) = stand_ins.calls
    assert call.get("deterministic", True)
    if packed:
        assert call["ends"].tolist() == [0, 4, 6, 12]
        assert call["longest"] == (6, 6)
    elif name == "varlen":
        assert call["ends"].tolist() == [0, 6, 12]


# --- limits ------------------------------------------------------------------------------------------


@pytest.fixture
def install_package(monkeypatch, tmp_path):
    """Return a function that installs the metadata of a package."""

    def install(package, version):
        folder = tmp_path / f"{package.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


TABLE = [
    (name, kind) for name in ATTENTION_BACKENDS for kind in ATTENTION_BACKENDS[name].limits or ("cuda", "cpu", "mps")
]


@pytest.mark.parametrize(("name", "kind"), TABLE)
def test_every_limit_of_the_table_is_a_reason_before_anything_runs(name, kind, install_package):
    here = DeviceInfo(kind, 9 if kind == "cuda" else None)
    can = limits_on(name, here)
    width, documents = can.max_head_dim or 64, can.documents
    spec = AttentionSpec(2, 1, width, width, 8 if can.window else None, 5.0 if can.softcap else None)
    if can.package is not None and can.package[0] != "torch":
        assert reason_unsupported(name, spec, documents, here, can.dtypes[0]) == f"{can.package[0]} is not installed"
        install_package(*can.package)
    assert all(reason_unsupported(name, spec, documents, here, dtype) is None for dtype in can.dtypes)

    def reason(spec=spec, documents=documents, here=here, dtype=can.dtypes[0]):
        return reason_unsupported(name, spec, documents, here, dtype)

    for other in {"cuda", "cpu", "mps"} - set(ATTENTION_BACKENDS[name].limits or ("cuda", "cpu", "mps")):
        assert reason(here=DeviceInfo(other)) == f"does not run on {other}"
    if can.capability is not None:
        assert reason(here=DeviceInfo("cuda", 7)) == "does not run on cuda of compute capability 7"
    for dtype in {torch.float32, torch.bfloat16, torch.float16} - set(can.dtypes):
        assert reason(dtype=dtype) == f"does not support {str(dtype)[6:]}"
    if can.max_head_dim is not None:
        for change in ({"head_dim": width + 8}, {"value_dim": width + 8}):
            assert reason(spec._replace(**change)) == f"does not support heads {width + 8} wide"
    if (multiple := can.head_dim_multiple) > 1:
        for change in ({"head_dim": width - 1}, {"value_dim": width - 1}):
            expected = f"does not support head widths that are no multiple of {multiple}"
            assert reason(spec._replace(**change)) == expected
    if not can.window:
        assert reason(spec._replace(window=8)) == "does not support a window"
    if not can.softcap:
        assert reason(spec._replace(softcap=5.0)) == "does not support a soft-cap"
    if not can.documents:
        assert reason(documents=True) == "does not support isolated documents"


@pytest.mark.parametrize(
    "name", [name for name in ATTENTION_BACKENDS if (can := limits_on(name, HOPPER)) and can.package]
)
def test_a_package_that_is_too_old_is_named_with_the_version_that_works(name, install_package):
    package, oldest = limits_on(name, HOPPER).package
    install_package(package, "0.9.1")
    reason = reason_unsupported(name, AttentionSpec(2, 2, 64, 64), False, HOPPER, torch.bfloat16)
    assert reason == f"{package} 0.9.1 is too old: {oldest} or later is needed"


def test_auto_tries_deterministic_back_ends_that_run_on_the_device():
    assert auto_candidates(DeviceInfo("cpu")) == ["flash", "sdpa", "reference"]
    assert auto_candidates(DeviceInfo("mps")) == ["sdpa", "reference"]
    assert auto_candidates(DeviceInfo("cuda", 7)) == ["efficient", "reference"]
    assert auto_candidates(DeviceInfo("cuda", 8)) == ["flash2", "flash", "varlen", "flex", "efficient", "reference"]
    assert auto_candidates(HOPPER)[:3] == ["flash3", "flash4", "flash2"]
    assert auto_candidates(DeviceInfo("cuda", 10))[:2] == ["flash4", "flash2"]


def test_the_reason_on_a_cpu_omits_back_ends_that_need_cuda():
    assert choose().as_text()["attention"] == "flash (matches the reference)"


@pytest.mark.parametrize("name", [name for name in ATTENTION_BACKENDS if name not in HERE])
def test_naming_a_back_end_that_cannot_run_here_is_one_line(name):
    with pytest.raises(UserError, match=f"^parallel.attention: {name}: does not run on cpu; use auto$"):
        choose(attention=name)


def test_a_missing_package_is_skipped_by_auto_and_an_error_if_named(monkeypatch):
    missing = {"cpu": Limits(package=("flash-attn", "2.7.4"))}
    monkeypatch.setitem(ATTENTION_BACKENDS, "flash2", ATTENTION_BACKENDS["flash2"]._replace(limits=missing))
    monkeypatch.setitem(ATTENTION_BACKENDS, "flash3", ATTENTION_BACKENDS["flash3"]._replace(limits=missing))
    choice = choose()
    assert choice.as_text()["attention"] == "flash (flash3, flash2: flash-attn is not installed)"
    with pytest.raises(UserError, match=r"^parallel.attention: flash2: flash-attn is not installed; use auto$"):
        choose(attention="flash2")


def test_auto_never_picks_a_back_end_that_is_not_deterministic_but_a_name_does(monkeypatch):
    monkeypatch.setitem(
        ATTENTION_BACKENDS, "flash", ATTENTION_BACKENDS["flash"]._replace(limits={"cpu": Limits(deterministic=False)})
    )
    assert choose().as_text()["attention"] == "sdpa (matches the reference)"
    choice = choose(attention="flash")
    assert choice.as_text()["attention"] == "flash (requested; its gradients differ from run to run)"


def test_the_table_of_the_documentation_states_the_back_ends_and_their_limits():
    text = (Path(__file__).parent.parent / "docs" / "attention.md").read_text()
    rows = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert [name.strip("`") for name, *_ in rows] == list(ATTENTION_BACKENDS)
    for name, (_, _, where, what) in zip(ATTENTION_BACKENDS, rows, strict=True):
        limits = ATTENTION_BACKENDS[name].limits
        assert all(word in where for word in (word.upper() for word in limits or ())) and ("any" in where) == (
            not limits
        )
        for can in (limits or {}).values():
            numbers = [can.max_head_dim, can.head_dim_multiple if can.head_dim_multiple > 1 else None]
            assert all(str(number) in what for number in numbers if number is not None)
            assert all(word in what for word in can.package or ())
        for word in ("window", "documents", "softcap"):
            lacking = any(not getattr(can, word) for can in (limits or {}).values())
            assert (word.replace("softcap", "soft-cap") in what) == lacking
        assert ("only by name" in what) == any(not can.deterministic for can in (limits or {}).values())


# --- the choice --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_chosen_back_end_supports_the_model(dtype, spec, packed):
    choice = choose(requirements(spec, packed), dtype)
    name = choice.names["attention"]
    assert choice.kernels.attention is ATTENTION_BACKENDS[name]
    assert reason_unsupported(name, spec, packed, DeviceInfo("cpu"), dtype) is None
    choice = choose(requirements(spec, packed), dtype, attention="reference")
    assert choice.as_text()["attention"] == "reference (requested)"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_at_the_widths_of_gpt2_is_within_the_tolerance(dtype):
    choice = choose(requirements(AttentionSpec(12, 12, 64, 64)), dtype)
    assert choice.as_text()["attention"] == "flash (matches the reference)"


def broken(*_, **__):
    raise RuntimeError("no such device function\nat line 3")


def asserting(*_, **__):
    raise AssertionError("(head_dim, head_dim_v)=(160, 160) is not supported on SM100")


def sees_the_future(q, k, v, mask, scale=None, softcap=None):
    return ATTENTION_BACKENDS["reference"].attend(q, k, v, torch.ones_like(mask), scale=scale, softcap=softcap)


def swaps_keys_and_values(q, k, v, mask, scale=None, softcap=None):
    return ATTENTION_BACKENDS["reference"].attend(q, v, k, mask, scale=scale, softcap=softcap)


def wrong_backward(q, k, v, mask, scale=None, softcap=None):
    return ATTENTION_BACKENDS["reference"].attend(
        q, k, v.detach() + 0.9 * (v - v.detach()), mask, scale=scale, softcap=softcap
    )


def nan_backward(q, k, v, mask, scale=None, softcap=None):
    y = ATTENTION_BACKENDS["reference"].attend(q, k, v, mask, scale=scale, softcap=softcap)
    return y + 0 * (v * 0).sqrt().sum()


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        (nan_backward, "differs from the reference by nan"),
        (broken, "fails here: no such device function"),
        (asserting, r"fails here: \(head_dim, head_dim_v\)=\(160, 160\) is not supported on SM100"),
        (sees_the_future, r"differs from the reference by \de.\d\d"),
        (swaps_keys_and_values, r"differs from the reference by \de.\d\d"),
        (wrong_backward, "differs from the reference by 1e-01"),
    ],
)
def test_a_kernel_that_fails_or_differs_is_skipped_by_auto_and_an_error_if_named(monkeypatch, kernel, problem):
    monkeypatch.setitem(
        ATTENTION_BACKENDS, "flash", AttentionBackend(ATTENTION_BACKENDS["reference"].build_mask, kernel)
    )
    assert re.fullmatch(rf"sdpa \(flash: {problem}\)", choose().as_text()["attention"])
    with pytest.raises(UserError, match=f"parallel.attention: flash: {problem}; use auto"):
        choose(attention="flash")


# --- masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("n_queries", [1, 5])
@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_attention_over_a_cache_is_the_end_of_attention_over_everything(name, n_queries, window):
    q, k, v = (random(2, heads, 12, 8, seed=i) * (i + 1) for i, heads in enumerate((4, 2, 2)))
    backend = ATTENTION_BACKENDS[name]
    masks = [backend.build_mask(Visibility(n, 12, CPU, window)) for n in (12, n_queries)]
    whole, end = (backend.attend(q[:, :, -n:], k, v, mask) for n, mask in zip((12, n_queries), masks, strict=True))
    torch.testing.assert_close(end, whole[:, :, -n_queries:])


def test_documents_start_at_end_of_text_tokens_and_at_samples():
    documents = find_documents(torch.tensor([[5, 0, 7, 8, 0, 0], [0, 1, 2, 3, 4, 5]]), 0)
    assert documents.index_BS.tolist() == [[0, 1, 1, 1, 2, 3], [1] * 6]
    assert documents.position_BT.tolist() == [[0, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5]]
    assert documents.cu_seqlens_D.tolist() == [0, 1, 4, 5, 6, 12]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:`torch.jit.script_method`")
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_flex_follows_the_mask_and_caps_scores(spec, packed):
    """A CPU runs only its uncompiled forward."""
    tokens, backend = torch.ones(2, 150, dtype=torch.int64), ATTENTION_BACKENDS["flex"]
    tokens[0, [40, 41, 130]] = tokens[1, 99] = 0
    visibility = Visibility(150, 150, CPU, spec.window, find_documents(tokens, 0) if packed else None)
    heads = ((spec.n_head, spec.head_dim), (spec.n_kv_head, spec.head_dim), (spec.n_kv_head, spec.value_dim))
    q, k, v = (random(2, count, 150, width, seed=i) * 2 for i, (count, width) in enumerate(heads))
    options = {"scale": spec.scale, "softcap": spec.softcap}
    with torch.compiler.set_stance("force_eager"):
        ours = backend.attend(q, k, v, backend.build_mask(visibility), **options)
    reference = ATTENTION_BACKENDS["reference"]
    torch.testing.assert_close(ours, reference.attend(q, k, v, reference.build_mask(visibility), **options))


# --- deterministic backward and compilation ----------------------------------------------------------


class Spy(torch.autograd.Function):
    """The identity, which records the mode that its backward ran in."""

    @staticmethod
    def forward(ctx, x, modes):
        ctx.modes = modes
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.modes.append((torch.are_deterministic_algorithms_enabled(), mode()))
        return grad, None


def test_the_deterministic_mode_is_on_for_the_backward_of_attention_and_nothing_else():
    inside, outside, before = [], [], mode()
    inputs = [random(2, 2, 5, 4, seed=i).requires_grad_(i < 2) for i in range(3)]
    attend = ATTENTION_BACKENDS["sdpa"].attend

    def spied(q, k, v):
        return Spy.apply(attend(q, k, v, None), inside)

    y = DeterministicBackward.apply(spied, *(Spy.apply(x, outside) for x in inputs))
    direction = random(*y.shape, seed=9)
    grads = torch.autograd.grad(y, inputs[:2], direction)
    assert inside == [(True, (2, False))]
    assert outside == [(False, before)] * 2 and mode() == before
    for ours, theirs in zip(grads, torch.autograd.grad(attend(*inputs, None), inputs[:2], direction), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("width", [8, 6])
@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_flash_on_cuda_is_an_operator_with_a_deterministic_backward(compiled, n_kv_head, width):
    projections = random(2, 6, 4 + 2 * n_kv_head, width)  # views of one projection, as in the model
    before, reference = mode(), ATTENTION_BACKENDS["reference"]
    mask = reference.build_mask(Visibility(6, 6, CPU))

    def run(function, x):
        q, k, v = (part.transpose(1, 2) for part in x.split([4, n_kv_head, n_kv_head], dim=2))
        return (2 * function(q + 1, k, v)).transpose(1, 2).flatten(2)

    def ours(x):
        return run(lambda q, k, v: deterministic_flash(q, k, v, None), x)

    torch._dynamo.reset()
    ours = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    assert_equal(ours, lambda x: run(lambda *qkv: reference.attend(*qkv, mask), x), [projections])
    assert stand_ins.calls[-1] == {"mode": (2, False)} and mode() == before


def test_the_deterministic_mode_ends_if_the_backward_fails():
    before = mode()
    with pytest.raises(RuntimeError, match="failed"), deterministic_mode():
        raise RuntimeError("failed")
    assert mode() == before


MIXERS = [
    {"type": "attention", "n_kv_head": 2},
    {"type": "attention", "n_kv_head": 2, "window": 5},
    {"type": "latent", "kv_rank": 16, "rope_dim": 8},
]


def small_model(backend, mixers):
    blocks = tuple(BlockConfig.model_validate({"mixer": mixer}) for mixer in mixers)
    sizes = {"n_layer": len(mixers), "n_head": 4, "n_embd": 32, "n_positions": 16, "vocab_size": 64}
    config = ModelConfig(**sizes, position="rope", isolate_documents=True, blocks=blocks)
    return init_weights(GPT(config, Kernels(attention=backend)), 0)


def batch(n_documents, n_samples=3):
    tokens = torch.randint(1, 64, (n_samples, 16), generator=torch.Generator().manual_seed(n_documents))
    tokens.view(-1)[3 : 3 + 2 * n_documents : 2] = 0
    return tokens, find_documents(tokens, 0)


def step(model, tokens, packed):
    loss, _ = model(Batch(tokens, tokens, n_targets=tokens.numel(), documents=packed))
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def test_drawing_the_graph_does_not_trace_into_kernels(run, monkeypatch):
    """FlexAttention cannot be compiled while every operation is recorded."""
    recorders = []

    def attend(*inputs, **options):
        recorders.append(torch.overrides._get_current_function_mode_stack())
        return ATTENTION_BACKENDS["sdpa"].attend(*inputs, **options)

    monkeypatch.setitem(ATTENTION_BACKENDS, "flash", ATTENTION_BACKENDS["flash"]._replace(attend=attend))
    folder = run(steps=3, logging={"every": 1}, parallel={"attention": "flash"})
    assert list(folder.glob("tensorboard/*")) and recorders and not any(recorders)


COMPILES = pytest.mark.filterwarnings(  # PyTorch's warnings while it traces
    "ignore:The .grad attribute of a Tensor",
    "ignore:`torch.jit.script_method`",
    "ignore:<class 'torch.autograd.function.Function'> should not be instantiated",
)


@COMPILES
@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(("name", "mixers"), [("flash", MIXERS), ("flash2", MIXERS), ("flash4", MIXERS[1:2])])
def test_compiled_blocks_compute_the_same_and_are_compiled_once(name, mixers):
    plain, compiled = (small_model(ATTENTION_BACKENDS[each], mixers) for each in ("reference", name))
    torch._dynamo.reset()
    counters.clear()
    for block in compiled.blocks:
        block.compile(backend="aot_eager")
    n_graphs = []
    for n_documents in (1, 4, 2, 7, 3):
        tokens, packed = batch(n_documents)
        for ours, theirs in zip(step(compiled, tokens, packed), step(plain, tokens, packed), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        n_graphs.append(counters["stats"]["unique_graphs"])
    assert n_graphs == [n_graphs[0]] * 5
    assert bool(counters["graph_break"]) == (name == "flash4")


@COMPILES
def test_a_compiled_function_keeps_the_deterministic_backward():
    modes = []

    def spied(q, k, v, mask, **options):
        return Spy.apply(ATTENTION_BACKENDS["sdpa"].attend(q, k, v, mask, **options), modes)

    def attend(q, k, v):
        return 2 * with_deterministic_backward(spied)(q + 1, k, v, None, scale=None, softcap=None)

    inputs = [random(2, 2, 5, 4, seed=i) for i in range(3)]
    torch._dynamo.reset()
    assert_equal(torch.compile(attend, backend="aot_eager"), attend, inputs)
    assert modes == [(True, (2, False))] * 2


@pytest.mark.parametrize("window", [None, 50])
def test_on_a_cpu_few_keys_are_attended_to_in_float32(window):
    """Up to 192 keys, where it halves the error; the result and the gradients have the dtype of the inputs."""
    errors = {}
    for n_tokens in (FP32_MAX_KEYS, FP32_MAX_KEYS + 1):
        generator = torch.Generator().manual_seed(0)
        leaves = [torch.randn(2, 4, n_tokens, 32, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
        visibility = Visibility(n_tokens, n_tokens, torch.device("cpu"), window, dtype=torch.bfloat16)
        y = ATTENTION_BACKENDS["flash"].attend(*leaves, ATTENTION_BACKENDS["flash"].build_mask(visibility))
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
        expected = ATTENTION_BACKENDS["reference"].attend(
            *exact, ATTENTION_BACKENDS["reference"].build_mask(visibility)
        )
        expected_grads = torch.autograd.grad(expected, exact, torch.ones_like(expected))
        assert all(x.dtype == torch.bfloat16 for x in (y, *grads))
        errors[n_tokens] = max(
            ((x.float() - other).norm() / other.norm()).item()
            for x, other in zip((y, *grads), (expected, *expected_grads), strict=True)
        )
    assert errors[FP32_MAX_KEYS] < 0.0019 < 0.0022 < errors[FP32_MAX_KEYS + 1]  # bf16's own rounding is 0.0017
