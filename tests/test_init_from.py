"""A run that starts from a model (`init_from`): its sizes, its weights, and every folder that cannot be used."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from conftest import ROOT, environment, rows, tensors, write_config
from safetensors.torch import load_file, save_file
from test_hf import BALANCED, BIASED, GATED, GROUPED, LATENT, MOE, NORMED, SIGMOID, add_noise
from test_restart import check_resume, flip_a_bit

from training import train
from training.config import ModelConfig
from training.data import Tokenizer
from training.data.tokenizer import build_byte_tokenizer
from training.errors import UserError
from training.model import GPT, init_weights
from training.weights import hf, init_from
from training.weights.hf import model_folder

SMALL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 259}
ROTARY = SMALL | {"position": "rope", "norm": "rmsnorm", "bias": False}
MODELS = {
    "gpt2": SMALL,
    "llama": ROTARY | {"tie_head": False, "blocks": [{"ffn": GATED}]},
    "qwen3": ROTARY | {"blocks": [{"mixer": NORMED | {"window": 5}, "ffn": GATED}]},
    "qwen3_moe": ROTARY | {"blocks": [{"mixer": NORMED, "ffn": MOE}, {"mixer": NORMED, "ffn": GATED}]},
    "mixtral": ROTARY | {"blocks": [{"mixer": GROUPED, "ffn": MOE}]},
    "ernie4_5_moe": ROTARY | {"blocks": [{"mixer": GROUPED, "ffn": GATED}, {"mixer": GROUPED, "ffn": BALANCED}]},
    "dots1": ROTARY | {"blocks": [{"mixer": NORMED, "ffn": GATED}, {"mixer": NORMED, "ffn": SIGMOID}]},
    "glm4_moe": ROTARY | {"blocks": [{"mixer": GROUPED, "ffn": SIGMOID}]},
    "deepseek_v3": ROTARY | {"norm_eps": 1e-6, "blocks": [{"mixer": LATENT, "ffn": SIGMOID}]},
    "training_gpt": SMALL
    | {"bigram_rows": 100, "blocks": [{"ffn": {"type": "moe", "n_experts": 4, "hidden": 24}, "short_conv": 3}]},
}
STILL = {"type": "adamw", "learning_rate": 1e-30}  # changes no float32 weight


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes a model to a folder and returns both."""

    def make(model_type: str = "gpt2", **changes) -> tuple[GPT, Path]:
        config = ModelConfig.model_validate(MODELS[model_type] | changes)
        model, path = add_noise(init_weights(GPT(config), 0)), tmp_path / "pretrained"
        for name, buffer in model.named_buffers():
            if model_type in BIASED | {"training_gpt"} and name.endswith("selection_bias"):
                buffer += torch.linspace(-0.1, 0.1, len(buffer))
        assert hf.write_model(path, model.state_dict(), config, end_of_text=256) == model_type
        return model, path

    return make


def initial_model(config) -> GPT:
    """Return the model that a run with these options starts from."""
    config = init_from.resolve_init_from(config)
    model = GPT(config.model)
    model.load_state_dict(model.state_dict() | init_from.load_pretrained(config)[1])
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 257, (2, 16), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("model_type", MODELS)
def test_a_run_starts_from_the_weights_of_a_folder(run, folder, model_type):
    _, path = folder(model_type)
    left = run(model={}, init_from=str(path), optim=STILL, steps=3)
    written, read = (hf.read_config(one)[1].with_explicit_sizes() for one in (left / "model", path))
    assert (written.isolate_documents or False) == (read.isolate_documents or False)  # null: the text has no answers
    assert (
        written.model_copy(update={"isolate_documents": read.isolate_documents}) == read
    )  # all of its 259 rows belong to the model, though the tokenizer has 257 tokens
    ours, theirs = load_file(left / "model/model.safetensors"), load_file(path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if not name.endswith(("selection_bias", "correction_bias", "load")):  # balancing continues
            assert torch.equal(ours[name], tensor), name


def test_a_run_starts_where_another_ended(run):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 257}
    first = run(name="first", model=sizes)
    then = run(name="then", model={}, init_from=str(first / "model"), optim=STILL)
    losses = [json.loads((folder / "summary.json").read_text())["val_loss"] for folder in (first, then)]
    assert losses[0] == losses[1]


