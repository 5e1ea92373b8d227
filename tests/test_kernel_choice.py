"""The choice of kernels: the trials notice every difference, a resumed run keeps its kernel, masks fit each layer."""

import pytest
import torch
from conftest import check_resumes_with

from training.config import ModelConfig, ParallelConfig
from training.errors import UserError
from training.kernels.attention.masks import Visibility, find_documents
from training.kernels.attention.table import ATTENTION_BACKENDS
from training.kernels.choose import choose_kernels
from training.kernels.interface import AttentionBackend, AttentionSpec, ExpertsSpec, KernelRequirements, Limits
from training.model import GPT, kernel_requirements
from training.model.attention import AttentionContexts

CPU = torch.device("cpu")
REFERENCE = ATTENTION_BACKENDS["reference"]
SPEC = AttentionSpec(4, 2, 16, 16, window=40, softcap=1.0)


def choice(*specs, packed=True, dtype=torch.float32, previous=None, **options):
    """Return the choice of attention as text."""
    requirements = KernelRequirements(frozenset(specs), frozenset(), packed)
    chosen = choose_kernels(
        ParallelConfig(**options), requirements, device=CPU, dtype=dtype, previous={"attention": previous}
    )
    return chosen.as_text()["attention"]


def forgets_documents(visibility):
    return REFERENCE.build_mask(visibility._replace(documents=None))


def forgets_the_window(visibility):
    return REFERENCE.build_mask(visibility._replace(window=None))


def sees_one_key_more(visibility):
    return REFERENCE.build_mask(visibility._replace(window=visibility.window and visibility.window + 1))


def forgets_the_softcap(q, k, v, mask, scale, softcap):  # noqa: ARG001 (one signature)
    return REFERENCE.attend(q, k, v, mask, scale=scale)


def forgets_the_scale(q, k, v, mask, scale, softcap):  # noqa: ARG001 (one signature)
    return REFERENCE.attend(q, k, v, mask, softcap=softcap)


def halves_the_gradient_of_keys(q, k, v, mask, scale, softcap):
    return REFERENCE.attend(q, (k + k.detach()) / 2, v, mask, scale=scale, softcap=softcap)


def halves_the_gradient_of_queries(q, k, v, mask, scale, softcap):
    return REFERENCE.attend((q + q.detach()) / 2, k, v, mask, scale=scale, softcap=softcap)


def shares_keys_in_another_order(q, k, v, mask, scale, softcap):
    y = REFERENCE.attend(q[:, [0, 2, 1, 3]], k, v, mask, scale=scale, softcap=softcap)
    return y[:, [0, 2, 1, 3]]


@pytest.mark.parametrize(
    "wrong",
    [
        AttentionBackend(forgets_documents, REFERENCE.attend),
        AttentionBackend(forgets_the_window, REFERENCE.attend),
        AttentionBackend(sees_one_key_more, REFERENCE.attend),
        AttentionBackend(REFERENCE.build_mask, forgets_the_softcap),
        AttentionBackend(REFERENCE.build_mask, forgets_the_scale),
        AttentionBackend(REFERENCE.build_mask, halves_the_gradient_of_keys),
        AttentionBackend(REFERENCE.build_mask, halves_the_gradient_of_queries),
        AttentionBackend(REFERENCE.build_mask, shares_keys_in_another_order),
    ],
)
def test_the_trial_rejects_every_wrong_back_end(monkeypatch, wrong):
    monkeypatch.setitem(ATTENTION_BACKENDS, "flash", wrong)
    assert choice(SPEC._replace(scale=0.4)).startswith("reference (flash: differs from the reference by ")


def test_a_kernel_has_to_support_every_layer(monkeypatch):
    plain, wide = AttentionSpec(4, 4, 8, 8), AttentionSpec(4, 4, 16, 16)
    narrow = AttentionBackend(REFERENCE.build_mask, REFERENCE.attend, {"cpu": Limits(max_head_dim=8)})
    monkeypatch.setitem(ATTENTION_BACKENDS, "flash", narrow)
    assert choice(plain).startswith("flash (")
    for specs in ((plain, wide), (wide, plain)):
        assert choice(*specs) == "sdpa (flash: does not support heads 16 wide)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_positions", [1, 2, 7])
