"""Tasks: items from files, their scores against a plain forward and lm-eval, and in runs."""

import json
import random
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pyarrow
import pytest
import torch
from conftest import ROOT, environment, rows, tensors, write_config
from datasets import Dataset, DatasetDict
from pyarrow import parquet
from test_generate import KINDS, lively
from test_model import STYLES

from training.config import SHIPPED_TASKS, Config, EvalConfig, TaskConfig
from training.data.items import Item, number_of, read_items
from training.data.tokenizer import build_byte_tokenizer, train_bpe
from training.distributed.world import World
from training.engine import tasks as scoring
from training.engine.tasks import Answer, Score, encode_answers, load_tasks, log_likelihoods, score_of, task_row
from training.errors import UserError
from training.train import train

LM_EVAL = Path(sys.prefix, "lm-eval")  # the Makefile installs lm-eval there
ALONE = World(0, 1, torch.device("cpu"))
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "dogs",
    "ran",
    "over",
    "green",
    "hills",
    "and",
    "birds",
    "sang",
]
N_ITEMS = 200


def text(draw: random.Random, low: int, high: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(low, high)))


def make_rows(kind: str, n: int = N_ITEMS) -> list[dict]:
    """Return rows in the format of a data set; some are longer than a small model's context."""
    draw, made = random.Random(kind), []
    for i in range(n):
        if kind == "hellaswag":
            row = {"activity_label": text(draw, 1, 2).title(), "ctx_a": f"{text(draw, 3, 40)} [title] x  [step] y."}
            row |= {"ctx_b": text(draw, 1, 3), "endings": [text(draw, 2, 9) + "." for _ in range(4)]}
            made.append(row | {"label": str(draw.randrange(4))})
        elif kind == "arc":
            labels = draw.choice(["ABCDE", "12345"])[: draw.choice([3, 4, 5])]
            choices = {"text": [text(draw, 1, 4) for _ in labels], "label": list(labels)}
            made.append({"question": text(draw, 4, 15) + "?", "choices": choices, "answerKey": draw.choice(labels)})
        elif kind == "piqa":
            solutions = {"sol1": text(draw, 4, 9), "sol2": text(draw, 4, 9)}
            made.append({"goal": text(draw, 2, 8), **solutions, "label": i % 2})
        else:
            made.append({"text": text(draw, 10, 60)})
    return made