def test_rows_beyond_the_tokenizer_are_in_no_loss_and_in_no_export(run):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 320}
    first = run(name="first", model=sizes, steps=3, optim={"learning_rate": 0.01})
    assert hf.read_config(first / "model")[1].vocab_size == 257
    again = [run(name=f"{n}", model={"vocab_size": n}, init_from=str(first / "model"), optim=STILL, steps=3)
             for n in (257, 320)]  # fmt: skip
    expected, *losses = (json.loads((folder / "summary.json").read_text())["val_loss"] for folder in (first, *again))
    assert losses == [pytest.approx(expected, abs=1e-6)] * 2
    assert [hf.read_config(folder / "model")[1].vocab_size for folder in again] == [257, 257]


def test_resuming_does_not_need_the_folder_and_changes_no_bit(run, folder):
    _, path = folder()
    options = {"model": {"n_positions": 16}, "init_from": str(path)}
    left = run(**options)
    before = tensors(left, 8), rows(left)
    flip_a_bit(left / "checkpoints/step-00000008/model.safetensors")
    shutil.rmtree(path)
    run(**options)
    assert (tensors(left, 8), rows(left)) == before
    with pytest.raises(UserError, match=f"init_from {path}: no such folder"):
        run(**options, resume="never")


def test_resuming_with_other_options_is_an_error(run, config, folder):
    _, path = folder()
    left = run(model={}, init_from=str(path))
    with pytest.raises(UserError, match=f"model.n_embd: 48 is given, but {left} has 16; leave it out"):
        train.train(config(model={"n_embd": 48}, init_from=str(path)))
    with pytest.raises(UserError, match=r"holds a run with other options: .*init_from: .* -> None"):
        train.train(config(model=SMALL))
    path.rename(path.with_name("first"))
    other = folder(n_positions=16)[1].rename(path.with_name("other"))
    changed = r"init_from: .*pretrained -> .*other; model.n_positions: 32 -> 16"
    with pytest.raises(UserError, match=f"holds a run with other options: {changed}"):
        train.train(config(model={}, init_from=str(other)))


def test_the_same_weights_at_another_path_resume(run, config, folder, monkeypatch):
    _, path = folder()
    run(model={}, init_from=str(path), steps=3)
    monkeypatch.chdir(path.parent)
    check_resume(init_from.resolve_init_from(config(model={}, init_from=path.rename("moved").name, steps=3)))
    flip_a_bit(Path("moved/model.safetensors"))
    with pytest.raises(UserError, match=r"with other options: init_from: .*pretrained -> moved; "):
        check_resume(init_from.resolve_init_from(config(model={}, init_from="moved", steps=3)))


def test_another_end_of_text_token_than_the_models_is_told(config, folder):
    _, path = folder()
    options = config(model={}, init_from=str(path))
    line = f"init_from {path}: its end-of-text token is 3, but data.tokenizer has token 256, <|endoftext|>; to use"
    for ids, is_told in ((256, False), ([3, 256], False), (None, False), ([3, 4], True)):
        change(path, eos_token_id=ids)
        assert (line in str(init_from.other_separator(options, build_byte_tokenizer()))) == is_told


def test_a_models_own_tokenizer_keeps_its_end_of_text_token_from_training_to_export(run, config, folder, capsys):
    """As Llama's: the model has no row for one more token."""
    _, path = folder()
    inner = tokenizers.Tokenizer.from_str(
        build_byte_tokenizer().inner.to_str().replace("<|endoftext|>", "<|begin_of_text|>")
    )
    inner.add_special_tokens(["<|end_of_text|>", "<|eot_id|>"])
    inner.save(str(path / "tokenizer.json"))
    change(path, eos_token_id=[258, 257])
    data = config().data.model_dump() | {"tokenizer": {"type": "file", "path": str(path)}}
    left = run(model={}, init_from=str(path), steps=3, data=data)
    assert "end-of-text token" not in capsys.readouterr().err
    for name in ("config.json", "generation_config.json"):
        fields = json.loads((left / "model" / name).read_text())
        assert (fields["bos_token_id"], fields["eos_token_id"]) == (258, 258)
    assert json.loads((left / "model/tokenizer_config.json").read_text())["eos_token"] == "<|eot_id|>"
    assert Tokenizer.load(left / "tokenizer").end_of_text == 258
    assert hf.read_config(left / "model")[1].vocab_size == 259


