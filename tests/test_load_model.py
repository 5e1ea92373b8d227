"""Generation and evaluation with models that are not runs: exports, and GPT-2 as Transformers saves it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_tasks import write_rows

from training.data import Samples
from training.data.dataset import read_split
from training.data.tokenizer import from_files, train_bpe
from training.engine.load_run import load_model
from training.model.generation import encode_prompt

transformers = pytest.importorskip("transformers")
GPT2 = ROOT.parent / "shared/tokenizers/gpt2"
TEXT = "def read(self, path):\n    return path.read_text()\n\n" * 12
PROMPT = "def read("


@pytest.fixture
def gpt2(tmp_path) -> Path:
    """Return the folder of a small GPT-2 with random weights, saved by Transformers with a tokenizer."""
    folder = tmp_path / "gpt2"
    folder.mkdir()
    if GPT2.is_dir():
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(GPT2 / name, folder / name)
    else:
        train_bpe([TEXT], 300).inner.model.save(str(folder))
    n_tokens = from_files(folder).vocab_size
    torch.manual_seed(1)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 24, "n_positions": 64, "vocab_size": n_tokens}
    ids = {"bos_token_id": n_tokens - 1, "eos_token_id": n_tokens - 1}
    config = transformers.GPT2Config(**sizes, **ids, initializer_range=0.3)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def figures(call, folder: Path, *arguments: str) -> dict:
    """Return the JSON that `training.evaluate` prints."""
    done = call("evaluate", "--run", str(folder), *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_equals_transformers(call, folder: Path, text: Path) -> None:
    """Compare the greedy continuation and the loss over a text with those of Transformers."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_model(str(folder), "cpu").tokenizer
    split, n_positions = read_split([str(text)], tokenizer), theirs.config.max_position_embeddings
    samples = Samples(split, n_positions=n_positions, seed=None)
    batch = samples.batch(range(samples.n_samples))
    with torch.no_grad():
        logits = theirs(batch.tokens_BT).logits.flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch.targets_BT.flatten(), ignore_index=-1).item()
    assert figures(call, folder, "--data", str(text))["total"]["loss"] == pytest.approx(expected, abs=1e-5)

    prompt = torch.tensor([encode_prompt(tokenizer, PROMPT)])
    theirs.generation_config.eos_token_id = None
    tokens = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    expected = tokenizer.decode(tokens[0, prompt.shape[1] :].tolist())
    greedy = ("--temperature", "0", "--top_k", "0", "--tokens", "20", "--json")
    done = call("generate", "--run", str(folder), "--prompt", PROMPT, *greedy)
    assert json.loads(done.stdout)["text"] == expected


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_gpt2_is_sampled_and_judged_as_by_transformers(gpt2, call, text):
    check_equals_transformers(call, gpt2, text)
    done = call("evaluate", "--run", str(gpt2), "--data", str(text))
    assert done.stdout.startswith(f"{gpt2}: loss ")


def test_an_export_is_sampled_and_judged_as_its_run_and_as_by_transformers(finished, call, text):
    folder = finished(model={"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32})
    check_equals_transformers(call, folder / "model", text)
    run, export = (figures(call, path, "--data", str(text)) for path in (folder, folder / "model"))
    assert (run.pop("step"), export.pop("step")) == (8, None)
    assert run["total"]["loss"] == pytest.approx(export["total"]["loss"], abs=1e-5)


def test_a_folder_without_a_run_is_scored_on_named_tasks(gpt2, call, tmp_path):
    items = [{"goal": "open it", "sol1": "read", "sol2": "write", "label": n % 2} for n in range(4)]
    path = write_rows(tmp_path / "piqa.jsonl", items)
    assert figures(call, gpt2, "--tasks", f"piqa={path}")["rows"][0]["items"] == 4


def test_what_a_folder_lacks_is_one_line(gpt2, call, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    empty = tmp_path / "empty"
    empty.mkdir()
    without = shutil.copytree(gpt2, tmp_path / "without")
    (without / "merges.txt").unlink()
    small = shutil.copytree(gpt2, tmp_path / "small")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=64, n_layer=1, n_head=1, n_embd=8)).save_pretrained(
        small
    )
    for folder, command, arguments, problem in (
        (gpt2, "evaluate", (), f"--run {gpt2}: a model without a run's text; name text with --data, or items with"),
        (gpt2, "evaluate", ("--tasks",), "--tasks: --run has no eval.tasks of its own; name some"),
        (empty, "generate", ("--prompt", "a"), f"--run {empty}: no run with a checkpoint, and no folder with a config"),
        (without, "generate", ("--prompt", "a"), f"{without}: no tokenizer.json here, and no vocab.json with merges"),
        (small, "generate", ("--prompt", "a"), f"--run {small}: its tokenizer has "),
        ("some/where/else", "generate", ("--prompt", "a"), "--run some/where/else: no such folder"),
        ("no/one", "evaluate", (), "--run no/one: no such folder, and not loaded from the Hugging Face hub: "),
    ):
        done = call(command, "--run", str(folder), *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: {problem}") and done.stderr.count("\n") == 1