def write_rows(path: Path, made: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """A file of items in each format."""
    return {kind: write_rows(tmp_path / f"{kind}.jsonl", make_rows(kind)) for kind in SHIPPED_TASKS}


def task_of(**options) -> TaskConfig:
    return EvalConfig.model_validate({"tasks": [options]}).tasks[0]


# --- items -------------------------------------------------------------------------------------------


def test_items_have_the_texts_of_lm_eval(tmp_path):
    """The examples follow lm-eval's own task files, version 0.4.13."""
    rows_of = {
        "hellaswag": {
            "activity_label": "Roof", "ctx_a": "A man [title] sits [x] on", "ctx_b": "he  Starts",
            "endings": [" is [a] b. ", "c"], "label": "1",
        },
        "arc": {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        "piqa": {"goal": "Boil", "sol1": "a", "sol2": "b", "label": 0},
        "cloze": {"text": "one two  three"},
    }  # fmt: skip
    items = {
        kind: read_items(task_of(type=kind, paths=[str(write_rows(tmp_path / f"{kind}.jsonl", [row]))]))[0][:3]
        for kind, row in rows_of.items()
    }
    assert items == {
        "hellaswag": ("Roof: A man. sits on He starts", ("is b.", "c"), 1),
        "arc": ("Question: Why?\nAnswer:", ("a", "b"), 1),
        "piqa": ("Question: Boil\nAnswer:", ("a", "b"), 0),
        "cloze": ("one two ", ("three",), 0),
    }


def test_every_kind_of_file_and_data_set_has_the_same_items(tmp_path):
    made = make_rows("arc", 6)
    of_authors = [
        {"question": {"stem": row["question"], "choices": [
            {"text": text, "label": label} for text, label in zip(*row["choices"].values(), strict=True)]},
         "answerKey": row["answerKey"]}
        for row in made
    ]  # fmt: skip
    write_rows(tmp_path / "rows.jsonl", made)
    write_rows(tmp_path / "authors.ndjson", of_authors)
    (tmp_path / "array.json").write_text(json.dumps(made))
    parquet.write_table(pyarrow.Table.from_pylist(made), tmp_path / "rows.parquet")
    DatasetDict({"validation": Dataset.from_list(made)}).save_to_disk(str(tmp_path / "saved"))
    names = ("rows.jsonl", "authors.ndjson", "array.json", "rows.parquet")
    tasks = [task_of(type="arc", paths=[str(tmp_path / name)]) for name in names]
    tasks.append(task_of(type="arc", dataset=str(tmp_path / "saved")))
    items = [[item._replace(where="") for item in read_items(task)] for task in tasks]
    assert len(items[0]) == 6 and all(other == items[0] for other in items)
    limited = task_of(type="arc", paths=[str(tmp_path / "rows.jsonl")], limit=4)
    assert [item._replace(where="") for item in read_items(limited)] == items[0][:4]


def test_columns_of_any_name_and_templates(tmp_path):
    row = {"q": {"text": "2 + 2"}, "options": ["3", "4", "five"], "right": "4", "a": 7}
    path = str(write_rows(tmp_path / "rows.jsonl", [row]))
    common = {"type": "multiple_choice", "paths": [path], "prompt": "Q: {{ q.text }}=", "label": "right"}
    (item,) = read_items(task_of(**common, choices=["options"]))
    assert item[:3] == ("Q: 2 + 2=", ("3", "4", "five"), 1)
    (item,) = read_items(task_of(**common | {"label": "q.text"}, choices=["{{ a }}!", "{{ q.text }}"]))
    assert item[1:3] == (("7!", "2 + 2"), 1)
    (cloze,) = read_items(task_of(type="cloze", paths=[path], prompt="{{ q.text }} =", answer="{{ right }}"))
    assert cloze[:3] == ("2 + 2 =", ("4",), 0)


LABELS = [
    (2, "abc", 2),
    ("1", "abc", 1),
    ("B", "xyz", 1),
    ("c", "xyz", 2),
    ("y", "xyz", 1),
    ("7", "789", 0),
    ("b", "xb", 1),
]


@pytest.mark.parametrize(("label", "answers", "number"), LABELS)
def test_a_label_is_a_number_a_letter_or_the_answers_text(label, answers, number):
    assert number_of(label, list(answers)) == number


@pytest.mark.parametrize(("label", "answers"), [("1", "123"), ("a", "cba"), ("x", "xx")])
def test_a_label_that_may_be_two_answers_is_an_error(label, answers):
    with pytest.raises(ValueError, match="is more than one of the"):
        number_of(label, list(answers))


@pytest.mark.parametrize("label", [3, -1, "3", "d", "", None, True, 1.0, "long", [0]])
def test_a_label_that_names_no_answer_is_an_error(label):
    with pytest.raises(ValueError, match="is none of the 3 answers"):
        number_of(label, ["x", "y", "z"])


def test_solved_examples_come_before_each_item(tmp_path):
    made = [{"goal": f"g{i}", "sol1": f"a{i}", "sol2": f"b{i}", "label": i % 2} for i in range(3)]
    items, examples = write_rows(tmp_path / "items.jsonl", made), write_rows(tmp_path / "examples.jsonl", made[::-1])
    task = {"type": "piqa", "paths": [str(items)], "examples": [str(examples)]}
    solved = "Question: g2\nAnswer: a2\n\nQuestion: g1\nAnswer: b1\n\n"
    contexts = [item.context for item in read_items(task_of(**task, shots=2))]
    assert contexts == [f"{solved}Question: g{i}\nAnswer:" for i in range(3)]
    with pytest.raises(UserError, match="3 solved examples, fewer than 4 shots"):
        read_items(task_of(**task, shots=4))
    with pytest.raises(UserError, match="the solved examples are of the same file as the items"):
        read_items(task_of(**task | {"examples": [str(tmp_path / "*s.jsonl")]}, shots=1))


PIQA = {"goal": "g", "sol1": "a", "sol2": "b"}
WRONG = {
    "a missing column": ("piqa", {"goal": "g", "label": 0}, "'sol1' is undefined; its columns are goal, label"),
    "no label": ("piqa", PIQA, "no column 'label'; its columns are goal, sol1, sol2"),
    "a wrong label": ("piqa", PIQA | {"label": 2}, "the label 2 is none of the 2 answers"),
    "a wrong key": ("arc", {"question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "B"},
                    "answerKey 'B' is none of A"),
    "no list": ("hellaswag", {"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": "[a]"}, "not a list of texts"),
    "a null": ("piqa", PIQA | {"sol1": None, "label": 0}, "a template prints null, not text or a number"),
    "a surrogate": ("piqa", PIQA | {"sol1": "\ud800", "label": 0}, "surrogates not allowed"),
    "no choices": ("arc", {"question": "q", "answerKey": "A"}, "no column 'choices'; its columns are question, "),
    "an old form": ("hellaswag", {"ctx": "x", "label": 0}, "no column 'activity_label'; its columns are ctx, label"),
    "a number as text": ("cloze", {"text": 3}, "'int object' has no attribute 'split'"),
    "no object": ("cloze", [1], "a JSON list, not an object with columns"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_row_that_is_no_item_is_one_line_with_its_place(tmp_path, name):
    kind, row, message = WRONG[name]
    path = write_rows(tmp_path / "bad.jsonl", [*make_rows(kind, 2), row])
    with pytest.raises(UserError) as error:
        read_items(task_of(type=kind, paths=[str(path)]))
    line = str(error.value)
    assert line.startswith(f"{path}: line 3: ") and message in line and "\n" not in line


def test_files_that_are_no_items_are_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "cut.jsonl").write_text('{"text": "a b"')
    for name, message in {
        "a.txt": "rows are in .jsonl, .ndjson, .json, .csv, .tsv or .parquet files", "empty.jsonl": "no items in there",
        "cut.jsonl": "line 1: not JSON", "no.jsonl": "no.jsonl",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=re.escape(message)):
            read_items(task_of(type="cloze", paths=[str(tmp_path / name)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "piqa"}, "set either paths or dataset"),
        ({"type": "piqa", "paths": ["a"], "dataset": "b"}, "set either paths or dataset"),
        ({"type": "piqa", "paths": ["a"], "shots": 2}, "2 shots need the files of the solved examples"),
        ({"type": "piqa", "paths": ["a"], "choices": ["sol1", "sol2"]}, "several entries are templates"),
        ({"type": "piqa", "paths": ["a"], "examples": ["b"]}, "no effect without shots"),
        ({"type": "piqa", "paths": ["a"], "split": "test"}, "no effect without dataset"),
        ({"type": "piqa", "dataset": "a", "examples": ["b"], "shots": 1}, "no effect with dataset"),
    ],
)
def test_options_that_do_not_fit_are_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        task_of(**options)


def test_a_template_reaches_no_python_object(tmp_path):
    path = str(write_rows(tmp_path / "rows.jsonl", [{"text": "a b"}]))
    with pytest.raises(UserError, match="not an item of cloze: access to attribute '__class__'"):
        read_items(task_of(type="cloze", paths=[path], prompt="{{ text.__class__.__mro__ }}"))
    for prompt in ("{{ 1 / 0 }}", "{% for i in range(10**7) %}{% endfor %}", "{{ text.upper }}", "{{ cycler() }}"):
        with pytest.raises(UserError, match=r"line 1: not an item of cloze: "):
            read_items(task_of(type="cloze", paths=[path], prompt=prompt))
    with pytest.raises(UserError, match=r"eval\.tasks: cloze: a template is no Jinja"):
        read_items(task_of(type="cloze", paths=[path], prompt="{{ text"))


# --- scores ------------------------------------------------------------------------------------------


def plain_log_likelihood(model, answer: Answer) -> tuple[float, float]:
    """Score one answer by a forward of its whole text."""
    ids = torch.tensor([[*answer.context, *answer.tokens]])
    log_probabilities = model.logits(ids[:, :-1])[0, len(answer.context) - 1 :].double().log_softmax(dim=-1)
    targets = ids[0, len(answer.context) :]
    nats = log_probabilities.gather(-1, targets[:, None]).sum().item()
    return nats, float((log_probabilities.argmax(dim=-1) == targets).all())


def random_answers(model, n: int = 40) -> list[Answer]:
    """Return answers of all lengths that fit, several to a context; some are the likeliest tokens."""
    draw, limit, answers = random.Random(0), model.config.n_positions, []
    while len(answers) < n:
        n_context = draw.randint(1, limit)
        context = tuple(draw.choices(range(model.n_vocab), k=n_context))
        for _ in range(draw.randint(1, 4)):
            n_tokens = draw.randint(1, min(5, limit + 1 - n_context))
            answers.append(Answer(context, tuple(draw.choices(range(model.n_vocab), k=n_tokens))))
        likeliest = model.logits(torch.tensor([context]))[0, -1].argmax().item()
        answers.append(Answer(context, (likeliest,)))
    return answers


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("block", KINDS)
def test_log_likelihoods_are_those_of_a_plain_forward(block, style):
    model = lively(block, style)
    answers = random_answers(model)
    expected = torch.tensor([plain_log_likelihood(model, answer) for answer in answers], dtype=torch.float64)
    assert expected[:, 1].sum() > 5
    assert torch.allclose(log_likelihoods(model, answers, ALONE), expected, rtol=0, atol=1e-4)


def test_batches_change_no_score_and_stay_within_their_limits(monkeypatch):
    model = lively()
    answers = random_answers(model, 80)
    whole = log_likelihoods(model, answers, ALONE)
    for tokens, logits in ((1, 1), (100, 2**26), (2**20, 2**12)):
        monkeypatch.setattr(scoring, "BATCH_TOKENS", tokens)
        monkeypatch.setattr(scoring, "BATCH_LOGITS", logits)
        batches = list(scoring.make_batches(model, answers))
        assert sorted(number for batch in batches for numbers in batch.values() for number in numbers) == [
            *range(len(answers))
        ]
        for batch in batches:
            own = [answers[number] for numbers in batch.values() for number in numbers]
            n_context, n_answer = (max(map(len, parts)) for parts in zip(*own, strict=True))
            assert len(own) == 1 or scoring.fits(model, len(own), n_context, n_answer)
        lengths = [max(map(len, batch)) for batch in batches]
        assert all(a >= b for a, b in pairwise(lengths))
        assert torch.allclose(log_likelihoods(model, answers, ALONE), whole, rtol=0, atol=1e-5)


def test_a_long_context_and_a_long_answer_are_not_in_one_batch():
    """Each of them fits the model; padded to one another's length they would not."""
    model = lively()
    limit = model.config.n_positions
    answers = [Answer((1,) * limit, (2,)), *(Answer((n,) * (limit - 4), (3, 4, 5, 6, 7)) for n in range(7))]
    expected = torch.tensor([plain_log_likelihood(model, answer) for answer in answers], dtype=torch.float64)
    assert torch.allclose(log_likelihoods(model, answers, ALONE), expected, rtol=0, atol=1e-4)


def test_an_answers_tokens_are_those_of_the_whole_text():
    tokenizer = train_bpe(["the cat sat on the mat, the cats  sat\n\n on mats"] * 9, 300)
    for context, answer in (("the cat", "sat on"), ("the cat ", "sat"), ("x:\n\n", "cats"), ("", "the"), ("  ", "mat")):
        (encoded,) = encode_answers(tokenizer, Item(context, (answer,), 0))
        end = context[len(context.rstrip()) :]
        whole = [tokenizer.end_of_text] * (not context.strip()) + tokenizer.encode(f"{context} {answer}").tolist()
        assert [*encoded.context, *encoded.tokens] == whole
        assert tokenizer.decode(encoded.tokens).startswith(f"{end} ")


def test_scores_count_right_answers():
    items = [Item("", ("a", "long answer"), 0), Item("", ("a", "b"), 1), Item("", ("a", "b", "c", "d"), 3)]
    task = scoring.Task("t", False, items, [])
    results = [[(-1.0, 0), (-1.5, 0)], [(-2.0, 0), (-1.0, 0)], [(-1.0, 0), (-2.0, 0), (-3.0, 0), (-4.0, 0)]]
    score = score_of(task, results)
    assert score == Score(3, 2 / 3, 1 / 3, (1 / 2 + 1 / 2 + 1 / 4) / 3)
    ends = [Item("", ("a",), 0)] * 2
    cloze = score_of(scoring.Task("c", True, ends, []), [[(-1.0, 1)], [(-1.0, 0)]])
    assert cloze == Score(2, 0.5, None, 0.0)
    row = task_row({"t": score, "c": cloze})
    assert row["tasks"] == {"acc": {"t": 2 / 3, "c": 0.5}, "acc_norm": {"t": 1 / 3}}
    assert row["tasks_mean"] == pytest.approx(((2 / 3 - 5 / 12) / (7 / 12) + 0.5) / 2)


def test_a_long_context_is_cut_on_the_left_and_counted(tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "abc def"}, {"text": "x" * 40 + " y"}])
    (task,) = load_tasks([task_of(type="cloze", paths=[str(path)])], build_byte_tokenizer(), 8)
    assert capsys.readouterr().err == (
        "eval.tasks: cloze: 1 of 2 items are longer than the model's context of 8 tokens; they are cut on the left\n"
    )
    assert [len(answer.context) + len(answer.tokens) for (answer,) in task.answers] == [7, 9]
    assert task.answers[1][0].context == tuple(b"xxxxxxx")
    with pytest.raises(UserError, match=r"line 1: an answer of 4 tokens is longer than the context of 3"):
        load_tasks([task_of(type="cloze", paths=[str(path)])], build_byte_tokenizer(), 3)


# --- lm-eval -----------------------------------------------------------------------------------------

THEIR_TASKS = {
    "hellaswag": "hellaswag/hellaswag", "arc": "arc/arc_easy", "piqa": "piqa/piqa", "cloze": "lambada/lambada_openai",
}  # fmt: skip
SHOTS = 2


def write_their_task(path: Path, kind: str, items: Path, examples: Path | None = None) -> Path:
    """Write lm-eval's task with its items in a file, after the first SHOTS of `examples`."""
    shots = 0 if examples is None else SHOTS
    path.write_text(
        f"include: {LM_EVAL}/lm_eval/tasks/{THEIR_TASKS[kind]}.yaml\n"
        f"task: our_{path.stem}\ntag: null\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{train: {examples or items}, validation: {items}, test: {items}}}}}\n"
        f"num_fewshot: {shots}\nfewshot_split: train\nfewshot_config: {{sampler: first_n}}\n"
    )
    return path


@pytest.mark.skipif(not LM_EVAL.is_dir(), reason=f"no lm-eval in {LM_EVAL}; the Makefile installs it")
def test_every_item_has_the_log_likelihood_and_the_result_of_lm_eval(run, files, tmp_path):
    folder = run(
        steps=40, model={"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 128}, optim={"learning_rate": 1e-2}
    )
    examples = write_rows(tmp_path / "examples.jsonl", make_rows("piqa", 9)[::-1])
    solved = {**files, "shots": files["piqa"]}
    theirs = [write_their_task(tmp_path / f"{kind}.yaml", kind, path) for kind, path in files.items()]
    theirs.append(write_their_task(tmp_path / "shots.yaml", "piqa", files["piqa"], examples))
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, "tests/score_by_lm_eval.py", str(folder / "model"), str(out), "64", *map(str, theirs)],
        cwd=ROOT, env=environment() | {"PYTHONPATH": str(LM_EVAL), "HF_HUB_OFFLINE": "1"}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    output = json.loads(out.read_text())

    options = {kind: {"type": kind, "paths": [str(path)]} for kind, path in files.items()}
    options["shots"] = {"type": "piqa", "name": "shots", "paths": [str(files["piqa"])], "shots": SHOTS}
    options["shots"] |= {"examples": [str(examples)]}
    from training.engine.load_run import load_model

    loaded = load_model(str(folder), "cpu")
    model = loaded.model
    tasks = load_tasks([task_of(**each) for each in options.values()], loaded.tokenizer, 128)
    answers = [answer for task in tasks for item in task.answers for answer in item]
    ours = log_likelihoods(model, answers, ALONE).tolist()
    expected = [answer for kind in solved for item in output["answers"][f"our_{kind}"] for answer in item]
    assert len(ours) == len(expected) > 5 * N_ITEMS
    for (nats, is_likeliest), (their_nats, their_is_likeliest) in zip(ours, expected, strict=True):
        assert nats == pytest.approx(their_nats, abs=1e-3) and is_likeliest == their_is_likeliest
    scores = scoring.compute_scores(model, tasks, ALONE)
    for kind in solved:
        results = output["results"][f"our_{kind}"]
        assert scores[kind].acc == pytest.approx(results["acc"], abs=1e-12)
        if scores[kind].acc_norm is not None:
            assert scores[kind].acc_norm == pytest.approx(results["acc_norm"], abs=1e-12)


# --- runs --------------------------------------------------------------------------------------------


@pytest.fixture
def with_tasks(files) -> dict:
    """Options of a run that scores tasks."""
    tasks = [{"type": "arc", "paths": [str(files["arc"])], "limit": 30}]
    tasks.append({"type": "cloze", "name": "ends", "paths": [str(files["cloze"])], "limit": 20})
    evaluation = {"every": 4, "tokens": 512, "tasks": tasks, "tasks_every": 3}
    return {"eval": evaluation, "logging": {"every": 1, "tensorboard": False}}


def test_a_run_scores_its_tasks_and_resumes_with_the_same_rows(run, config, call, with_tasks, at_step, capsys):
    folder = run(name="through", **with_tasks)
    output = capsys.readouterr().out
    scored = {row["step"]: row["tasks"] for row in rows(folder) if "tasks" in row}
    assert list(scored) == [3, 6, 8] and all(set(each["acc"]) == {"arc", "ends"} for each in scored.values())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tasks"] == scored[8] and "acc_norm" in summary["tasks"]
    last = scored[8]["acc"]
    mean = f"mean, centered {summary['tasks_mean']:.3f}"
    assert f"step 8/8  tasks  arc {last['arc']:.3f}  ends {last['ends']:.3f}  {mean}" in output
    assert ">Tasks</b>" in (folder / "report.html").read_text()
    done = call("evaluate", "--run", str(folder), "--tasks", "--json")
    result = json.loads(done.stdout)
    assert {row["name"]: row["acc"] for row in result["rows"]} == last and result["mean"] == summary["tasks_mean"]
    at_step(5, lambda _: None)
    at_step.send(5)
    stopped = config(name="stopped", **with_tasks)
    assert train(stopped) != 0
    assert train(stopped) == 0
    assert rows(stopped.run_dir) == rows(folder) and tensors(stopped.run_dir, 8) == tensors(folder, 8)


def test_ranks_give_the_same_scores(processes, options, run, with_tasks, tmp_path):
    alone = run(name="alone", **with_tasks)
    for mesh in ({}, {"shard": 2}):
        name = f"two-{len(mesh)}"
        path = write_config(tmp_path / f"{name}.yaml", options(name=name, parallel={"mesh": mesh}, **with_tasks))
        ended = processes.run("training.train:main", "--config", str(path), n_ranks=2)
        assert ended.returncode == 0, ended.stderr
        ours, theirs = (
            [row["tasks"] for row in rows(folder) if "tasks" in row] for folder in (tmp_path / "runs" / name, alone)
        )
        assert ours == theirs


def test_the_command_scores_named_files_and_the_tasks_of_a_config(finished, call, files, options, tmp_path):
    folder = finished()
    done = call("evaluate", "--run", str(folder), "--tasks", f"arc={files['arc']}", f"cloze={files['cloze']}")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["step", "8", "items", "acc", "stderr", "acc_norm", "chance"]
    assert [line.split()[0] for line in lines[1:]] == ["arc", "cloze", "mean"]
    task = {"type": "arc", "name": "mine", "paths": [str(files["arc"])], "limit": 9}
    path = write_config(tmp_path / "tasks.yaml", options(eval={"tasks": [task]}))
    done = call("evaluate", "--run", str(folder), "--tasks", str(path), "--json")
    assert [(row["name"], row["items"]) for row in json.loads(done.stdout)["rows"]] == [("mine", 9)]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--tasks"], "error: --tasks: --run has no eval.tasks of its own; name some, such as arc=ARC-Easy-"),
        (
            ["--tasks", "boolq=a"],
            "error: --tasks boolq=a: neither hellaswag=PATH, arc=PATH, piqa=PATH, cloze=PATH nor ",
        ),
        (["--tasks", "arc="], "error: --tasks: '' is empty; give a path"),
        (["--tasks", "arc=no.jsonl"], "error: no.jsonl: "),
        (["--tasks", "--data", "a.txt"], "error: --tasks: leave --data out"),
    ],
)
def test_wrong_tasks_on_the_command_line_are_one_line(finished, call, arguments, line):
    done = call("evaluate", "--run", str(finished()), *arguments)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(line) and done.stderr.count("\n") == 1


def test_a_wrong_item_ends_a_run_before_its_first_step(options, call, tmp_path):
    path = write_rows(tmp_path / "bad.jsonl", [{"text": 3}])
    config = write_config(tmp_path / "run.yaml", options(eval={"tasks": [{"type": "cloze", "paths": [str(path)]}]}))
    done = call("train", "--config", str(config))
    assert done.returncode == 2 and f"error: {path}: line 1: not an item of cloze" in done.stderr
    assert not Path(Config.model_validate(options()).run_dir, "checkpoints").exists()
