"""Generation: sampling matches Transformers, batched texts equal single ones, shown text never changes."""

import json
import math
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command, rows
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_model import BLOCKS, STYLES, WINDOWS, build

from training.batch import Batch
from training.config import EvalConfig
from training.data.tokenizer import build_byte_tokenizer, train_bpe
from training.engine.evaluate import sample_texts
from training.generate import main
from training.model.generation import (
    Continuation,
    SamplingParams,
    continue_texts,
    encode_prompt,
    penalize_repetition,
    sample,
    sample_token,
    token_probabilities,
)

KINDS = BLOCKS | WINDOWS
PROMPTS = [[7, 3, 9, 1, 22, 40, 8], [5], [11, 2, 60], [4, 4, 4, 31, 17, 6, 2, 50, 9, 33, 1, 12]]
GREEDY = SamplingParams(temperature=0, repetition_penalty=1.5)  # without the penalty it soon repeats itself
EVERYTHING = SamplingParams(temperature=1.3, top_k=40, top_p=0.97, min_p=0.01, repetition_penalty=1.2)


def lively(block="mlp", style="gpt2", **changes):
    """Return a model with random weights everywhere: one that repeats its last token would hide mistakes."""
    model = build(block, style, **changes)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.requires_grad_(False)


def slow(model, prompt, n_tokens, *, n_vocab, seed, params):
    """Continue one text alone, without a cache."""
    numbers, limit = np.random.default_rng(seed), model.config.n_positions
    text, context = list(prompt), list(prompt)[-model.config.n_positions :]
    for _ in range(n_tokens):
        if len(context) > limit:
            context = context[-max(1, limit // 2) :]
        logits = model.logits(torch.tensor([context]))[0, -1, :n_vocab].tolist()
        token = slow_sample_token(logits, text, numbers.random(), params)
        text.append(token)
        context.append(token)
    return text[len(prompt) :]


def slow_sample_token(logits, text, uniform, params):
    """Draw one token by the definitions: each option removes tokens from a dict of allowed ones."""
    for token in set(text):
        logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
    if params.temperature == 0:
        return logits.index(max(logits))
    weight = {token: math.exp((logit - max(logits)) / params.temperature) for token, logit in enumerate(logits)}

    def share():
        return {token: w / sum(weight.values()) for token, w in weight.items()}

    if params.top_k is not None:
        least = sorted(weight.values(), reverse=True)[: params.top_k][-1]
        weight = {token: w for token, w in weight.items() if w >= least}
    kept, mass = set(), 0.0
    for token, p in sorted(share().items(), key=lambda item: -item[1]):
        if mass < params.top_p:
            kept.add(token)
        mass += p
    weight = {token: weight[token] for token in sorted(kept)}
    likeliest = max(share().values())
    weight = {token: weight[token] for token, p in share().items() if p >= params.min_p * likeliest}
    end = 0.0
    for token, p in share().items():
        end += p
        if uniform < end:
            return token
    raise AssertionError


def together(model, prompts, lengths, *, n_vocab, seeds, params):
    """Return every prompt's new tokens from one batch; each text ends at its own length."""
    new = [[] for _ in prompts]

    def on_token(i, token):
        new[i].append(token)
        return len(new[i]) < lengths[i]

    sample(model, prompts, max(lengths), on_token, n_vocab=n_vocab, seeds=seeds, params=params)
    return new


# --- a batch, a cache ------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, EVERYTHING], ids=["greedy", "drawn"])
@pytest.mark.parametrize(("block", "style"), list(product(KINDS, STYLES)))
def test_texts_in_a_batch_with_a_cache_equal_single_texts_without(block, style, params):
    """Prompts have different lengths and end at different times, some beyond the context."""
    model, lengths, seeds = lively(block, style), [15, 4, 17, 9], [3, (0, 1), 3, 5]
    texts = together(model, PROMPTS, lengths, n_vocab=61, seeds=seeds, params=params)
    for new, prompt, length, seed in zip(texts, PROMPTS, lengths, seeds, strict=True):
        assert new == slow(model, prompt, length, n_vocab=61, seed=seed, params=params)
    assert len({token for new in texts for token in new}) > 5


@pytest.mark.parametrize("n_positions", [1, 2, 3, 5])
def test_the_smallest_contexts_drop_their_older_half(n_positions):
    model = lively("grouped-query", "modern", n_positions=n_positions)
    texts = together(model, PROMPTS, [9] * 4, n_vocab=64, seeds=range(4), params=SamplingParams())
    for seed, (new, prompt) in enumerate(zip(texts, PROMPTS, strict=True)):
        assert new == slow(model, prompt, 9, n_vocab=64, seed=seed, params=SamplingParams())


def test_texts_of_one_prompt_differ_only_by_their_seeds():
    model, prompt = lively("moe"), PROMPTS[0]
    new = together(
        model, [prompt] * 3, [30] * 3, n_vocab=50, seeds=[(0, 0), (0, 1), (0, 0)], params=SamplingParams(1.5)
    )
    assert new[0] == new[2] != new[1]
    assert {len(tokens) for tokens in new} == {30}
    assert max(max(tokens) for tokens in new) < 50


@pytest.mark.parametrize(
    ("block", "style"), [("mlp", "modern"), ("latent", "modern"), ("window", "modern"), ("short convolution", "capped")]
)
def test_a_replaced_row_of_the_cache_equals_a_new_sample(block, style):
    model = lively(block, style)
    x = torch.randint(0, 64, (3, 14), generator=torch.Generator().manual_seed(0))
    cache, read = model.new_cache(torch.tensor([2, 4, 0])), model.new_cache()
    model.logits(x[:, :10], cache)
    model.logits(x[[0, 2], 7:10], read)
    cache.replace_rows(torch.tensor([0, 2]), read)
    cache.trim()
    assert cache.n_tokens == 6 and cache.n_padding_B.tolist() == [3, 0, 3]
    logits = model.logits(x[:, 10:], cache)
    for row, start in enumerate([7, 4, 7]):
        alone = model.logits(x[row : row + 1, start:])[0, -4:]
        torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-5)


# --- sampling one token -----------------------------------------------------------------------------


def logits_and_texts(n_rows=6, n_vocab=300, seed=0):
    """Return logits with ties, as in bf16, and the tokens of a text for each row."""
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(n_rows, n_vocab, generator=generator)
    logits[::2] = logits[::2].bfloat16().float()
    return logits, torch.randint(0, n_vocab, (n_rows, 40), generator=generator)


def processors(params):
    """Return Transformers' logits processors, as its `generate` builds them from these settings."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_head=1, n_embd=2, vocab_size=4))
    settings = params._asdict() | {"top_k": params.top_k or 0, "do_sample": True}
    config = transformers.GenerationConfig(**settings)
    return model._get_logits_processor(config, input_ids_seq_length=1)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(0.7),
        SamplingParams(1.0, top_k=1),
        SamplingParams(1.0, top_k=17),
        SamplingParams(1.0, top_k=1000),
        SamplingParams(1.0, top_p=0.9),
        SamplingParams(1.0, top_p=1e-9),
        SamplingParams(1.0, min_p=0.05),
        SamplingParams(1.0, min_p=1.0),
        SamplingParams(1.0, repetition_penalty=1.7),
        SamplingParams(1.0, repetition_penalty=0.6),
        SamplingParams(0.6, 30, 0.8, 0.02, 1.3),
        SamplingParams(2.5, 100, 0.6, 0.1, 0.8),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(3))
def test_probabilities_match_transformers_processors(params, seed):
    logits, texts = logits_and_texts(seed=seed)
    theirs = processors(params)(texts, logits.clone()).softmax(-1)
    seen = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, texts, True)
    ours = token_probabilities(penalize_repetition(logits, seen, params.repetition_penalty), params)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("params", [SamplingParams(1.0), EVERYTHING._replace(repetition_penalty=1.0)], ids=str)
def test_tokens_are_drawn_with_their_probabilities(params):
    logits, _ = logits_and_texts(n_rows=1, n_vocab=50)
    n = 20_000
    even = (torch.arange(n, dtype=torch.float64) + 0.5)[:, None] / n
    drawn = sample_token(logits.expand(n, -1), None, even, params)
    frequency = drawn.flatten().bincount(minlength=50) / n
    torch.testing.assert_close(frequency, token_probabilities(logits, params)[0], rtol=0, atol=2 / n)


def test_the_first_and_the_last_random_number_draw_an_allowed_token():
    logits, _ = logits_and_texts(n_vocab=50)
    for uniform in (0.0, 1 - 2**-53):
        drawn = sample_token(
            logits, None, torch.full((6, 1), uniform, dtype=torch.float64), SamplingParams(1.0, top_k=3)
        )
        assert (token_probabilities(logits, SamplingParams(1.0, top_k=3)).gather(1, drawn) > 0).all()


@pytest.mark.parametrize("temperature", [0, 1e-40])
def test_the_lowest_temperatures_draw_the_most_likely_token(temperature):
    logits, _ = logits_and_texts()
    logits[:, 123] = 30
    for uniform in (0.0, 0.999):
        drawn = sample_token(
            logits, None, torch.full((6, 1), uniform, dtype=torch.float64), SamplingParams(temperature)
        )
        assert drawn.flatten().tolist() == [123] * 6


@pytest.mark.parametrize("penalty", [1.0, 1.2])
def test_greedy_texts_match_transformers_generate(tmp_path, penalty):
    transformers = pytest.importorskip("transformers")
    from training.weights import hf

    model = lively(n_positions=48)
    hf.write_model(tmp_path, model.state_dict(), model.config, 63)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    theirs.generation_config.eos_token_id = None
    prompt = torch.tensor([[63, 5, 9, 63]])
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, repetition_penalty=penalty
    )
    params = SamplingParams(temperature=0, repetition_penalty=penalty)
    (ours,) = together(model, prompt.tolist(), [40], n_vocab=64, seeds=[0], params=params)
    assert ours == expected[0, 4:].tolist()


# --- text ------------------------------------------------------------------------------------------

BYTES = build_byte_tokenizer()
BPE = train_bpe(["the then a naïve naïve café 日本語 日本 🙂🙂 \n\n", "ab abc abcd bc" * 3], 300)


def grow(tokenizer, ids, stops=()):
    """Add tokens to a continuation until it ends; return it and the texts that `on_text` received."""
    shown = []
    text = Continuation(tokenizer, stops, shown.append)
    for token in ids:
        if not text.add(token):
            break
        assert "".join(shown) == text.text
    text.finish()
    return text, shown


def cut(text, stops):
    """Return the text before the stop string that is complete first, found letter by letter."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], "stop"
    return text, "length"


@given(ids=st.lists(st.integers(0, 255) | st.sampled_from(list("aé日🙂\ufffd".encode())), max_size=40))
def test_bytes_are_shown_as_their_text(ids):
    text, shown = grow(BYTES, ids)
    assert text.text == "".join(shown) == bytes(ids).decode("utf-8", "replace") == BYTES.decode(ids)


@settings(max_examples=300)
@given(
    text=st.text("abcd\né日🙂", max_size=30),
    others=st.lists(st.text("abcd\né日🙂", min_size=1, max_size=4), max_size=2),
    places=st.lists(st.tuples(st.integers(0, 29), st.integers(1, 5)), max_size=3),
    tokenizer=st.sampled_from([BYTES, BPE]),
)
@example(text="xabcd", others=["bc", "abc"], places=[], tokenizer=BYTES)
@example(text="x abcd", others=["abcd", "c"], places=[], tokenizer=BPE)  # one token contains both
def test_a_text_ends_before_the_stop_string_that_is_complete_first(text, others, places, tokenizer):
    stops = [*others, *filter(None, (text[start : start + length] for start, length in places))]
    continuation, shown = grow(tokenizer, tokenizer.encode(text).tolist(), stops)
    assert (continuation.text, continuation.finish_reason) == cut(text, stops)
    assert "".join(shown) == continuation.text


def test_only_a_possible_beginning_of_a_stop_string_is_held_back():
    text = Continuation(BYTES, ["END", "\n\n"])
    settled = []
    for token in BYTES.encode("xE\nENé\n\nno"):
        if not text.add(int(token)):
            break
        settled.append(text.text)
    assert settled == ["x", "x", "xE", "xE\n", "xE\n", "xE\n", "xE\nENé", "xE\nENé"]
    assert (text.text, text.finish_reason) == ("xE\nENé", "stop")


def test_the_end_of_the_document_finishes_a_text_and_releases_held_back_characters():
    text = Continuation(BYTES, ["END"])
    assert [text.add(token) for token in (ord("E"), ord("N"), 0xE2, BYTES.end_of_text)] == [True, True, True, False]
    assert (text.text, text.finish_reason) == ("EN\ufffd", "end")


def test_texts_of_a_batch_finish_for_their_own_reasons():
    model = lively(vocab_size=257, n_positions=64)
    prompts = [encode_prompt(BYTES, text) for text in ("a", "some longer prompt", "def")]
    params = SamplingParams(2.0)
    whole = continue_texts(model, BYTES, prompts, 60, seeds=[1, 2, 3], params=params)
    stop = whole[1].text[5:7]
    stopped = continue_texts(model, BYTES, prompts, 60, seeds=[1, 2, 3], params=params, stops=[stop])
    for text, with_stop in zip(whole, stopped, strict=True):
        expected, finish = cut(text.text, [stop])
        assert with_stop.text == expected
        assert with_stop.finish_reason == (text.finish_reason if finish == "length" else "stop")
    assert stopped[1].finish_reason == "stop" and "length" in {text.finish_reason for text in stopped}


def test_samples_of_an_evaluation_do_not_depend_on_the_other_prompts():
    model = lively("moe", vocab_size=257)

    def drawn(*prompts, seed=(0, 4)):
        evaluation = EvalConfig(prompts=prompts, sample_tokens=20, temperature=2.0, top_k=None)
        one_rank = {"mesh": SimpleNamespace(has_collectives=False), "world": SimpleNamespace(is_main=True)}
        sharded = SimpleNamespace(model=model, reshard=lambda: None, **one_rank)
        data, state = SimpleNamespace(has_messages=False), SimpleNamespace(step=seed[1])
        config = SimpleNamespace(eval=evaluation, seed=seed[0], data=data)
        return sample_texts(SimpleNamespace(config=config, model=sharded, state=state), BYTES)["samples"]

    both = drawn("def ", "a")
    assert [sample["prompt"] for sample in both] == ["def ", "a"]
    assert both == [*drawn("def "), *drawn("a")] != drawn("def ", "a", seed=(0, 8))


def test_samples_of_two_evaluations_differ(run):
    dense = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32}
    evaluation = {"every": 4, "tokens": 64, "prompts": ["def "], "sample_tokens": 8}
    folder = run(model=dense, optim={"learning_rate": 1e-30}, eval=evaluation)
    first, second = (row["samples"] for row in rows(folder) if "samples" in row)
    assert first != second  # though the weights are the same


