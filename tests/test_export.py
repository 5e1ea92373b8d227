"""Transformers alone opens every export, with equal logits; custom architectures bring their Python files."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import command, environment
from test_model import BLOCKS, WINDOWS, build

from training import export
from training.config import ModelConfig
from training.data.tokenizer import build_byte_tokenizer
from training.errors import UserError
from training.model import GPT, init_weights
from training.weights import export_check, hf, open_export
from training.weights.hf import custom

SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 48, "vocab_size": 320}
MODERN = {"position": "rope", "norm": "rmsnorm", "bias": False, "tie_head": False}
GATED_MOE = {"type": "moe", "n_experts": 4, "hidden": 32, "gated": True, "activation": "silu"}
LATENT = {"type": "latent", "kv_rank": 16, "rope_dim": 8, "window": 9}
CUSTOM = {
    "gpt2-moe": {"blocks": [{"ffn": {"type": "moe", "n_experts": 4, "hidden": 32}}]},
    "hybrid": {
        **MODERN,
        "logit_softcap": 20.0,
        "bigram_rows": 50,
        "blocks": [
            {
                "mixer": LATENT,
                "ffn": {"type": "moe", "n_experts": 4, "hidden": 32, "gated": True, "activation": "silu"},
            },
            {"mixer": {"n_kv_head": 2, "softcap": 5.0, "rope": False}, "ffn": {"activation": "relu2"}, "short_conv": 3},
        ],
    },
}
TRANSFORMERS_4 = Path(sys.prefix, "transformers-4")
OPEN = Path(__file__).with_name("open_custom.py")


def noisy_model(options) -> GPT:
    """Return a model with noise in every tensor."""
    model = init_weights(GPT(ModelConfig.model_validate(SIZES | options)), 0)
    generator = torch.Generator().manual_seed(1)
    for tensor in [*model.parameters(), *(b for name, b in model.named_buffers() if "bias" in name)]:
        tensor.data += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """Return a folder of exports with Python files, each beside a file of its expected logits."""
    place = tmp_path_factory.mktemp("exports")
    tokens = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(2))
    for name, options in CUSTOM.items():
        model = noisy_model(options)
        assert hf.write_model(place / name, model.state_dict(), model.config, 256) == "training_gpt"
        build_byte_tokenizer().save(place / name, model.config.n_positions)
        with torch.no_grad():
            torch.save({"tokens": tokens, "logits": model.logits(tokens)}, place / f"{name}.pt")
    return place


@pytest.mark.parametrize("major", [5, 4])
def test_a_custom_architecture_opens_generates_and_is_saved_again_without_this_package(exports, tmp_path, major):
    if major == 4 and not TRANSFORMERS_4.is_dir():
        pytest.skip(f"Transformers 4 is not in {TRANSFORMERS_4}: make .venv/installed")
    path = {"PYTHONPATH": str(TRANSFORMERS_4)} if major == 4 else {}
    done = subprocess.run(
        [sys.executable, "-P", str(OPEN), *(str(exports / name) for name in CUSTOM)],
        env=environment() | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"} | path,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[0].startswith(f"{major}.")


@pytest.mark.parametrize("major", [5, 4])
def test_two_folders_of_one_name_are_opened_with_their_own_files(exports, tmp_path, major):
    if major == 4 and not TRANSFORMERS_4.is_dir():
        pytest.skip(f"Transformers 4 is not in {TRANSFORMERS_4}: make .venv/installed")
    code = (
        "import sys\n"
        "from transformers import AutoModelForCausalLM\n"
        "for folder in sys.argv[1:]:\n"
        "    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "    package = type(model).__module__.rpartition('.')[0]\n"
        "    print(sys.modules[f'{package}.model_gpt'].FOLDER)\n"
    )
    for name in ("one", "two"):
        shutil.copytree(exports / "gpt2-moe", tmp_path / name / "model")
        with (tmp_path / name / "model/model_gpt.py").open("a") as file:
            file.write(f"\nFOLDER = {name!r}\n")
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *(str(tmp_path / name / "model") for name in ("one", "two"))],
        env=environment() | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        | ({"PYTHONPATH": str(TRANSFORMERS_4)} if major == 4 else {}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["one", "two"], done.stderr[-3000:]


def test_this_package_opens_its_models_by_registration_without_remote_code(exports):
    code = (
        "import sys, torch, training; training.register()\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(exports / 'hybrid')!r})\n"
        "assert type(model).__module__ == 'training.weights.hf.modeling', type(model)\n"
        f"expected = torch.load({str(exports / 'hybrid.pt')!r})\n"
        "assert (model(expected['tokens']).logits - expected['logits']).abs().max() < 1e-5\n"
    )
    done = command("-c", code)
    assert done.returncode == 0, done.stderr


def test_the_python_files_are_sound_and_need_torch_and_transformers_only(exports):
    files = {path.name: path.read_text() for path in (exports / "gpt2-moe").glob("*.py")}
    assert files == custom.modeling_files()
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", "".join(files.values()), re.MULTILINE))
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}
    checked = command(
        "-m", "ruff", "check", "--isolated", "--select", "F,E9", "--ignore", "F401", str(exports / "gpt2-moe")
    )
    assert checked.returncode == 0, checked.stdout


@pytest.fixture(scope="module")
def modeling(tmp_path_factory):
    """Import the modeling file of an export."""
    folder = tmp_path_factory.mktemp("modeling")
    for name, text in custom.modeling_files().items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder.parent)
        yield importlib.import_module(f"{folder.name}.modeling_training_gpt")


def test_a_fresh_model_of_the_python_files_begins_with_zeros_where_ours_does(modeling):
    config = ModelConfig.model_validate(SIZES | CUSTOM["hybrid"])
    fields = custom.CustomArchitecture().to_hf(config)
    fields = {name: value for name, value in fields.items() if name != "architectures"}
    model = modeling.TrainingGPTForCausalLM(modeling.TrainingGPTConfig(**fields))
    theirs = {name.removeprefix("gpt.") for name, parameter in model.named_parameters() if not parameter.any()}
    ours = init_weights(GPT(config), 0)
    assert theirs == {name for name, parameter in ours.named_parameters() if not parameter.any()}
    assert any("taps" in name for name in theirs) and "bigram.weight" in theirs
    tokens = torch.arange(20).view(2, 10)
    assert torch.equal(model(tokens.int()).logits, model(tokens).logits)


@pytest.mark.parametrize("block", BLOCKS | WINDOWS)
def test_the_python_files_compute_every_kind_of_block(modeling, block):
    ours, x = build(block, "modern"), torch.arange(24).view(2, 12)
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    theirs = modeling.GPT(modeling.model_config(ours.config.model_dump(mode="json")))
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs.logits(x), ours.logits(x))


def test_experts_of_an_export_run_grouped_and_fall_back_where_that_is_not_possible():
    from torch.profiler import profile

    from training.kernels.experts import PORTABLE, sort_by_expert

    rows = sort_by_expert(torch.tensor([[0], [0], [1], [0]]), 2)
    for dtype, width, grouped in ((torch.float32, 32, True), (torch.bfloat16, 32, True), (torch.float32, 30, False)):
        x, up, down = (torch.ones(*shape, dtype=dtype) for shape in ((4, width), (2, 8, width), (2, width, 8)))
        with profile() as seen:
            (h,) = PORTABLE.up(x, (up,), rows)
            y = PORTABLE.down(h, down, torch.ones(4, 1), rows)
        assert any("grouped_mm" in event.key for event in seen.key_averages()) == grouped
        assert y.tolist() == [[8 * width] * width] * 4


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """Return the folder of a run of four steps."""
    from training.config import Config
    from training.train import train

    place = tmp_path_factory.mktemp("trained")
    text = place / "text.txt"
    text.write_text("".join(f"{n} and {n} are {n + n}.\n" for n in range(3000)))
    options = {
        "name": "small",
        "out_dir": str(place),
        "steps": 4,
        "batch_tokens": 256,
        "precision": "fp32",
        "model": {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, **MODERN},
        "data": {
            "sources": [{"paths": [str(text)]}],
            "tokenizer": {"type": "byte"},
            "cache_dir": str(place / "cache"),
        },
        "schedule": {"warmup_steps": 2},
        "logging": {"tensorboard": False},
    }
    options["model"]["blocks"] = [
        {"mixer": {"qk_norm": True, "n_kv_head": 1}, "ffn": GATED_MOE | {"balance": "switch"}}
    ]
    umask = os.umask(0o077)
    try:
        assert train(Config.model_validate(options)) == 0
    finally:
        os.umask(umask)
    return place / "small"


def test_the_command_reports_what_opened_and_does_not_overwrite_it(run_dir, capsys):
    done = command("-m", "training.export", "--run", str(run_dir), "--dtype", "bf16", umask=0o077)
    assert (done.returncode, done.stderr) == (0, "")
    assert {oct(path.stat().st_mode) for path in run_dir.parent.rglob("*")} == {"0o100600", "0o100644", "0o40700"}
    assert [path.name for path in run_dir.parent.rglob("*") if path.stat().st_mode & 0o777 == 0o644] == ["text.txt"]
    lines = done.stdout.splitlines()
    assert lines[0] == f"{run_dir}/export: qwen3_moe, bf16, step 4"
    assert re.fullmatch(r"opened by Transformers .* as Qwen3MoeForCausalLM: logits differ by .*", lines[1])
    assert json.loads((run_dir / "export" / "tokenizer_config.json").read_text())["model_input_names"] == [
        "input_ids",
        "attention_mask",
    ]
    assert lines[2] == f"AutoModelForCausalLM.from_pretrained('{run_dir}/export')"
    assert json.loads((run_dir / "export" / "config.json").read_text())["vocab_size"] == 257  # the tokenizer's own
    before = sorted(path.stat().st_mtime_ns for path in (run_dir / "export").iterdir())
    assert export.main(["--run", str(run_dir)]) == 2
    assert capsys.readouterr().err == f"error: {run_dir}/export: already exists; choose another --out\n"
    assert before == sorted(path.stat().st_mtime_ns for path in (run_dir / "export").iterdir())


def open_here(folder: Path, probe: Path, _modules: Path) -> None:
    """Open an export in this process instead of a new one."""
    open_export.main(str(folder), str(probe))


@pytest.mark.parametrize("harm", ["a weight", "the file"])
def test_an_export_that_is_not_the_trained_model_is_an_error_and_leaves_nothing(run_dir, tmp_path, monkeypatch, harm):
    from safetensors.torch import load_file, save_file

    write_model = hf.write_model

    def harmed(folder, *args, **kwargs):
        kind = write_model(folder, *args, **kwargs)
        file = folder / "model.safetensors"
        if harm == "the file":
            file.write_bytes(file.read_bytes()[:-1000])
        else:
            tensors = load_file(file)
            tensors["model.layers.1.self_attn.k_norm.weight"][0] += 0.5
            save_file(tensors, file, metadata={"format": "pt"})
        return kind

    monkeypatch.setattr(hf, "write_model", harmed)
    if harm == "a weight":  # opened in this process, which is faster
        monkeypatch.setattr(export_check, "_open", open_here)
    messages = {
        "a weight": "the export is not the trained model: ",
        "the file": "Transformers does not open the export: ",
    }
    with pytest.raises(UserError, match=messages[harm]):
        export.export(str(run_dir), str(tmp_path / "out"), "fp32")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Return a function that writes a model with a byte tokenizer and checks the folder, which this process opens."""
    monkeypatch.setattr(export_check, "_open", open_here)

    def written(model: GPT, harm=lambda _folder: None) -> str:
        hf.write_model(tmp_path / "model", model.state_dict(), model.config, 256, n_vocab=model.n_vocab)
        build_byte_tokenizer().save(tmp_path / "model", model.config.n_positions)
        harm(tmp_path / "model")
        return export_check.check_export(tmp_path / "model", model, 257)

    return written


