"""An upcycled Mixture of Experts computes the same as its dense model, however it is split, and can be trained."""

import json
import re
import shutil

import pytest
import torch
from conftest import rows, tensors
from safetensors.torch import load_file
from test_hf import add_noise
from test_init_from import SMALL, STILL
from test_restart import flip_a_bit
from test_run_folder import without_data_lines

from training import train
from training.batch import Batch
from training.config import MLPConfig, ModelConfig, MoEConfig
from training.errors import UserError
from training.model import GPT, init_weights
from training.weights import hf, init_from, upcycle

SIZES = SMALL | {"vocab_size": 257}
COPIES = {"type": "moe", "n_experts": 4, "top_k": 2, "hidden": 64}
FINE = COPIES | {"hidden": 32}  # of the dense layer's 64
SWIGLU = {"type": "mlp", "hidden": 48, "activation": "silu", "gated": True}
RELU2 = {"type": "mlp", "hidden": 48, "activation": "relu2"}
LINE = re.compile(
    r"upcycled (\S+): (.*); loss (\d+\.\d{4}) before, (\d+\.\d{4}) after, "
    r"largest change of a logit (\d\.\de[-+]\d\d)\n"
)

# name: (options of the model, the dense layer, the experts, G)
CASES = {
    "copies": ({}, {}, COPIES, 1),
    "one expert a token": ({}, {}, COPIES | {"top_k": 1}, 1),
    "halves": ({}, {}, FINE, 2),
    "eighths, two groups of three": ({}, {}, FINE | {"n_experts": 24, "top_k": 16, "hidden": 8}, 8),
    "thirds": ({}, RELU2, FINE | {"n_experts": 9, "top_k": 3, "hidden": 16}, 3),
    "no biases": ({"bias": False}, {}, FINE, 2),
    "SwiGLU": ({}, SWIGLU, FINE | {"hidden": 24}, 2),
    "SwiGLU, no biases, shared": ({"bias": False, "norm": "rmsnorm"}, SWIGLU, FINE | {"hidden": 16, "n_shared": 1}, 2),
    "relu2, shared": ({}, RELU2, FINE | {"hidden": 16, "n_shared": 1}, 2),
    "two shared beside copies": ({}, RELU2, COPIES | {"hidden": 16, "n_shared": 2}, 1),
    "sigmoid": ({}, {}, FINE | {"scoring": "sigmoid"}, 2),
    "sigmoid, scaled": ({}, {}, FINE | {"scoring": "sigmoid", "route_scale": 2.5, "hidden": 16, "top_k": 4}, 4),
    "copies, scaled": ({}, {}, COPIES | {"route_scale": 2.5}, 1),
    "scaled, shared": ({}, SWIGLU, FINE | {"route_scale": 0.7, "hidden": 16, "n_shared": 1}, 2),
}


def build_upcycled(model: dict, mlp: dict, moe: dict, every: int = 1) -> tuple[GPT, GPT]:
    """Return a dense float64 model with random weights and biases, and its upcycled model."""
    moe = {"renormalize": True} | moe | {name: mlp[name] for name in ("activation", "gated") if name in mlp}
    theirs = ModelConfig.model_validate(SIZES | model | {"blocks": [{"ffn": mlp}]})
    ours = ModelConfig.model_validate(SIZES | model | {"blocks": [{"ffn": mlp}] * (every - 1) + [{"ffn": moe}]})
    dense = add_noise(init_weights(GPT(theirs, dtype=torch.float64), 0))
    experts = init_weights(GPT(ours, dtype=torch.float64), 1)
    weights = upcycle.upcycle_weights(dense.state_dict(), upcycle.upcycled_layers(theirs, ours), experts.state_dict())
    experts.load_state_dict(experts.state_dict() | weights)
    return dense, experts


def tokens(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, 257, (rows, 32), generator=torch.Generator().manual_seed(2))


def backward(model: GPT) -> torch.Tensor:
    """Return the logits; compute the gradients of a loss."""
    logits_BTV = model.logits(tokens())
    torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens().roll(-1, 1).flatten()).backward()
    return logits_BTV.detach()


