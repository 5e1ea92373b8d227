"""The choice of a kernel: what the trial looks at, what a run goes on with, and masks of a model of many kinds."""

from __future__ import annotations

import pytest
import torch
from conftest import goes_on_with

from training.config import ModelConfig, ParallelConfig
from training.errors import UserError
from training.kernels.attention.masks import Visibility, find_documents
from training.kernels.choose import choose_kernels, kernel_names
from training.kernels.interface import AttentionBackend, AttentionSpec, ExpertsSpec, KernelRequirements, Limits
from training.kernels.table import ATTENTION_BACKENDS
from training.model import GPT, kernel_requirements

CPU = torch.device("cpu")
REFERENCE = ATTENTION_BACKENDS["reference"]
ASKED = AttentionSpec(4, 2, 16, 16, window=40, softcap=1.0)


def choice(asked, *, packed=True, dtype=torch.float32, **options):
    calls = frozenset(asked if isinstance(asked, list) else [asked])
    found = KernelRequirements(calls, frozenset(), packed)
    return choose_kernels(ParallelConfig(**options), found, device=CPU, dtype=dtype)[1]["attention"]


def forgets_documents(seen):
    return REFERENCE.build_mask(seen._replace(documents=None))


def forgets_the_window(seen):
    return REFERENCE.build_mask(seen._replace(window=None))


def sees_one_key_more(seen):
    return REFERENCE.build_mask(seen._replace(window=seen.window and seen.window + 1))


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


def test_on_a_cpu_experts_of_sixteen_bits_go_one_by_one():
    """There the loop rounds numbers of rows; what a run began with stays."""
    asked = KernelRequirements(frozenset({AttentionSpec(3, 3, 8, 8)}), frozenset({ExpertsSpec(32, 64)}), False)
    chosen = {
        dtype: choose_kernels(ParallelConfig(), asked, device=CPU, dtype=dtype)[1]["experts"].split()[0]
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    assert chosen[torch.bfloat16] == chosen[torch.float16] == "loop"
    assert chosen[torch.float32] == ("grouped" if hasattr(torch.nn.functional, "grouped_mm") else "loop")
    before = {"experts": "reference"}
    _, why = choose_kernels(ParallelConfig(), asked, device=CPU, dtype=torch.bfloat16, previous=before)
    assert why["experts"].startswith("reference ")


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
def test_the_trial_sees_everything_that_a_layer_asks_for(monkeypatch, wrong):
    monkeypatch.setitem(ATTENTION_BACKENDS, "flash", wrong)
    assert choice(ASKED._replace(scale=0.4)).startswith("reference (flash: it differs from the reference by ")


def test_a_kernel_has_to_do_what_every_layer_asks_for(monkeypatch):
    plain, wide = AttentionSpec(4, 4, 8, 8), AttentionSpec(4, 4, 16, 16)
    monkeypatch.setitem(
        ATTENTION_BACKENDS,
        "flash",
        AttentionBackend(REFERENCE.build_mask, REFERENCE.attend, {"cpu": Limits(head_dim=8)}),
    )
    assert choice(plain).startswith("flash (")
    for both in ([plain, wide], [wide, plain]):
        assert choice(both) == "sdpa (flash: it does not do heads 16 wide)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n_positions", [1, 2, 7])
def test_a_context_of_a_few_tokens_is_no_reason_to_refuse_a_kernel(n_positions, dtype):
    model = ModelConfig(n_layer=1, n_head=2, n_embd=12, n_positions=n_positions, isolate_documents=True)
    for call in kernel_requirements(model).attention:
        assert choice(call, dtype=dtype) == "flash (ran, and equals the reference)"


def test_a_run_goes_on_with_the_kernel_that_it_began_with(run, monkeypatch, capsys):
    fast = ATTENTION_BACKENDS["flash"]
    monkeypatch.setitem(ATTENTION_BACKENDS, "flash", fast._replace(limits={}))
    folder = run()
    assert "attention   sdpa (ran, and equals the reference)" in capsys.readouterr().out
    monkeypatch.setitem(ATTENTION_BACKENDS, "flash", fast)  # as if a package had been installed in the meantime
    assert choose_again({})[0] == "flash"
    goes_on_with("attention   sdpa", run, folder, capsys)


def choose_again(before):
    found = KernelRequirements(frozenset({AttentionSpec(2, 2, 8, 8)}), frozenset(), False)
    kernels, why = choose_kernels(ParallelConfig(), found, device=CPU, dtype=torch.float32, previous=before)
    return kernel_names(kernels)["attention"], why["attention"]


def test_a_kernel_of_before_that_does_not_run_is_said_to_be_gone():
    assert choose_again({"attention": "sdpa"}) == ("sdpa", "sdpa (ran, and equals the reference)")
    name, why = choose_again({"attention": "flash2"})
    assert (name, why) == ("flash", "flash (ran, and equals the reference; it was flash2 before)")


def test_layers_that_see_different_windows_have_masks_of_their_own():
    """Each layer is told of exactly the keys that it alone would see, in any order of layers."""
    for windows in ([None, 3, 5], [3, None, 5], [5, 3, None], [12, 3, None]):
        blocks = [{"mixer": {"window": window}} for window in windows]
        sizes = {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_positions": 12, "vocab_size": 64}
        model = GPT(ModelConfig.model_validate(sizes | {"blocks": blocks})).init_weights(0)
        model.attention = REFERENCE
        tokens = torch.randint(0, 9, (2, 12), generator=torch.Generator().manual_seed(0))
        for found in (None, find_documents(tokens, 0)):
            places = model._places(tokens, None, found)
            for block, window in zip(model.blocks, windows, strict=True):
                seen = [
                    [window is None or s > t - window for s in range(t + 1)] + [False] * (11 - t) for t in range(12)
                ]
                expected = torch.tensor(seen).expand(2, 1, 12, 12)
                if found is not None:
                    index = (tokens == 0).cumsum(1)
                    expected = expected & (index[:, None, :, None] == index[:, None, None, :])
                assert torch.equal(places.of(block.mixer).mask.expand(2, 1, 12, 12), expected)


def test_a_mask_written_out_is_made_once_in_the_type_of_the_queries():
    """Of a mask of bool, PyTorch makes and keeps such a copy in each layer."""
    mask = ATTENTION_BACKENDS["sdpa"].build_mask(Visibility(6, 6, CPU, 2, dtype=torch.bfloat16))
    assert mask.dtype == torch.bfloat16
    assert mask[0, 0].isfinite().sum() == 11
    assert ATTENTION_BACKENDS["sdpa"].build_mask(Visibility(6, 6, CPU, 6)) is None


def test_documents_apart_and_a_cache_are_refused_together():
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, n_positions=12, vocab_size=64)).init_weights(0)
    tokens = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="a cache is of one text a sample"):
        model.logits(tokens, model.new_cache(), find_documents(tokens, 0))


def test_naming_a_kernel_that_is_not_here_is_one_line():
    with pytest.raises(UserError, match=r"^parallel.attention: flash3: it does not run on cpu; use auto$"):
        choice(ASKED, attention="flash3")