@pytest.mark.parametrize("n_positions", [1, 2])
def test_the_shortest_contexts_are_exported(check, n_positions):
    assert f" {n_positions} greedy tokens are the same" in check(noisy_model({"n_positions": n_positions}))


def test_a_model_that_predicts_only_the_end_of_text_is_exported(check, monkeypatch):
    model, texts, distance = noisy_model({}), [], export_check.distance_to_greedy
    model.norm_f.bias.data += 50 * model.wte.weight[256]

    def recorded(model, prompt_1T, continuation_T):
        texts.append(continuation_T.tolist())
        return distance(model, prompt_1T, continuation_T)

    monkeypatch.setattr(export_check, "distance_to_greedy", recorded)
    assert "16 greedy tokens are the same" in check(model)
    assert texts == [[256] * 16]


def test_equally_likely_tokens_may_both_follow():
    model, prompt = noisy_model({}), torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        likeliest = int(model.logits(prompt)[0, -1].argmax())
        model.wte.weight[7] = model.wte.weight[likeliest]
    assert export_check.distance_to_greedy(model, prompt, torch.tensor([likeliest])) == 0
    assert export_check.distance_to_greedy(model, prompt, torch.tensor([7])) == 0
    assert export_check.distance_to_greedy(model, prompt, torch.tensor([8])) > 1e-2