@pytest.mark.parametrize("name", CASES)
def test_the_function_and_its_gradients_are_the_dense_models(name):
    model, mlp, moe, n_routed = CASES[name]
    dense, experts = build_upcycled(model, mlp, moe)
    logits = backward(dense)
    torch.testing.assert_close(backward(experts), logits, rtol=0, atol=1e-6)
    for one, other in ((dense.wte, experts.wte), (dense.blocks[0].mixer.out, experts.blocks[0].mixer.out)):
        torch.testing.assert_close(other.weight.grad, one.weight.grad, rtol=1e-4, atol=1e-8)
    for block, known in zip(
        experts.blocks, dense.blocks, strict=True
    ):  # copies together get the gradient of the dense layer
        n_shared = moe.get("n_shared", 0)
        first = n_shared * moe["hidden"]
        up = block.ffn.experts.up.grad.unflatten(0, (-1, n_routed)).sum(0).flatten(0, 1)
        torch.testing.assert_close(up, known.ffn.up.weight.grad[first:], rtol=1e-4, atol=1e-8)
        if n_shared:
            torch.testing.assert_close(block.ffn.shared.up.weight.grad, known.ffn.up.weight.grad[:first])


def test_upcycling_renormalizes_the_weight_of_a_single_expert():
    moe = MoEConfig(top_k=1, n_experts=4, hidden=64)
    assert not moe.is_renormalized
    assert upcycle.resolve_experts(moe, MLPConfig(hidden=64), 16, 0, "here").renormalize is True


def test_experts_may_be_in_every_second_layer():
    dense, experts = build_upcycled({}, {}, FINE, every=2)
    assert [block.ffn.type for block in experts.config.layers()] == ["mlp", "moe"]
    torch.testing.assert_close(experts.logits(tokens()), dense.logits(tokens()), rtol=0, atol=1e-6)


def test_every_group_holds_every_shard_and_has_its_own_router_row():
    dense, experts = build_upcycled({}, {}, FINE)
    ffn = experts.blocks[0].ffn
    for group in (0, 2):
        assert torch.equal(ffn.experts.up[group : group + 2].flatten(0, 1), dense.blocks[0].ffn.up.weight)
        assert torch.equal(ffn.router.weight[group], ffn.router.weight[group + 1])
    assert not torch.equal(ffn.router.weight[0], ffn.router.weight[2])


def test_tokens_that_get_parts_of_groups_are_counted_and_not_compared():
    dense, experts = build_upcycled({}, {}, FINE | {"n_experts": 6, "scoring": "sigmoid"})
    row_C = torch.randn(16, generator=torch.Generator().manual_seed(0))
    row_C *= 8 / row_C.norm()  # so large that some sigmoids are 1 to the last bit
    experts.blocks[1].ffn.router.weight.data = torch.stack([n * row_C for n in (1, 1, 2, 2, 3, 3)])
    samples = [Batch(row[None], row[None]) for row in tokens(4)]
    change = upcycle.compare(dense, experts, samples)
    assert 0 < change.n_tied < change.n_tokens == 128
    assert change.max_logit_change < 1e-6
    assert (dense.logits(tokens(4)) - experts.logits(tokens(4))).abs().max() > 0.1
    assert not change.is_exact  # more ties than chance explains
    assert change._replace(n_tied=1, n_tokens=4096).is_exact


# --- runs ------------------------------------------------------------------------------------------


@pytest.fixture
def dense(run):
    """Return the folder of a finished dense run."""
    return run(name="dense", model=SIZES, steps=4)


def from_folder(folder, ffn=FINE, **changes) -> dict:
    return {"model": {"blocks": [{"ffn": ffn}]}, "init_from": str(folder)} | changes


