"""The console reports dead experts, and the report shows the tokens that each expert prefers."""

import json
import random
import re
import textwrap
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MOE
from test_logging import on_a_terminal, row, run_in
from test_report import Page

from training.config import EvalConfig, LoggingConfig, ModelConfig
from training.data import tokenizer as tokenizers
from training.data.dataset import read_split
from training.data.loader import Samples
from training.engine import expert_tokens
from training.engine.expert_tokens import sampled_layers, token_texts, top_tokens
from training.logging.console import PATIENCE, DeadExpertWatch, open_sink
from training.model import GPT, init_weights
from training.model.metrics import dead_expert_threshold
from training.model.moe import MoE

EVEN = [1 / 8] * 8
THREE_DEAD = [0.005, 0.0, 0.009, *[0.1972] * 5]

# --- the console -----------------------------------------------------------------------------------


def reports_of(loads: list[list[float]], layer: int = 4) -> list[tuple[int, str]]:
    """Return (step, line) of a run with these loads of its one MoE layer."""
    watch = DeadExpertWatch(layer)
    return [(step, line) for step, load in enumerate(loads, start=1) if (line := watch.update(load))]


def test_dead_experts_are_reported_again_after_twice_as_many_steps():
    assert reports_of([EVEN] * 50 + [THREE_DEAD] * 1000) == [
        (250, "layer 5: 3 of 8 experts received < 1 % of tokens for 200 steps"),
        (450, "layer 5: 3 of 8 experts received < 1 % of tokens for 400 steps"),
        (850, "layer 5: 3 of 8 experts received < 1 % of tokens for 800 steps"),
    ]


def test_one_step_with_tokens_restarts_the_count():
    assert reports_of([THREE_DEAD] * 199 + [EVEN] + [THREE_DEAD] * 199) == []


def test_another_dead_expert_is_reported():
    four = [0.0] * 4 + [0.25] * 4
    assert reports_of([THREE_DEAD] * 150 + [four] * 300)[:2] == [
        (200, "layer 5: 3 of 8 experts received < 1 % of tokens for 200 steps"),
        (400, "layer 5: 4 of 8 experts received < 1 % of tokens for 250 steps"),
    ]


def test_with_many_experts_the_threshold_is_a_tenth_of_an_even_share():
    load = [0.0015, *[0.9985 / 63] * 63]
    assert reports_of([load] * 200) == [(200, "layer 5: 1 of 64 experts received < 0.16 % of tokens for 200 steps")]
    assert reports_of([[0.002, *[0.998 / 63] * 63]] * 200) == []


@pytest.mark.parametrize("seed", range(3))
def test_every_report_is_true_and_reports_are_rare(seed):
    draw, loads, dead_E = random.Random(seed), [], [False] * 8
    for _ in range(3000):
        dead_E = [not dead if draw.random() < 1 / 400 else dead for dead in dead_E]
        loads.append([0.0 if dead else 0.125 for dead in dead_E])
    lines = reports_of(loads)
    assert lines
    for step, line in lines:
        n, steps = map(int, re.fullmatch(r"layer 5: (\d) of 8 .* for (\d+) steps", line).groups())
        assert steps >= PATIENCE
        before = np.array(loads[:step])
        assert (before[-steps:] < dead_expert_threshold(8)).all(axis=0).sum() == n  # no other expert was dead as long
        assert (before[-PATIENCE:] < dead_expert_threshold(8)).all(axis=0).sum() == n
    assert all(later - earlier >= PATIENCE for (earlier, _), (later, _) in pairwise(lines))


def test_the_plain_console_reports_dead_experts_once_with_the_place_of_their_layer(tmp_path, capsys):
    sink = open_sink(run_in(tmp_path, steps=250), LoggingConfig(every=100))
    for first in range(1, 250, 10):
        sink.write([row(step, expert_load=[EVEN, THREE_DEAD]) for step in range(first, first + 10)])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line for line in lines if "experts" in line] == [
        "step 200/250  layer 4: 3 of 8 experts received < 1 % of tokens for 200 steps"
    ]
    assert len(lines) == 4


