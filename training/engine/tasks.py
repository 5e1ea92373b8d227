"""Score tasks: the log-likelihood of each answer after its context, with every context computed once.

Batches depend on the items alone, not on the micro-batch or the number of ranks, and so do the scores.

Shapes: B contexts, R answers, T tokens of a context, M tokens of an answer, V vocabulary.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.config import TaskConfig
from training.data import Tokenizer
from training.data.items import Item, read_items
from training.data.sources import free_name
from training.distributed.world import World
from training.errors import UserError
from training.model import GPT
from training.model.cache import Cache
from training.terminal import print_note

BATCH_TOKENS = 8192  # keys in a cache, padding included
BATCH_LOGITS = 2**26  # numbers in the logits of a batch
N_PARTS = 4  # of a batch's answers, by their length: fewer are padded


class Answer(NamedTuple):
    """Tokens whose likelihood is asked for."""

    context: tuple[int, ...]  # at least one
    tokens: tuple[int, ...]  # at least one


class Task(NamedTuple):
    """A task's items as tokens."""

    name: str
    is_cloze: bool
    items: list[Item]
    answers: list[list[Answer]]  # of each item


class Score(NamedTuple):
    """The results of a task, as shares of its items."""

    n: int
    acc: float  # the right answer is the likeliest; of a cloze: every token of it is
    acc_norm: float | None  # the same by log-likelihood per character; None for a cloze
    chance: float  # accuracy of guessing

    @property
    def centered(self) -> float:
        """The accuracy, 0 for guessing and 1 for all (arXiv:2406.11794)."""
        return (self.acc - self.chance) / (1 - self.chance) if self.chance < 1 else 0.0

    @property
    def stderr(self) -> float:
        """The standard error of the accuracy."""
        return math.sqrt(self.acc * (1 - self.acc) / max(self.n - 1, 1))


def load_tasks(
    configs: Sequence[TaskConfig], tokenizer: Tokenizer, n_positions: int, *, quiet: bool = False
) -> list[Task]:
    """Read and encode the tasks; print a line for one whose contexts are cut. Raises UserError for a wrong item."""
    tasks: list[Task] = []
    used_names = {config.name for config in configs}
    for config in configs:
        items = read_items(config)
        name = config.name or free_name(config.type, used_names)
        used_names.add(name)
        whole = [encode_answers(tokenizer, item) for item in items]
        cut = [[cut_context(each, n_positions, item) for each in of] for item, of in zip(items, whole, strict=True)]
        tasks.append(Task(name, config.type == "cloze", items, cut))
        n_cut = sum(before != after for before, after in zip(whole, cut, strict=True))
        if n_cut and not quiet:
            longer = f"{n_cut:,} of {len(items):,} items are longer than the model's context of {n_positions:,} tokens"
            print_note(f"eval.tasks: {name}: {longer}; they are cut on the left")
    return tasks


def fingerprint(tasks: Sequence[Task]) -> str:
    """Return a hash of the tokens and labels of all items."""
    sha256 = hashlib.sha256()
    for task in tasks:
        for item, answers in zip(task.items, task.answers, strict=True):
            sha256.update(repr((task.name, item.label, [tuple(answer) for answer in answers])).encode())
    return sha256.hexdigest()[:12]


def encode_answers(tokenizer: Tokenizer, item: Item) -> list[Answer]:
    """Return the tokens of each answer: those of context and answer together, after those of the context.

    White space at the end of the context belongs to the answer, as in training text. An empty context is one
    end-of-text token.
    """
    context = item.context.rstrip()
    texts = [f"{item.context[len(context) :]} {text}" for text in item.answers]
    context_ids = tuple(tokenizer.encode(context).tolist())
    answers = []
    for text in texts:
        ids = tokenizer.encode(context + text).tolist()[len(context_ids) :]
        answers.append(Answer(context_ids or (tokenizer.end_of_text,), tuple(ids or tokenizer.encode(text).tolist())))
    return answers


def cut_context(answer: Answer, n_positions: int, item: Item) -> Answer:
    """Return the answer with the end of its context that fits the model. Raises UserError if no context does."""
    n_tokens = len(answer.tokens)
    if n_tokens > n_positions:
        raise UserError(f"{item.where}: an answer of {n_tokens:,} tokens is longer than the context of {n_positions:,}")
    return answer._replace(context=answer.context[-(n_positions + 1 - n_tokens) :])


def compute_scores(model: GPT, tasks: Sequence[Task], world: World) -> dict[str, Score]:
    """Return the score of each task by its name. Collective."""
    answers = [answer for task in tasks for item in task.answers for answer in item]
    results = iter(log_likelihoods(model, answers, world).tolist())
    scores = {}
    for task in tasks:
        of_items = [[next(results) for _ in item] for item in task.answers]
        scores[task.name] = score_of(task, of_items)
    return scores


def score_of(task: Task, results: Sequence[Sequence[tuple[float, float]]]) -> Score:
    """Return a task's score from (log-likelihood, 1 if all tokens are the likeliest) of each answer of each item."""
    n, n_right, n_right_norm = len(task.items), 0, 0
    for item, of_answers in zip(task.items, results, strict=True):
        nats = [nats for nats, _ in of_answers]
        per_character = [each / max(len(text), 1) for each, text in zip(nats, item.answers, strict=True)]
        n_right += of_answers[0][1] if task.is_cloze else nats.index(max(nats)) == item.label
        n_right_norm += per_character.index(max(per_character)) == item.label
    chance = 0.0 if task.is_cloze else sum(1 / len(item.answers) for item in task.items) / n
    return Score(n, n_right / n, None if task.is_cloze else n_right_norm / n, chance)