def summary(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize(
    ("ffn", "words"),
    [
        (COPIES, "2 layers of 4 experts, copies"),
        (FINE, "2 layers of 4 experts, groups of 2"),
        (FINE | {"hidden": 16, "n_shared": 2}, "2 layers of 4 experts, groups of 2 and 2 shared"),
    ],
    ids=str,
)
def test_a_run_starts_from_a_dense_run_with_experts(run, dense, capsys, ffn, words):
    capsys.readouterr()
    run_dir = run(**from_folder(dense, ffn, optim=STILL))
    (line,) = without_data_lines(capsys.readouterr().err)
    folder, split, before, after, change = LINE.fullmatch(f"{line}\n").groups()
    assert (folder, split, before) == (str(dense), words, after)
    assert float(change) < 1e-5
    assert summary(run_dir)["val_loss"] == pytest.approx(summary(dense)["val_loss"], abs=1e-5)
    assert summary(run_dir)["parameters"] > summary(dense)["parameters"]


def test_only_dense_layers_of_the_folder_become_experts(run, dense, capsys):
    still = {"init_from": str(dense), "optim": STILL}
    first = run(name="first", model={"blocks": [{"ffn": COPIES}, {}]}, **still)
    capsys.readouterr()
    run_dir = run(name="then", model={"blocks": [{}, {"ffn": FINE}]}, init_from=str(first), optim=STILL)
    assert "1 layer of 4 experts, groups of 2;" in capsys.readouterr().err
    config = hf.read_config(run_dir / "model")[1]
    assert [block.ffn.hidden for block in config.layers()] == [64, 32]
    assert summary(run_dir)["val_loss"] == pytest.approx(summary(first)["val_loss"], abs=1e-5)


def test_a_gpt2_of_transformers_becomes_experts(run, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 257}
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).eval()
    theirs.save_pretrained(tmp_path / "gpt2")
    run_dir = run(**from_folder(tmp_path / "gpt2", optim=STILL, steps=3))
    architecture, config = hf.read_config(run_dir / "model")
    ours = GPT(config)
    ours.load_state_dict(hf.read_weights(run_dir / "model", architecture, config))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(tokens()), theirs(tokens()).logits, rtol=0, atol=1e-4)


def test_large_activations_are_no_error(run, tmp_path, capsys):
    """GPT-2 has a channel with values of thousands among others of 1; float32 logits would differ by 5e-4."""
    config = ModelConfig.model_validate(SIZES)
    model = add_noise(init_weights(GPT(config), 0))
    model.blocks[0].ffn.down.weight.data[3] *= 1e3
    model.norm_f.weight.data *= 50
    hf.write_model(tmp_path / "large", model.state_dict(), config, end_of_text=256)
    run(**from_folder(tmp_path / "large", steps=3))
    assert float(LINE.search(capsys.readouterr().err)[5]) < 1e-5


def test_the_printed_loss_is_that_of_an_evaluation(run, options, dense, tmp_path, capsys):
    lines = [json.dumps({"text": f"Line {i} of many, {'no ' * (i % 5)}more."}) for i in range(400)]
    (tmp_path / "short.jsonl").write_text("\n".join(lines))
    data = options()["data"] | {"sources": [{"type": "files", "paths": [str(tmp_path / "short.jsonl")]}]}
    for isolated in (False, True):
        model = {"isolate_documents": isolated, "blocks": [{"ffn": FINE}]}
        run_dir = run(name=f"isolated-{isolated}", model=model, init_from=str(dense), optim=STILL, steps=3, data=data)
        before = float(LINE.search(capsys.readouterr().err)[3])
        assert before == pytest.approx(summary(run_dir)["val_loss"], abs=1e-4)  # the same 16 samples


def test_long_samples_are_cut_for_the_comparison(run, dense, monkeypatch):
    monkeypatch.setattr(init_from, "MAX_LENGTH", 16)
    monkeypatch.setattr(init_from, "MAX_TOKENS", 64)
    compare, changes = upcycle.compare, []
    monkeypatch.setattr(upcycle, "compare", lambda *args: changes.append(compare(*args)) or changes[0])
    run(**from_folder(dense, steps=3))
    assert changes[0].n_tokens == 64 and changes[0].max_logit_change < 1e-5


