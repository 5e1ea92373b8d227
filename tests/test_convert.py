"""The final model opens elsewhere: a dense GPT-2 in Transformers, with the same logits."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import command

from training.config import ModelConfig
from training.model import GPT, convert


def gpt2(n_layer=2, **changes) -> GPT:
    sizes = {"n_layer": n_layer, "n_head": 4, "n_embd": 32, "n_positions": 24, "vocab_size": 320}
    return GPT(ModelConfig.model_validate(sizes | changes)).init_weights(0)


def perturbed(model: GPT) -> GPT:
    """No bias zero, no norm one: what is initialised trivially hides mistakes."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layer": 12},
        {"tie_head": False},
        {"norm_eps": 1e-3},
        {"blocks": [{"ffn": {"type": "mlp", "hidden": 48, "activation": "gelu"}}]},
    ],
    ids=["12 layers", "untied", "large epsilon", "exact gelu"],
)
def test_a_dense_model_opens_as_plain_gpt2_with_equal_logits(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    model = perturbed(gpt2(**changes))
    convert.write(tmp_path, model.state_dict(), model.config, end_of_text=5)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    x = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model.logits(x), rtol=1e-4, atol=1e-4)


def test_the_model_of_a_run_opens_with_its_tokenizer(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    from training.train import train

    made = config(model={"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}, steps=4)
    assert train(made) == 0
    folder = tmp_path / "runs/small/model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "def f(x):\n    return x"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == text
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    new = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert new.shape == (1, ids.shape[1] + 5)
    done = command(
        "-m", "training.generate", "--run", str(tmp_path / "runs/small"),
        "--prompt", text, "--tokens", "5", "--temperature", "0",
    )  # fmt: skip
    # Ours begins a document with its end-of-text token, so only the length can be compared with a bare prompt.
    begun = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), ids], dim=1)
    theirs = model.generate(begun, max_new_tokens=5, do_sample=False)[0, begun.shape[1] :]
    assert done.stdout == text + tokenizer.decode(theirs) + "\n"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"blocks": [{"ffn": {"type": "moe"}}]}, "experts"),
        ({"blocks": [{"ffn": {"type": "mlp", "gated": True}}]}, "gated layers"),
        ({"blocks": [{}, {"ffn": {"type": "mlp", "hidden": 8}}]}, "blocks that differ"),
        ({"blocks": [{"mixer": {"qk_norm": True}}]}, "QK-norm"),
        ({"position": "rope"}, "rope positions"),
        ({"norm": "rmsnorm"}, "rmsnorm"),
        ({"bias": False}, "no biases"),
        ({}, None),
    ],
)
def test_what_gpt2_does_not_have_is_named(changes, reason):
    assert convert.why_not_gpt2(ModelConfig.model_validate({"n_layer": 2} | changes)) == reason


def test_another_model_is_written_under_our_own_names(tmp_path):
    from safetensors.torch import load_file

    model = gpt2(blocks=[{"ffn": {"type": "moe", "hidden": 8}}])
    convert.write(tmp_path, model.state_dict(), model.config, end_of_text=5)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["model_type"] == "training_gpt"
    again = GPT(ModelConfig.model_validate({k: found[k] for k in ModelConfig.model_fields}, strict=False))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randint(0, 320, (1, 24), generator=torch.Generator().manual_seed(2))
    assert torch.equal(again.logits(x), model.logits(x))