def test_starting_over_reads_the_folder_again(run, folder):
    _, path = folder()
    run(model={"n_positions": 16}, init_from=str(path), steps=3)
    left = run(model={}, init_from=str(path), steps=3, resume="never")
    assert hf.read_config(left / "model")[1].n_positions == 32


@pytest.mark.parametrize(
    ("model_options", "words"),
    [
        ({"n_embd": 48}, "model.n_embd: 48 is given, but PATH has 16; leave it out"),
        ({"n_layer": 12}, "model.n_layer: 12 is given, but PATH has 2; leave it out"),
        ({"position": "rope"}, "model.position: rope is given, but PATH has learned"),
        ({"tie_head": False}, "model.tie_head: False is given, but PATH has True"),
        ({"norm_eps": 1e-6}, "model.norm_eps: 1e-06 is given, but PATH has 1e-05"),
        ({"n_positions": 64}, "model.n_positions: 64 is given, but PATH has 32"),
        ({"vocab_size": 258}, "model.vocab_size: 258 is given, but PATH has 259"),
        ({"blocks": [{"mixer": {"n_kv_head": 1}}]}, "mixer.n_kv_head of layer 0 is 1, but PATH has 2"),
        ({"blocks": [{}, {"mixer": {"window": 8}}]}, "mixer.window of layer 1 is 8, but PATH has None"),
        ({"blocks": [{"mixer": {"type": "latent"}}]}, "mixer.type of layer 0 is latent, but PATH has attention"),
        ({"blocks": [{"mixer": {"window": 8}, "ffn": {"type": "moe"}}]}, "mixer.window of layer 0 is 8, but PATH has"),
        ({"blocks": [{"ffn": {"type": "moe", "hidden": 24}}]}, "ffn.hidden of layer 0 is 24, which does not divide"),
        ({"blocks": [{"ffn": {"hidden": 48}}]}, "ffn.hidden of layer 0 is 48, but PATH has 64"),
    ],
    ids=str,
)
def test_options_that_contradict_the_folder_are_an_error(config, folder, model_options, words):
    _, path = folder()
    with pytest.raises(UserError) as raised:
        init_from.resolve_init_from(config(model=model_options, init_from=str(path)))
    assert words.replace("PATH", str(path)) in str(raised.value)


def test_a_type_that_is_left_out_is_the_default_one(config, folder):
    _, path = folder("qwen3_moe")
    with pytest.raises(UserError, match=f"ffn.type of layer 0 is mlp, but {path} has moe"):
        init_from.resolve_init_from(config(model={"blocks": [{"ffn": {"activation": "silu"}}]}, init_from=str(path)))


def test_options_may_repeat_what_the_folder_has(config, folder):
    _, path = folder()
    blocks = [{"mixer": {"head_dim": 8, "n_kv_head": 2, "window": None}, "ffn": {"hidden": 64}}, {}]
    alone = init_from.resolve_init_from(config(model={}, init_from=str(path)))
    assert alone.model.vocab_size == 259  # null: the folder's number, not the tokenizer's
    for model_options in (SMALL, {"blocks": blocks}, {"vocab_size": None}, alone.model.model_dump()):
        assert init_from.resolve_init_from(config(model=model_options, init_from=str(path))).model == alone.model


def test_a_shorter_context_crops_the_position_embedding(config, folder):
    model, path = folder()
    short = initial_model(config(model={"n_positions": 16}, init_from=str(path)))
    assert short.wpe.weight.shape == (16, 16)
    assert torch.equal(short.logits(tokens()), model.logits(tokens()))


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_new_rows_of_the_vocabulary_are_the_mean_of_the_others(config, folder, model_type):
    model, path = folder(model_type)
    options = config(model={"vocab_size": 300}, init_from=str(path))
    wide = initial_model(options)
    torch.testing.assert_close(wide.logits(tokens())[..., :259], model.logits(tokens()), rtol=0, atol=1e-6)
    for table in filter(None, (wide.wte, wide.head)):
        torch.testing.assert_close(table.weight[259:], table.weight[:259].mean(0).expand(41, -1))
    again = initial_model(options)
    assert all(torch.equal(one, other) for one, other in zip(wide.parameters(), again.parameters(), strict=True))