def test_a_greedy_continuation_that_differs_is_noticed(check, monkeypatch):
    zeros = torch.zeros(1, 64, dtype=torch.int64)
    monkeypatch.setattr(open_export, "greedy", lambda _model, prompt, n_new: zeros[:, : prompt.shape[1] + n_new])
    with pytest.raises(UserError, match="its greedy continuation differs"):
        check(noisy_model({}))


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json"])
def test_a_folder_whose_documented_calls_fail_is_noticed(check, file):
    """Without the files' limits, a pipeline writes past the context and `truncation=True` does nothing."""
    with pytest.raises(AssertionError, match=r"no truncation|no limit"):
        check(noisy_model({}), lambda folder: (folder / file).unlink())


def test_a_wide_window_is_compared_to_its_end(check):
    """A window that is one token too wide changes only the logits beyond its width."""
    mixer = {"qk_norm": True, "window": 150}
    blocks = [{"mixer": mixer, "ffn": {"gated": True, "activation": "silu"}}]
    model = noisy_model({**MODERN, "n_positions": 200, "blocks": blocks})

    def widen(folder):
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"sliding_window": 150', '"sliding_window": 151'))

    with pytest.raises(UserError, match="logits differ by"):
        check(model, widen)


@pytest.mark.parametrize("arguments", [[], ["--run", "x", "--dtype", "int8"], ["--run", "x", "--ou", "y"], ["--run"]])
@pytest.mark.parametrize("command_name", ["export", "evaluate"])
def test_wrong_arguments_are_one_line(command_name, arguments, capsys):
    from importlib import import_module

    assert import_module(f"training.{command_name}").main(arguments) == 2
    assert re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)


def test_a_selection_bias_that_the_architecture_cannot_store_is_the_reason():
    model = noisy_model({**MODERN, "blocks": [{"mixer": {"qk_norm": True}, "ffn": GATED_MOE | {"balance": "none"}}]})
    reason = hf.ARCHITECTURES["qwen3_moe"].reason_unsupported(model.config, model.state_dict())
    assert reason == "values of blocks.0.ffn.selection_bias"


def test_a_run_that_is_not_there_is_one_line(tmp_path, capsys):
    assert export.main(["--run", str(tmp_path / "none")]) == 2
    assert re.fullmatch(r"error: --run .*none: no run with a checkpoint.*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