# --- cast_for_inference -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("block", "style"), list(product(KINDS, STYLES)))
def test_weights_cast_once_give_bit_identical_outputs(block, style, dtype):
    model, x = lively(block, style), torch.tensor(PROMPTS[3:])
    model.dtype = dtype
    before = model.logits(x), model(Batch(x, x, n_targets=12))[1]["loss_sum"]
    names = list(model.state_dict())
    model.cast_for_inference()
    assert torch.equal(model.logits(x), before[0])
    assert torch.equal(model(Batch(x, x, n_targets=12))[1]["loss_sum"], before[1])
    assert list(model.state_dict()) == names
    kept = {name for name, parameter in model.named_parameters() if parameter.dtype == torch.float32}
    routers = {name for name in names if ".router." in name}
    assert dtype == torch.float32 or kept == {"wte.weight", "wpe.weight", "bigram.weight"} & set(names) | routers
    assert not any(parameter.requires_grad for parameter in model.parameters())


# --- the command -----------------------------------------------------------------------------------


def generate(capsys, *argv):
    """Return (exit status, standard output, standard error) of the command."""
    capsys.readouterr()
    status = main(list(argv))
    return status, *capsys.readouterr()


def test_the_command_writes_texts_readably_and_as_json(run, capsys, tmp_path):
    folder, prompts = str(run()), tmp_path / "prompts.jsonl"
    arguments = ("--run", folder, "--samples", "2", "--tokens", "12", "--temperature", "2", "--top_k", "0")
    prompts.write_text(json.dumps({"prompt": "a\nb"}) + "\n" + json.dumps({"prompt": "é"}) + "\n")
    status, out, _ = generate(capsys, *arguments, "--prompts", str(prompts), "--json", "--stop", "e", "--stop", " ")
    texts = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [text["prompt"] for text in texts] == ["a\nb", "a\nb", "é", "é"]
    assert {text["finish"] for text in texts} <= {"stop", "length", "end"}
    assert not any({"e", " "} & set(text["text"]) for text in texts)

    _, out, _ = generate(capsys, *arguments, "--prompt", "a\nb", "--prompt", "é")
    _, one_by_one, _ = generate(capsys, *arguments, "--prompt", "a\nb", "--prompt", "é", "--micro_batch", "1")
    assert out == one_by_one
    assert out.startswith("--- prompt 1 of 2, sample 1 of 2 ---\na\nb")
    headings = [f"--- prompt {p} of 2, sample {s} of 2 ---\n{t}" for p, t in ((1, "a\nb"), (2, "é")) for s in (1, 2)]
    assert [out.count(heading) for heading in headings] == [1] * 4

    _, alone, _ = generate(capsys, *arguments, "--samples", "1", "--prompt", "é")
    assert alone.startswith("é") and f"--- prompt 2 of 2, sample 1 of 2 ---\n{alone}" in out