def test_document_isolation_and_balance_are_the_users_choice(config, folder):
    model, path = folder("qwen3_moe")
    balancing = {"type": "moe", "balance": "both", "bias_rate": 0.5}
    model_options = {"isolate_documents": True, "blocks": [{"ffn": balancing}, {}]}
    resolved = init_from.resolve_init_from(config(model=model_options, init_from=str(path))).model
    moe, mlp = (block.ffn for block in resolved.layers())
    assert resolved.isolate_documents and mlp.type == "mlp"
    assert (moe.balance, moe.bias_rate, moe.n_experts) == ("both", 0.5, MOE["n_experts"])
    with torch.no_grad():
        torch.testing.assert_close(
            initial_model(config(model=model_options, init_from=str(path))).logits(tokens()), model.logits(tokens())
        )


def test_parts_that_begin_as_zeros_may_be_added_and_are_kept(config, folder):
    new = {"bigram_rows": 50, "blocks": [{"short_conv": 4}, {}]}
    model, path = folder()
    started = initial_model(config(model=new, init_from=str(path)))
    assert started.bigram is not None and started.blocks[0].conv_1 is not None and started.blocks[1].conv_1 is None
    assert torch.equal(started.logits(tokens()), model.logits(tokens()))
    model, path = folder("training_gpt")
    for model_options in (
        {},
        {"blocks": [{"ffn": {"type": "moe"}}]},
        {"bigram_rows": 100, "blocks": model.config.blocks},
    ):
        again = initial_model(config(model=model_options, init_from=str(path)))
        assert torch.equal(again.logits(tokens()), model.logits(tokens()))
    for model_options, words in [
        ({"bigram_rows": 99}, f"model.bigram_rows: 99 is given, but {path} has 100"),
        ({"blocks": [{"ffn": {"type": "moe"}, "short_conv": 4}]}, f"short_conv of layer 0 is 4, but {path} has 3"),
        (
            {"blocks": [{"ffn": {"type": "moe"}, "short_conv": None}]},
            f"short_conv of layer 0 is None, but {path} has 3",
        ),
    ]:
        with pytest.raises(UserError, match=re.escape(words)):
            init_from.resolve_init_from(config(model=model_options, init_from=str(path)))


def test_experts_and_parts_that_begin_as_zeros_may_come_together(run, folder):
    _, path = folder()
    block = {"ffn": {"type": "moe", "n_experts": 4, "top_k": 2, "hidden": 32}, "short_conv": 3}
    left = run(model={"bigram_rows": 50, "blocks": [block]}, init_from=str(path), optim=STILL, steps=1)
    _, config = hf.read_config(left / "model")
    assert config.bigram_rows == 50 and {layer.short_conv for layer in config.layers()} == {3}
    assert {layer.ffn.type for layer in config.layers()} == {"moe"}


def test_rules_between_options_hold_for_the_folders_sizes(config, folder):
    _, path = folder(n_positions=24)
    with pytest.raises(UserError, match=r"batch_tokens: 256 is not a multiple of model.n_positions 24$"):
        init_from.resolve_init_from(config(model={}, init_from=str(path)))


def test_a_tokenizer_with_more_tokens_than_rows_is_an_error(config, folder):
    _, path = folder(vocab_size=250)
    with pytest.raises(UserError, match=r"model.vocab_size: 250 is less than the tokenizer's 257; use 257"):
        train.train(config(model={}, init_from=str(path)))
    assert train.train(config(model={"vocab_size": 257}, init_from=str(path), steps=3)) == 0


def test_the_options_need_config_json_only(config, folder):
    _, path = folder()
    options = config(model={}, init_from=str(path))
    (path / "model.safetensors").rename(path / "elsewhere")
    assert init_from.resolve_init_from(options).model.n_embd == 16
    with pytest.raises(UserError, match=r"no model.safetensors"):
        init_from.load_pretrained(init_from.resolve_init_from(options))