def task_row(scores: dict[str, Score]) -> dict[str, Any]:
    """Return the scores as metrics."""
    accuracies = {name: score.acc for name, score in scores.items()}
    normalized = {name: score.acc_norm for name, score in scores.items() if score.acc_norm is not None}
    mean = sum(score.centered for score in scores.values()) / len(scores)
    return {"tasks": {"acc": accuracies} | ({"acc_norm": normalized} if normalized else {}), "tasks_mean": mean}


@torch.inference_mode()
def log_likelihoods(model: GPT, answers: Sequence[Answer], world: World) -> Tensor:
    """Return (log-likelihood in nats, 1 if every token is the likeliest one, else 0) of each answer, float64 (R, 2).

    Each rank computes whole batches, as many as the others: layers may have collectives. Collective.
    """
    batches = list(make_batches(model, answers))
    sums = torch.zeros(len(answers), 2, dtype=torch.float64)
    for first in range(0, len(batches), world.size):
        is_spare = first + world.rank >= len(batches)
        batch = batches[-1 if is_spare else first + world.rank]
        results = score_batch(model, batch, answers)
        if not is_spare:
            sums[[number for numbers in batch.values() for number in numbers]] = results
    world.all_reduce_([sums])  # with zeros: exact
    return sums


Batch = dict[tuple[int, ...], list[int]]  # the numbers of the answers after each context


def make_batches(model: GPT, answers: Sequence[Answer]) -> Iterator[Batch]:
    """Yield the answers by context, in batches of contexts of about one length, the longest first.

    A context with more answers than fit is read once for each part of them.
    """
    by_context: Batch = {}
    for number, answer in enumerate(answers):
        by_context.setdefault(answer.context, []).append(number)
    batch: Batch = {}
    n_rows = n_context = n_answer = 0  # of the batch: answers, and the largest numbers of tokens
    for context, numbers in sorted(by_context.items(), key=lambda pair: (-len(pair[0]), pair[0])):
        for number in numbers:
            longest = max(n_answer, len(answers[number].tokens))
            if batch and not fits(model, n_rows + 1, n_context, longest):
                yield batch
                batch, n_rows, longest = {}, 0, len(answers[number].tokens)
            n_context, n_answer = n_context if batch else len(context), longest
            batch.setdefault(context, []).append(number)
            n_rows += 1
    if batch:
        yield batch


def fits(model: GPT, n_rows: int, n_context: int, n_answer: int) -> bool:
    """Return True if `n_rows` answers of up to `n_answer` tokens fit, after contexts of up to `n_context` tokens."""
    n_keys = n_context - 1 + n_answer
    is_small = n_rows * n_keys <= BATCH_TOKENS and n_rows * n_answer * model.n_vocab <= BATCH_LOGITS
    return is_small and n_keys <= model.config.n_positions


def score_batch(model: GPT, batch: Batch, answers: Sequence[Answer]) -> Tensor:
    """Return (log-likelihood, 1 if all tokens are the likeliest) of the batch's answers in its order, float64 (R, 2).

    The contexts but their last token are read once, padded on the left. Then answers of about one length follow copies
    of the cache, in N_PARTS calls of the model, however many answers there are.
    """
    device, longest = model.wte.weight.device, max(map(len, batch))
    padding_B = torch.tensor([longest - len(context) for context in batch], device=device)
    cache = model.new_cache(padding_B)
    model.logits(padded((context[:-1] for context in batch), longest - 1, device, left=True), cache, n_last=1)
    rows = [(row, answers[number]) for row, numbers in enumerate(batch.values()) for number in numbers]
    by_length = sorted(range(len(rows)), key=lambda place: len(rows[place][1].tokens))
    results_R2 = torch.zeros(len(rows), 2, dtype=torch.float64)
    for part in range(N_PARTS):
        places = by_length[len(rows) * part // N_PARTS : len(rows) * (part + 1) // N_PARTS]
        of_part = [rows[place] for place in places or by_length[:1]]
        copies = cache.selected(torch.tensor([row for row, _ in of_part], device=device))
        scored_R2 = score_after(model, copies, [answer for _, answer in of_part])
        if places:
            results_R2[places] = scored_R2.cpu()
    return results_R2


def score_after(model: GPT, cache: Cache, answers: Sequence[Answer]) -> Tensor:
    """Return the results of an answer after each sample of the cache, float64 (R, 2)."""
    device, n_tokens = model.wte.weight.device, max(len(answer.tokens) for answer in answers)
    inputs_RM = padded(((*answer.context[-1:], *answer.tokens[:-1]) for answer in answers), n_tokens, device)
    targets_RM = padded((answer.tokens for answer in answers), n_tokens, device)
    lengths_R1 = torch.tensor([[len(answer.tokens)] for answer in answers], device=device)
    is_answer_RM = torch.arange(n_tokens, device=device) < lengths_R1
    logits_RMV = model.logits(inputs_RM, cache)
    nats_RM = logits_RMV.gather(-1, targets_RM[..., None])[..., 0] - logits_RMV.logsumexp(dim=-1)
    is_likeliest_RM = logits_RMV.argmax(dim=-1) == targets_RM
    nats_R = nats_RM.where(is_answer_RM, 0.0).double().sum(dim=1)
    return torch.stack([nats_R, (is_likeliest_RM | ~is_answer_RM).all(dim=1).double()], dim=1)


def padded(rows: Iterable[Sequence[int]], width: int, device: torch.device, *, left: bool = False) -> Tensor:
    """Return the rows as int64 (n, width), filled up with zeros."""
    filled = []
    for row in rows:
        zeros = [0] * (width - len(row))
        filled.append([*zeros, *row] if left else [*row, *zeros])
    return torch.tensor(filled, dtype=torch.int64, device=device)