def test_each_line_of_a_file_is_an_unchanged_prompt(run, capsys, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes(b"def f\r\n\n  import \xe2\x80\xa8 x\n")
    _, out, _ = generate(capsys, "--run", str(run()), "--prompts", str(prompts), "--tokens", "1", "--json")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["def f", "", "  import \u2028 x"]


def test_every_mistake_is_one_line_and_exit_status_2(run, capsys, tmp_path):
    folder, bad = str(run()), tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    for argv, message in {
        (): "give either --prompt or --prompts",
        ("--prompt", "a", "--prompts", str(bad)): "give either --prompt or --prompts",
        ("--prompts", str(tmp_path / "none.txt")): f"--prompts {tmp_path}/none.txt: cannot be read: No such file",
        ("--prompts", str(tmp_path / "empty.txt")): "empty.txt: empty",
        ("--prompts", str(tmp_path / "latin.txt")): "latin.txt: cannot be read: 'utf-8' codec",
        ("--prompts", str(bad)): "bad.jsonl:2: not a JSON object such as",
        ("--prompt", "a", "--top_p", "0"): "--top_p: 0.0 is not above 0 and at most 1",
        ("--prompt", "a", "--top_p", "1.01"): "--top_p: 1.01 is not",
        ("--prompt", "a", "--min_p", "-0.1"): "--min_p: -0.1 is not from 0 to 1",
        ("--prompt", "a", "--repetition_penalty", "0"): "--repetition_penalty: 0.0 is not",
        ("--prompt", "a", "--temperature", "nan"): "--temperature: nan is not",
        ("--prompt", "a", "--top_k", "-1"): "--top_k: -1 is not 0 or more",
        ("--prompt", "a", "--tokens", "many"): "--tokens: invalid int value: 'many'",
        ("--prompt", "a", "--samples", "0"): "--samples: 0 is not 1 or more",
        ("--prompt", "a", "--stop", ""): "--stop: '' matches everywhere",
        ("--prompt", "a", "--sample", "2"): "unrecognized arguments: --sample 2",
        ("--prompt", "a", "--prompt", "b" * 32): "--prompt: prompt 2 is 33 tokens with the start-of-document token",
    }.items():
        status, out, error = generate(capsys, "--run", folder, *argv)
        assert (status, out, error.count("\n")) == (2, "", 1), error
        assert error.startswith("error: ") and message in error
    assert generate(capsys, "--run", folder, "--prompt", "b" * 31, "--tokens", "40")[0] == 0


def test_help_and_wrong_numbers_need_no_torch():
    for argv in ("['--help']", "['--run', 'x', '--prompt', 'a', '--top_p', '2']"):
        code = (
            "import sys; from training.generate import main\n"
            f"try:\n    main({argv})\nexcept SystemExit:\n    pass\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
        )
        done = command("-c", code)
        assert done.returncode == 0, done.stderr