# --- folders that cannot be used -------------------------------------------------------------------


def change(path: Path, **changes) -> None:
    fields = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(fields))


def tensor(path: Path, name: str, value: torch.Tensor | None) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors | ({} if value is None else {name: value}), path / "model.safetensors")


def write_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def write_index(path: Path, **index) -> None:
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])


FLAWS = {
    "no folder": (shutil.rmtree, "init_from PATH: no such folder"),
    "a file": (lambda p: (shutil.rmtree(p), p.write_text("")), "init_from PATH: no such folder"),
    "no config": (lambda p: (p / "config.json").unlink(), "PATH/config.json: not there"),
    "config is a folder": (
        lambda p: ((p / "config.json").unlink(), (p / "config.json").mkdir()),
        "PATH/config.json: cannot be read: Is a directory",
    ),
    "not JSON": (lambda p: (p / "config.json").write_text("{"), "PATH/config.json: not JSON: "),
    "not text": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00"), "PATH/config.json: not JSON: "),
    "deep JSON": (lambda p: (p / "config.json").write_text("[" * 10**6), "PATH/config.json: not JSON: "),
    "a list": (lambda p: (p / "config.json").write_text("[]"), "PATH/config.json: not a JSON object"),
    "no type": (lambda p: change(p, model_type=None), "PATH/config.json: no model_type; supported: gpt2, llama"),
    "unknown type": (lambda p: change(p, model_type="mamba"), "model_type 'mamba' is not supported; supported: "),
    "odd type": (lambda p: change(p, model_type=["gpt2"]), "model_type ['gpt2'] is not supported; supported: "),
    "pickled": (
        write_pickle,
        "PATH: no model.safetensors and no model.safetensors.index.json; pickled weights are",
    ),
    "no index": (lambda p: write_index(p), "PATH/model.safetensors.index.json: no weight_map from tensors to files"),
    "missing shard": (
        lambda p: write_index(p, weight_map={"x": "model-00002-of-00002.safetensors"}),
        "PATH/model-00002-of-00002.safetensors: not there, though model.safetensors.index.json names it",
    ),
    "shard elsewhere": (
        lambda p: write_index(p, weight_map={"x": "../x.safetensors"}),
        "x.safetensors: not there, though model.safetensors.index.json names it",
    ),
    "truncated": (truncate, "PATH/model.safetensors: damaged, or not safetensors: "),
    "empty": (lambda p: (p / "model.safetensors").write_bytes(b""), "PATH/model.safetensors: damaged, or not safe"),
    "missing tensor": (
        lambda p: tensor(p, "transformer.h.1.ln_1.bias", None),
        "PATH: missing tensors: transformer.h.1.ln_1.bias; does config.json belong to these weights?",
    ),
    "missing tensors": (
        lambda p: change(p, n_layer=3),
        "PATH: missing tensors: transformer.h.2.attn.c_attn.bias and 11 more; does config.json",
    ),
    "unknown tensors": (
        lambda p: change(p, n_layer=1),
        "PATH: unknown tensors: transformer.h.1.attn.c_attn.bias and 11 more; does config.json",
    ),
    "another's tensor": (
        lambda p: tensor(p, "score.weight", torch.ones(2)),
        "unknown tensors: score.weight",
    ),
    "shape": (
        lambda p: change(p, n_inner=48),
        "PATH: transformer.h.0.mlp.c_fc.weight has shape (16, 64); config.json needs (16, 48)",
    ),
    "transposed": (
        lambda p: tensor(p, "transformer.h.0.attn.c_attn.weight", torch.ones(48, 16)),
        "PATH: transformer.h.0.attn.c_attn.weight has shape (48, 16); config.json needs (16, 48)",
    ),
    "not finite": (
        lambda p: tensor(p, "transformer.ln_f.bias", torch.full((16,), float("nan"))),
        "PATH: transformer.ln_f.bias is not finite",
    ),
    "whole numbers": (
        lambda p: tensor(p, "transformer.ln_f.bias", torch.ones(16, dtype=torch.int8)),
        "PATH: transformer.ln_f.bias is torch.int8; quantized weights are not supported",
    ),
    "head that is not tied": (
        lambda p: tensor(p, "lm_head.weight", torch.ones(259, 16)),
        "PATH: lm_head.weight is not the embedding, though tie_word_embeddings says so",
    ),
    "a width beyond the weights": (
        lambda p: change(p, n_embd=2**27, n_inner=None),
        "PATH: transformer.wte.weight has shape (259, 16); config.json needs (259, 134217728)",
    ),
    "sizes beyond the address space": (
        lambda p: change(p, n_embd=2**31 - 2, n_inner=None),
        "PATH/config.json: its sizes are too large",
    ),
    "layers beyond the weights": (
        lambda p: change(p, n_layer=10_000),
        "PATH: 28 tensors, but config.json needs 10000 or more; does it belong to these weights?",
    ),
    "a feature": (lambda p: change(p, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx: True"),
}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "training_gpt"])
def test_a_number_of_experts_is_compared_with_the_weights_before_memory_is_taken(config, folder, model_type):
    _, path = folder(model_type)
    text = re.sub(r'(_experts"): \d', rf"\1: {2**31 - 1}", (path / "config.json").read_text())
    (path / "config.json").write_text(text)
    words = r"\d+ tensors, but config.json needs \d+ or more|has shape .*; config.json needs"
    with pytest.raises(UserError, match=words):
        init_from.check_pretrained(config(init_from=str(path)))