def test_a_short_context_does_not_reject_a_kernel(n_positions, dtype):
    model = ModelConfig(n_layer=1, n_head=2, n_embd=12, n_positions=n_positions, isolate_documents=True)
    for spec in kernel_requirements(model).attention:
        assert choice(spec, dtype=dtype) == "flash (matches the reference)"


def test_on_a_cpu_experts_in_sixteen_bits_go_one_by_one():
    """Only the loop rounds row counts up on a CPU. A resumed run keeps its kernel."""
    requirements = KernelRequirements(frozenset({AttentionSpec(3, 3, 8, 8)}), frozenset({ExpertsSpec(32, 64)}), False)

    def experts(dtype, previous):
        choice = choose_kernels(ParallelConfig(), requirements, device=CPU, dtype=dtype, previous=previous)
        return choice.names["experts"]

    assert experts(torch.bfloat16, {}) == experts(torch.float16, {}) == "loop"
    assert experts(torch.float32, {}) == ("grouped" if hasattr(torch.nn.functional, "grouped_mm") else "loop")
    assert experts(torch.bfloat16, {"experts": "reference"}) == "reference"


def test_a_resumed_run_keeps_its_kernel(run, monkeypatch, capsys):
    flash = ATTENTION_BACKENDS["flash"]
    monkeypatch.setitem(ATTENTION_BACKENDS, "flash", flash._replace(limits={}))
    folder = run()
    assert "attention   sdpa (matches the reference)" in capsys.readouterr().out
    monkeypatch.setitem(ATTENTION_BACKENDS, "flash", flash)  # as if a package had been installed in the meantime
    assert choice(AttentionSpec(2, 2, 8, 8)).startswith("flash ")
    check_resumes_with("attention sdpa", run, folder, capsys)


def test_the_reason_names_the_previous_kernel_if_it_no_longer_runs():
    spec = AttentionSpec(2, 2, 8, 8)
    assert choice(spec, previous="sdpa") == "sdpa (matches the reference)"
    assert choice(spec, previous="flash2") == "flash (matches the reference; previously flash2)"


def test_naming_a_kernel_that_does_not_run_here_is_one_line():
    with pytest.raises(UserError, match=r"^parallel.attention: flash3: does not run on cpu; use auto$"):
        choice(SPEC, attention="flash3")


# --- masks of a model -------------------------------------------------------------------------------


def test_layers_with_different_windows_have_different_masks():
    """In any order of layers, each one sees exactly the keys that it would see alone."""
    for windows in ([None, 3, 5], [3, None, 5], [5, 3, None], [12, 3, None]):
        blocks = [{"mixer": {"window": window}} for window in windows]
        sizes = {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_positions": 12, "vocab_size": 64}
        model = GPT(ModelConfig.model_validate(sizes | {"blocks": blocks}))
        tokens = torch.randint(0, 9, (2, 12), generator=torch.Generator().manual_seed(0))
        for documents in (None, find_documents(tokens, 0)):
            contexts = AttentionContexts(Visibility(12, 12, CPU, documents=documents), REFERENCE, 10000.0)
            for block, window in zip(model.blocks, windows, strict=True):
                is_visible = [
                    [window is None or s > t - window for s in range(t + 1)] + [False] * (11 - t) for t in range(12)
                ]
                expected = torch.tensor(is_visible).expand(2, 1, 12, 12)
                if documents is not None:
                    index = (tokens == 0).cumsum(1)
                    expected = expected & (index[:, None, :, None] == index[:, None, None, :])
                assert torch.equal(contexts.for_mixer(block.mixer).mask.expand(2, 1, 12, 12), expected)


def test_sdpa_masks_have_the_dtype_of_the_queries():
    """PyTorch would convert a bool mask in each layer and keep every copy."""
    build_mask = ATTENTION_BACKENDS["sdpa"].build_mask
    mask = build_mask(Visibility(6, 6, CPU, 2, dtype=torch.bfloat16))
    assert mask.dtype == torch.bfloat16
    assert mask[0, 0].isfinite().sum() == 11
    assert build_mask(Visibility(6, 6, CPU, 6)) is None


def test_isolated_documents_and_a_cache_exclude_each_other():
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, n_positions=12, vocab_size=64))
    tokens = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="cache"):
        model.logits(tokens, model.new_cache(), find_documents(tokens, 0))
