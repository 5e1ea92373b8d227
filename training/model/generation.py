"""Generation: sample tokens for several texts in one batch, decode them. Shapes: B texts, T tokens, V vocabulary."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.model.cache import Cache
from training.model.gpt import GPT


class SamplingParams(NamedTuple):
    """Options for drawing tokens: Transformers' logits processors, in the order of its `generate`."""

    temperature: float = 0.8  # 0: always the most likely token
    top_k: int | None = None  # keep the k most likely tokens, and ties with the k-th; None: all
    top_p: float = 1.0  # keep the smallest set with this total probability (arXiv:1904.09751)
    min_p: float = 0.0  # keep tokens above this x the largest probability (arXiv:2407.01082)
    repetition_penalty: float = 1.0  # of all tokens of the text, prompt included (arXiv:1909.05858)


def sample_token(logits_BV: Tensor, seen_BV: Tensor | None, uniform_B1: Tensor, params: SamplingParams) -> Tensor:
    """Draw a token for each row, int64 (B, 1). `seen_BV` (bool) marks the tokens of its text; None: no penalty.

    Inverts the cumulative distribution over token ids at `uniform_B1`, float64 in [0, 1).
    """
    scores_BV = logits_BV if seen_BV is None else penalize_repetition(logits_BV, seen_BV, params.repetition_penalty)
    if params.temperature == 0:
        return scores_BV.argmax(dim=-1, keepdim=True)
    cumulative_BV = token_probabilities(scores_BV, params).to(uniform_B1.device).cumsum(dim=-1, dtype=torch.float64)
    return torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True).to(logits_BV.device)