@pytest.mark.parametrize("name", FLAWS)
def test_a_folder_that_cannot_be_used_is_one_line_and_status_2(options, folder, tmp_path, capsys, name):
    flaw, words = FLAWS[name]
    _, path = folder()
    file = write_config(tmp_path / "one.yaml", options(init_from=str(path)))
    text = file.read_text()  # without the model section, which would contradict some of the folders
    start = text.index("\nmodel:")
    file.write_text(text[:start] + text[text.index("\ndata:", start) :])
    flaw(path)
    assert train.main(["--config", str(file)]) == 2
    *notes, error = capsys.readouterr().err.splitlines()  # notes: what the data lacks
    assert error.startswith("error: ") and all(re.match("data: |making the|tokenizing", note) for note in notes)
    assert words.replace("PATH", str(path)) in error
    assert not (tmp_path / "runs/small/checkpoints").exists()


def test_a_name_on_the_hub_is_read_from_its_cache_and_an_error_if_it_is_not_there(tmp_path, folder, options):
    """The test has no network: it writes what the hub's client would have downloaded."""
    _, path = folder()
    kept = tmp_path / "hub/models--someone--tiny"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text("0" * 40)
    shutil.move(path, kept / "snapshots" / ("0" * 40))
    code = f"""
from training.weights import init_from
from training.config import Config
from training.errors import UserError
options = {options(model={})!r}
config = init_from.resolve_init_from(Config.model_validate(options | {{"init_from": "someone/tiny"}}))
print(config.model.n_embd, len(init_from.load_pretrained(config)[1]))
for name in ("someone/else", "some/where/else", "./tiny", "tiny"):
    try:
        init_from.resolve_init_from(Config.model_validate(options | {{"init_from": name}}))
    except UserError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=environment() | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    sizes, unknown, *elsewhere, bare = done.stdout.splitlines()
    assert sizes == "16 36"
    assert unknown.startswith("init_from someone/else: no such folder, and not loaded from the Hugging Face hub: ")
    assert elsewhere == ["init_from some/where/else: no such folder", "init_from ./tiny: no such folder"]
    assert bare.startswith("init_from tiny: no such folder, and not loaded from the Hugging Face hub: ")


def test_prepare_checks_init_from_before_it_tokenizes(options, tmp_path, capsys):
    from training import prepare

    path = write_config(tmp_path / "one.yaml", options(init_from=str(tmp_path / "nowhere")))
    assert prepare.main(["--config", str(path)]) == 2
    assert capsys.readouterr().err == f"error: init_from {tmp_path / 'nowhere'}: no such folder\n"


def test_every_architecture_is_tested():
    assert MODELS.keys() == model_folder.READABLE.keys()
