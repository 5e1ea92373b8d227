"""Items of tasks: a context and answers, made of the rows of files and data sets by the templates of a task.

The texts are those of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), so that scores can be compared.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from jinja2 import StrictUndefined, Undefined, UndefinedError
from jinja2.sandbox import SandboxedEnvironment

from training.config import ARCTask, ChoiceConfig, HellaSwagTask, HuggingFaceSource, TaskConfig
from training.data.chat_template import TEMPLATE_ERRORS
from training.data.find_files import find_files
from training.data.row_files import Row
from training.data.sources import HuggingFaceReader
from training.data.text_files import read_rows
from training.errors import UserError

SHOT_END = "\n\n"  # between a solved example and what follows


def printed(value: Any) -> Any:
    """Return a value that a template prints. Raises ValueError for null, and for anything but text and numbers."""
    if not isinstance(value, Undefined | str | int | float):
        raise ValueError(f"a template prints {'null' if value is None else type(value).__name__}, not text or a number")
    return value


# A template cannot reach Python's objects: a configuration that someone else wrote runs no code.
TEMPLATES = SandboxedEnvironment(undefined=StrictUndefined, finalize=printed, keep_trailing_newline=True)


class Item(NamedTuple):
    """A text and possible answers, each of which follows it after a space."""

    context: str
    answers: tuple[str, ...]  # a cloze has only the right one
    label: int  # the number of the right answer
    where: str = ""  # its row, for errors


def read_items(task: TaskConfig) -> list[Item]:
    """Return the items of a task, each after `task.shots` solved examples. Raises UserError for a row that is none."""
    make = build_maker(task)
    shots = [make(*row) for row in islice(rows_of(task, task.examples, task.examples_split), task.shots)]
    if len(shots) < task.shots:
        raise UserError(f"{place_of(task)}: {len(shots)} solved examples, fewer than {task.shots} shots")
    if task.shots and task.paths and is_same_file(task):
        raise UserError(f"{place_of(task)}: the solved examples are of the same file as the items; give another one")
    solved = "".join(f"{item.context} {item.answers[item.label]}{SHOT_END}" for item in shots)
    items = [make(*row) for row in islice(rows_of(task, task.paths, task.split), task.limit)]
    if not items:
        raise UserError(f"{place_of(task)}: no items in there")
    return [item._replace(context=solved + item.context) for item in items]


def is_same_file(task: TaskConfig) -> bool:
    """Return True if a file has both items and solved examples: an item would follow its own answer."""
    items, examples = ({path.resolve() for path in find_files(paths)[0]} for paths in (task.paths, task.examples))
    return bool(items & examples)


def place_of(task: TaskConfig) -> str:
    """Return the place of a task's items, for people."""
    return task.dataset or ", ".join(task.paths)


def rows_of(task: TaskConfig, paths: Sequence[str], split: str) -> Iterator[Row]:
    """Yield the rows of files, or of a split of the task's data set."""
    if task.dataset is not None:
        yield from HuggingFaceReader(HuggingFaceSource(name=task.dataset, config=task.config, split=split)).rows()
    else:
        for path in find_files(paths)[0]:
            yield from read_rows(path)


def build_maker(task: TaskConfig) -> Callable[[str, Any], Item]:
    """Return the function that makes an item of (where, row). Raises UserError for a template that is none."""
    is_choice, prepare = isinstance(task, ChoiceConfig), PREPARE.get(type(task), dict)
    answers = task.choices if is_choice else (task.answer,)
    try:
        prompt, *templates = map(TEMPLATES.from_string, (task.prompt, *answers))
    except TEMPLATE_ERRORS as error:
        raise UserError(f"eval.tasks: {task.type}: a template is no Jinja: {error}") from None
    column = answers[0] if is_choice and "{" not in answers[0] else None

    def make(where: str, row: Any) -> Item:
        if not isinstance(row, dict):
            raise UserError(f"{where}: a JSON {type(row).__name__}, not an object with columns")
        try:
            row = prepare(row)
            texts = [template.render(row) for template in templates] if column is None else list_in(row, column)
            label = number_of(column_in(row, task.label), texts) if is_choice else 0
            item = Item(prompt.render(row), tuple(texts), label, where)
            "".join((item.context, *texts)).encode()  # raises UnicodeEncodeError, a ValueError, for a lone surrogate
            return item
        except TEMPLATE_ERRORS as error:
            there = f"; its columns are {', '.join(map(str, row)) or 'none'}"
            missing = isinstance(error, UndefinedError | KeyError)
            reason = f"no column {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{where}: not an item of {task.type}: {reason}{there if missing else ''}") from None

    return make


def column_in(row: dict, path: str) -> Any:
    """Return the value of a column such as `label` or `question.stem`. Raises KeyError if it is missing."""
    value: Any = row
    for name in path.split("."):
        value = value[name]
    return value


def list_in(row: dict, path: str) -> list[str]:
    """Return a column's list of texts. Raises KeyError without one, ValueError for another value."""
    texts = column_in(row, path)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path!r} is not a list of texts")
    return texts


def number_of(label: Any, answers: Sequence[str]) -> int:
    """Return the number of the right answer. Raises ValueError if the label names none, or several."""
    meant = {number for number, answer in enumerate(answers) if answer == label}
    if type(label) is int:
        meant.add(label)
    elif isinstance(label, str) and re.fullmatch(r"[0-9]+", label):
        meant.add(int(label))
    elif isinstance(label, str) and re.fullmatch("[A-Za-z]", label):
        meant.add(ord(label.upper()) - ord("A"))
    meant &= set(range(len(answers)))
    if len(meant) != 1:
        which = "more than one" if meant else "none"
        raise ValueError(f"the label {label!r} is {which} of the {len(answers)} answers")
    return meant.pop()


def prepare_hellaswag(row: dict) -> dict:
    """Return the columns of HellaSwag, cleaned as lm-eval does."""

    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return {**row, "query": clean(context), "endings": [clean(ending) for ending in list_in(row, "endings")]}


def prepare_arc(row: dict) -> dict:
    """Return the columns of ARC in one form: the hub's, or that of the files of its authors."""
    question = row["question"]
    if isinstance(question, dict):
        question, choices = question["stem"], question["choices"]
    else:
        choices = row["choices"]
    if isinstance(choices, list):
        choices = {name: [choice[name] for choice in choices] for name in ("text", "label")}
    if row["answerKey"] not in choices["label"]:
        raise ValueError(f"answerKey {row['answerKey']!r} is none of {', '.join(choices['label'])}")
    label = choices["label"].index(row["answerKey"])
    return {**row, "question": question, "choices": list_in(choices, "text"), "answerKey": label}


PREPARE: dict[type[TaskConfig], Callable[[dict], dict]] = {HellaSwagTask: prepare_hellaswag, ARCTask: prepare_arc}