def test_two_starts_are_bit_identical_and_resuming_needs_no_folder(run, dense, capsys):
    options = from_folder(dense, upcycle_noise=0.1)
    one, other = run(name="one", **options), run(name="other", **options)
    assert tensors(one, 8) == tensors(other, 8) and rows(one) == rows(other)
    capsys.readouterr()
    before = tensors(one, 8), rows(one)
    flip_a_bit(one / "checkpoints/step-00000008/model.safetensors")
    shutil.rmtree(dense)
    run(name="one", **options)
    assert (tensors(one, 8), rows(one)) == before
    assert "upcycled" not in capsys.readouterr().err
    with pytest.raises(UserError, match=f"init_from {dense}: no such folder"):
        run(name="one", **options, resume="never")


def test_copies_diverge_in_training(run, dense):
    run_dir = run(**from_folder(dense, COPIES))
    weights = load_file(run_dir / "checkpoints/step-00000008/model.safetensors")
    for layer in (0, 1):
        first, *others = weights[f"blocks.{layer}.ffn.experts.up"]
        assert all((other - first).norm() > 1e-3 * first.norm() for other in others)


def test_noise_distinguishes_copies_after_the_check(run, dense, capsys):
    capsys.readouterr()
    options = from_folder(dense, COPIES, optim=STILL, steps=3)
    still, noisy, other = (
        load_file(run(name=name, **options, **more) / "checkpoints/step-00000003/model.safetensors")
        for name, more in (
            ("still", {}),
            ("noisy", {"upcycle_noise": 0.5}),
            ("seed", {"upcycle_noise": 0.5, "seed": 1}),
        )
    )
    lines = [f"{line}\n" for line in without_data_lines(capsys.readouterr().err)]
    assert [bool(LINE.fullmatch(line)) for line in lines] == [True, True, False, True, False]
    before, after = LINE.fullmatch(lines[1])[4], re.fullmatch(r"with noise 0.5: loss (\d\.\d{4})\n", lines[2])[1]
    assert after != before
    for name, tensor in still.items():
        difference = noisy[name] - tensor
        if not re.search(r"experts\.(up|down)$", name):
            assert name.endswith(("load", "selection_bias")) or not difference.any(), name
            continue
        assert difference.std().item() == pytest.approx(0.5 * tensor.std().item(), rel=0.1), name
        first, *others = difference
        assert not any(torch.equal(first, one) for one in others)
        assert not torch.equal(noisy[name], other[name])


# --- errors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ffn", "words"),
    [
        (
            {"hidden": 48},
            "ffn.hidden of layer 0 is 48, which does not divide the dense layer's 64 in PATH: use 64 or 32",
        ),
        ({"hidden": 128}, "ffn.hidden of layer 0 is 128, which does not divide the dense layer's 64"),
        (
            {"hidden": 16},
            "ffn.hidden of layer 0 is 16, which splits the dense layer's 64 in PATH into 4, 0 for shared experts; "
            "the other 4 must divide top_k 2 and n_experts 4: use 64 or 32",
        ),
        (
            {"hidden": 32, "n_experts": 6, "top_k": 3},
            "0 for shared experts; the other 2 must divide top_k 3 and n_experts 6: use 64",
        ),
        ({"n_shared": 1}, "which leaves nothing of the dense layer's 64 in PATH beside 1 for shared experts: use 32"),
        ({"n_shared": 6, "hidden": 8, "top_k": 1}, "the other 2 must divide top_k 1 and n_experts 4: no width fits"),
        ({"renormalize": False}, "ffn.renormalize of layer 0 is false; upcycling PATH needs true"),
        ({"activation": "silu"}, "ffn.activation of layer 0 is silu, but PATH has gelu_tanh; leave it out"),
        ({"gated": True}, "ffn.gated of layer 0 is True, but PATH has False; leave it out"),
    ],
    ids=str,
)
def test_experts_that_cannot_compute_the_same_are_one_line_and_status_2(
    options, tmp_path, capsys, config, pretrained, ffn, words
):
    with pytest.raises(UserError) as raised:
        init_from.resolve_init_from(config(**from_folder(pretrained, COPIES | ffn)))
    assert words.replace("PATH", str(pretrained)) in str(raised.value)
    text = json.dumps(options(**from_folder(pretrained, COPIES | ffn)))
    (tmp_path / "one.yaml").write_text(text)
    assert train.main(["--config", str(tmp_path / "one.yaml")]) == 2
    assert capsys.readouterr().err == f"error: {raised.value}\n"
    assert not (tmp_path / "runs/small").exists()