def test_the_live_console_reports_dead_experts_once_above_the_bar(processes, tmp_path):
    script = f"""
        from test_logging import *
        sink = open_sink(run_in(Path({str(tmp_path)!r}), steps=250), LoggingConfig(every=100))
        sink.write([row(step, expert_load={[EVEN, THREE_DEAD]!r}) for step in range(1, 250)])
        sink.close(None)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    shown = on_a_terminal(processes, tmp_path / "script.py", 120, color=True)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert shown.count("step 200  layer 4: 3 of 8 experts received < 1 % of tokens for 200 steps") == 1


# --- tokens that each expert prefers ----------------------------------------------------------------


def validation(folder: Path, isolate_documents: bool = False) -> Samples:
    """Return samples of documents shorter and longer than a window; the last window is partly empty."""
    for i in range(40):
        (folder / f"{i}.txt").write_text("the cat and the dog; naïve 日本\n\tthe end\n"[i % 7 : 19 + i])
    tokenizer = tokenizers.build_byte_tokenizer()
    split = read_split([str(folder / "*.txt")], tokenizer)
    return Samples(split, n_positions=32, seed=None, end_of_text=tokenizer.end_of_text if isolate_documents else None)


def router_model(isolate_documents: bool = False) -> GPT:
    """Return a model of three layers; the second and the third have experts with unequal loads."""
    config = ModelConfig.model_validate(
        {
            "n_layer": 3, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 320,
            "isolate_documents": isolate_documents,
            "blocks": [{}, {"ffn": MOE}, {"ffn": MOE | {"n_experts": 6, "top_k": 1}}],
        }
    )  # fmt: skip
    model = init_weights(GPT(config), 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    return model


def count_assignments(model: GPT, samples: Samples) -> dict[int, Counter]:
    """Return how often each (token, expert) occurs by layer, counted with hooks, a window at a time."""
    counts: dict[int, Counter] = {}

    def hook(layer: int):
        def count(_module, _inputs, output):
            for token, target, experts in zip(*(x_BT[0] for x_BT in batch[:2]), output[1].topk_ids_NK, strict=True):
                if target >= 0:
                    counts.setdefault(layer, Counter()).update((int(token), int(expert)) for expert in experts)

        return count

    for layer, block in enumerate(model.blocks):
        if isinstance(block.ffn, MoE):
            block.ffn.register_forward_hook(hook(layer))
    for window in range(samples.n_samples):
        batch = samples.batch([window])._replace(n_targets=1).to(torch.device("cpu"))
        model(batch)
    return counts


def preferred_by(expert: int, counts: Counter, top_k: int, n_ids: int) -> list[tuple[int, float, int]]:
    """Return (token, lift, times sent here) by definition; lift: share of the token's assignments over that of all."""
    of_token, of_expert = Counter(), Counter()
    for (token, to), n in counts.items():
        of_token[token] += n
        of_expert[to] += n
    total = sum(of_token.values())
    frequent = sorted(of_token, key=lambda token: (-of_token[token], token))[:n_ids]
    lifts = [
        (token, counts[token, expert] / of_token[token] / (of_expert[expert] / total), counts[token, expert])
        for token in frequent
        if of_token[token] >= 5 * top_k and of_expert[expert]
    ]
    return sorted((entry for entry in lifts if entry[1] > 1), key=lambda entry: (-entry[1], -entry[2], entry[0]))[:8]


@pytest.mark.parametrize(("isolate", "n_ids"), [(False, 4096), (False, 9), (True, 4096)])
def test_the_preferred_tokens_are_those_of_a_plain_loop_over_the_text(tmp_path, monkeypatch, isolate, n_ids):
    monkeypatch.setattr(expert_tokens, "MAX_IDS", n_ids)
    model, samples, tokenizer = router_model(isolate), validation(tmp_path, isolate), tokenizers.build_byte_tokenizer()
    options = {"micro_batch": 3, "step": 7}
    content = expert_tokens.measure_expert_tokens(model, samples, tokenizer, EvalConfig(tokens=None), **options)
    assert (content["step"], content["n_tokens"], content["seen_at_least"]) == (7, samples.split.n_tokens - 1, 5)
    assert [(layer["layer"], layer["n_experts"]) for layer in content["layers"]] == [(1, 4), (2, 6)]
    counts = count_assignments(model, samples)
    for layer in content["layers"]:
        for expert, ours in enumerate(layer["liked"]):
            theirs = preferred_by(expert, counts[layer["layer"]], {1: 2, 2: 1}[layer["layer"]], n_ids)
            assert [token["sent"] for token in ours] == [sent for _, _, sent in theirs]
            assert [token["lift"] for token in ours] == pytest.approx([lift for _, lift, _ in theirs], abs=1e-3)
            assert [token["text"] for token in ours] == token_texts(tokenizer, np.array([t for t, _, _ in theirs], int))
    assert sum(bool(tokens) for layer in content["layers"] for tokens in layer["liked"]) >= 6