def penalize_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Divide the logits of seen tokens by the penalty if positive, else multiply them (arXiv:1909.05858)."""
    penalized_BV = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, penalized_BV, logits_BV)


def token_probabilities(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """Apply temperature, top-k, top-p and min-p, in this order; return probabilities (B, V)."""
    # Subtracting the maximum keeps the largest score, 0, finite at any temperature.
    scores_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / params.temperature
    if params.top_k is not None and params.top_k < scores_BV.shape[-1]:
        kth_B1 = scores_BV.topk(params.top_k, dim=-1).values[:, -1:]
        scores_BV = scores_BV.masked_fill(scores_BV < kth_B1, float("-inf"))
    if params.top_p < 1:
        ascending_BV, order_BV = scores_BV.sort(dim=-1)
        excluded_BV = ascending_BV.softmax(dim=-1).cumsum(dim=-1) <= 1 - params.top_p
        excluded_BV[:, -1] = False
        scores_BV = scores_BV.masked_fill(excluded_BV.scatter(1, order_BV, excluded_BV), float("-inf"))
    if params.min_p > 0:
        probability_BV = scores_BV.softmax(dim=-1)
        excluded_BV = probability_BV < params.min_p * probability_BV.amax(dim=-1, keepdim=True)
        scores_BV = scores_BV.masked_fill(excluded_BV, float("-inf"))
    return scores_BV.softmax(dim=-1)


class _Text(NamedTuple):
    index: int  # of its prompt
    context: list[int]  # the cache holds all but the last token
    generator: np.random.Generator


@torch.inference_mode()
def sample(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    on_token: Callable[[int, int], bool],
    *,
    n_vocab: int,
    seeds: Sequence[int | Sequence[int]],
    params: SamplingParams,
    sync_tokens: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Continue the prompts (token ids, at least one each) in one batch, by up to `n_tokens` tokens each.

    `on_token(i, token)` receives the next token of prompt i and returns True if that text continues. Only ids below
    `n_vocab` are drawn, because later rows of the embedding are padding. If the context is full, its older half is
    dropped. A text depends only on its prompt and its seed, not on the rest of the batch. Ranks of a sharded model
    must use the same tokens: `sync_tokens` receives each rank's (B, 1) and returns one rank's.
    """
    device, limit = model.wte.weight.device, model.config.n_positions
    float64_device = "cpu" if device.type == "mps" else device  # MPS has no float64
    seeded = zip(prompts, map(np.random.default_rng, seeds), strict=True)
    texts = [_Text(i, list(prompt)[-limit:], generator) for i, (prompt, generator) in enumerate(seeded)]
    cache = _read(model, texts)
    seen_BV = None
    if params.repetition_penalty != 1:
        seen_BV = torch.zeros(len(prompts), n_vocab, dtype=torch.bool, device=device)
        for seen_V, prompt in zip(seen_BV, prompts, strict=True):
            seen_V[torch.tensor(prompt, device=device)] = True
    for _ in range(n_tokens):
        full = [row for row, text in enumerate(texts) if len(text.context) > limit]
        if full:
            for row in full:
                del texts[row].context[: -max(1, limit // 2)]
            cache.replace_rows(torch.tensor(full, device=device), _read(model, [texts[row] for row in full]))
            cache.trim()
        numbers_B1 = [[text.generator.random()] for text in texts]
        uniform_B1 = torch.tensor(numbers_B1, dtype=torch.float64, device=float64_device)
        last_B1 = torch.tensor([text.context[-1:] for text in texts], device=device)
        logits_BV = model.logits(last_B1, cache, n_last=1)[:, -1, :n_vocab]
        token_B1 = sample_token(logits_BV, seen_BV, uniform_B1, params)
        if sync_tokens is not None:
            token_B1 = sync_tokens(token_B1)
        if seen_BV is not None:
            seen_BV.scatter_(1, token_B1, True)
        for text, token in zip(texts, token_B1.flatten().tolist(), strict=True):
            text.context.append(token)
        continuing = [row for row, text in enumerate(texts) if on_token(text.index, text.context[-1])]
        if not continuing:
            return
        if len(continuing) < len(texts):
            texts, rows_B = [texts[row] for row in continuing], torch.tensor(continuing, device=device)
            cache.select(rows_B)
            cache.trim()
            seen_BV = None if seen_BV is None else seen_BV[rows_B]


def _read(model: GPT, texts: list[_Text]) -> Cache:
    """Return a cache of each context without its last token; equal contexts are computed once."""
    contexts = [tuple(text.context) for text in texts]
    row_of = {context: row for row, context in enumerate(dict.fromkeys(contexts))}
    longest, device = max(map(len, contexts)), model.wte.weight.device
    padding = [longest - len(context) for context in row_of]
    padded = [[0] * n + list(context[:-1]) for n, context in zip(padding, row_of, strict=True)]
    cache = model.new_cache(torch.tensor(padding, device=device))
    model.logits(torch.tensor(padded, dtype=torch.int64, device=device), cache, n_last=1)
    if len(row_of) < len(contexts):
        cache.select(torch.tensor([row_of[context] for context in contexts], device=device))
    return cache


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the prompt's tokens after an end-of-text token, because documents begin with one in training."""
    return [tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()]


class Continuation:
    """The continuation of one prompt. `text` only grows; `on_text` receives each addition.

    It holds complete characters only, and no beginning of a stop string. `tokenizer` is a `training.data.Tokenizer`.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str] = (),
        on_text: Callable[[str], object] | None = None,
        end_tokens: Collection[int] = (),
    ):
        self.tokenizer, self.stops, self.on_text = tokenizer, stops, on_text
        self.end_tokens = {tokenizer.end_of_text, *end_tokens}
        self.text = ""
        # "end": end of the document or the turn, "stop": a stop string, "length": the token limit; None: not finished
        self.finish_reason: Literal["end", "stop", "length"] | None = None
        self.pending: list[int] = []  # tokens of an incomplete character
        self.held_back = ""  # characters that may be the beginning of a stop string

    def add(self, token: int) -> bool:
        """Add the next token; return True if the text continues."""
        if token in self.end_tokens:
            self.finish("end")
            return False
        self.pending.append(token)
        new = self.tokenizer.decode(self.pending)
        if not new.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may be several tokens
            self.pending.clear()
            self._grow(new)
        return self.finish_reason is None

    def finish(self, reason: Literal["end", "length"] = "length") -> None:
        """Append the held-back text, because no token follows; no effect on a finished text."""
        if self.finish_reason is None:
            self._grow(self.tokenizer.decode(self.pending))
        if self.finish_reason is None:
            self._append(self.held_back)
            self.finish_reason = reason

    def _grow(self, new: str) -> None:
        """Append text up to a possible stop string; finish at the stop string whose end comes first."""
        text = self.held_back + new
        complete = [(text.index(stop) + len(stop), text.index(stop)) for stop in self.stops if stop in text]
        if complete:
            self._append(text[: min(complete)[1]])
            self.finish_reason = "stop"
            return
        n_held = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        self.held_back = text[len(text) - n_held :]
        self._append(text[: len(text) - n_held])

    def _append(self, new: str) -> None:
        self.text += new
        if self.on_text is not None:
            self.on_text(new)


def continue_texts(
    model: GPT,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    *,
    stops: Sequence[str] = (),
    on_text: Callable[[str], object] | None = None,
    end_tokens: Collection[int] = (),
    **options: Any,
) -> list[Continuation]:
    """Return the finished continuation of each prompt (from `encode_prompt`). `on_text` receives text of all prompts.

    A text ends at the end-of-text token, and at one of `end_tokens`.
    `sample` explains the other options: `seeds`, `params` and `sync_tokens`.
    """
    texts = [Continuation(tokenizer, stops, on_text, end_tokens) for _ in prompts]
    sample(model, prompts, n_tokens, lambda i, token: texts[i].add(token), n_vocab=tokenizer.vocab_size, **options)
    for text in texts:
        text.finish()
    return texts