@pytest.fixture
def pretrained(tmp_path):
    """Return a folder with a dense model."""
    config = ModelConfig.model_validate(SIZES)
    hf.write_model(tmp_path / "pretrained", init_weights(GPT(config), 0).state_dict(), config, end_of_text=256)
    return tmp_path / "pretrained"


def test_a_hidden_width_of_null_is_four_times_the_models(config, pretrained):
    for ffn, n_routed in (({}, 1), ({"hidden": 32}, 2)):
        options = from_folder(pretrained, {"type": "moe", "n_experts": 4} | ffn)
        model = init_from.resolve_init_from(config(**options)).model
        assert upcycle.upcycled_layers(ModelConfig.model_validate(SIZES), model)[1][1] == n_routed


def add(change: float):
    """Return a defect: a change of some weights."""

    def planted(weights: dict) -> None:
        weights["blocks.1.ffn.experts.down_bias"][:, 0] += change

    return planted


def ungroup(weights: dict) -> None:
    rows_EC = weights["blocks.1.ffn.router.weight"]
    rows_EC[1] = -rows_EC[0]


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        (add(1e-3), r"largest change of a logit \d\.\de-0[34]: more than rounding explains \(0.0001\)"),
        (add(float("nan")), "largest change of a logit nan: more than"),
        (ungroup, r"\d+ of 512 tokens tied between equal scores: more than"),
    ],
    ids=["1e-3", "nan", "ungrouped"],
)
def test_a_function_that_changed_is_an_error(options, pretrained, tmp_path, capsys, monkeypatch, planted, words):
    correct = upcycle.upcycle_weights

    def wrong(*args) -> dict:
        weights = correct(*args)
        planted(weights)
        return weights

    monkeypatch.setattr(upcycle, "upcycle_weights", wrong)
    file = tmp_path / "one.yaml"
    file.write_text(json.dumps(options(**from_folder(pretrained))))
    assert train.main(["--config", str(file)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # the first run of a session prepares the text before
    assert error.startswith(f"error: upcycled {pretrained}: ")
    assert re.search(words, error)
    assert not (tmp_path / "runs/small").exists()


def test_an_unfinished_run_is_an_error(config, dense):
    shutil.rmtree(dense / "model")
    with pytest.raises(UserError, match=f"init_from {dense}: this run is not finished and has no model; let it finish"):
        init_from.resolve_init_from(config(**from_folder(dense)))


def test_a_run_cannot_start_from_itself(config, dense):
    for folder in (dense, dense / "model"):
        with pytest.raises(UserError, match="a run cannot start from itself; choose another --name"):
            init_from.resolve_init_from(config(**from_folder(folder, name="dense")), fresh=True)
    assert dense.exists()


def test_noise_without_an_upcycled_layer_is_an_error(config, options, tmp_path, capsys, pretrained):
    with pytest.raises(UserError, match=f"upcycle_noise: no layer that is dense in {pretrained} becomes experts"):
        init_from.resolve_init_from(config(model={}, init_from=str(pretrained), upcycle_noise=0.1))
    file = tmp_path / "one.yaml"
    file.write_text(json.dumps(options(upcycle_noise=0.1)))
    with pytest.raises(SystemExit):
        train.main(["--config", str(file)])
    assert "upcycle_noise: needs init_from" in capsys.readouterr().err


def test_an_export_of_experts_from_swiglu_opens_as_an_architecture_of_transformers(run):
    mixer = {"qk_norm": True}
    sizes = SIZES | {"position": "rope", "norm": "rmsnorm", "bias": False, "blocks": [{"mixer": mixer, "ffn": SWIGLU}]}
    first = run(name="first", model=sizes, steps=3)
    ffn = FINE | {"hidden": 24, "balance": "switch"}
    run_dir = run(name="then", **from_folder(first, ffn), steps=3)
    assert json.loads((run_dir / "model/config.json").read_text())["model_type"] == "qwen3_moe"