def test_preferred_tokens_are_not_just_frequent_ones():
    counts_SE = np.array([[1000, 1000], [90, 10], [0, 20], [500, 580]])  # the last row counts all other tokens
    assert [[slot for slot, _, _ in of_expert] for of_expert in top_tokens(counts_SE)] == [[1, 0], [2]]
    (_, lift, sent), _ = top_tokens(counts_SE)[0]
    assert (lift, sent) == (pytest.approx(0.9 / (1590 / 3200)), 90)


def test_an_expert_without_tokens_has_no_preferred_tokens():
    assert top_tokens(np.array([[5, 0], [5, 0]])) == [[], []]


def test_a_token_is_shown_as_text_or_as_its_bytes():
    tokenizer = tokenizers.build_byte_tokenizer()
    ids = np.array([ord("a"), ord("\n"), 0xE2, tokenizer.end_of_text])
    assert token_texts(tokenizer, ids) == ["a", "\n", "\\xe2", "<|endoftext|>"]
    bpe = tokenizers.train_bpe(["naïve naïve café"] * 9, 300)
    ids = bpe.encode("naïve café")
    assert "".join(token_texts(bpe, ids)) == "naïve café"


def test_the_table_of_a_large_model_is_bounded():
    config = ModelConfig.model_validate({"n_layer": 48, "blocks": [{}, {"ffn": MOE | {"n_experts": 256}}]})
    layers = sampled_layers(config)
    assert len(layers) == 12 and set(layers.values()) == {256}
    assert min(layers) == 1 and max(layers) == 47 and all(layer % 2 for layer in layers)
    assert len(top_tokens(np.random.default_rng(0).integers(1, 9, (10, 256)))) == 64


def test_measuring_changes_neither_the_model_nor_the_random_state(tmp_path):
    model = router_model()
    state, weights = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    expert_tokens.measure_expert_tokens(
        model, validation(tmp_path), tokenizers.build_byte_tokenizer(), EvalConfig(), micro_batch=4, step=1
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


# --- whole runs ------------------------------------------------------------------------------------


def model_of(*blocks: dict) -> dict:
    return {"n_layer": len(blocks), "n_head": 2, "n_embd": 16, "n_positions": 32, "blocks": list(blocks)}


def test_the_report_and_the_summary_of_a_run_have_its_experts(run, capsys):
    folder = run(model=model_of({}, {"ffn": MOE | {"capacity_factor": 0.5}}))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    assert {key: summary[key] for key in ("expert_load_max", "expert_entropy", "dead_experts")} == {
        key: rows[-1][key] for key in ("expert_load_max", "expert_entropy", "dead_experts")
    }
    assert json.loads((folder / "run.json").read_text())["moe_layers"] == [1]
    page = Page(folder / "report.html")
    assert page.of("th") == ["1", "2", "3", "4", "layer 2"] and page.of("summary") == ["layer 2"]
    assert any("after step 8 over 512 tokens" in text for text in page.of("p"))
    assert page.of("code")
    assert "Dropped" in page.of("b")
    promise = "0.5: drops tokens, so the result depends on micro-batch and ranks"
    assert promise in page.of("dd")
    assert re.search(rf"^capacity +{promise}$", capsys.readouterr().out, re.MULTILINE)


def test_a_dense_run_has_no_output_about_experts(run, capsys):
    folder = run(model=model_of({}))
    assert not (folder / "experts.json").exists()
    assert not any("expert" in key for key in json.loads((folder / "summary.json").read_text()))
    page = Page(folder / "report.html")
    assert page.of("summary") == page.of("code") == page.of("th") == []
    assert not re.search("^capacity", capsys.readouterr().out, re.MULTILINE)


def test_a_run_without_capacity_has_no_output_about_drops(run, capsys):
    page = Page(run() / "report.html")
    assert "Dropped" not in page.of("b")
    assert not re.search("^capacity", capsys.readouterr().out, re.MULTILINE)
