"""Sampling: draw a token from logits, and continue several texts in one batch.

Shapes: B texts, T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

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
    token_B1 = torch.searchsorted(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:], right=True)
    return token_B1.to(logits_BV.device)


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
    batch = _TextBatch(model, prompts, n_vocab, seeds, params, sync_tokens)
    indices = list(range(len(prompts)))
    for _ in range(n_tokens):
        continuing = [row for row, token in enumerate(batch.next_tokens()) if on_token(indices[row], token)]
        if not continuing:
            return
        if len(continuing) < len(indices):
            indices = [indices[row] for row in continuing]
            batch.select(continuing)


class _TextBatch:
    """Left-padded texts and their cache. The last token of each text (last_B1) is not in the cache yet."""

    def __init__(
        self,
        model: GPT,
        prompts: Sequence[Sequence[int]],
        n_vocab: int,
        seeds: Sequence[int | Sequence[int]],
        params: SamplingParams,
        sync_tokens: Callable[[Tensor], Tensor] | None,
    ):
        self.model, self.n_vocab, self.params, self.sync_tokens = model, n_vocab, params, sync_tokens
        self.device, self.limit = model.wte.weight.device, model.config.n_positions
        self.contexts = [list(prompt)[-self.limit :] for prompt in prompts]
        self.cache = self._read(self.contexts)
        self.last_B1 = torch.tensor([context[-1:] for context in self.contexts], device=self.device)
        self.generators = [np.random.default_rng(seed) for seed in seeds]
        self.seen_BV = None
        if params.repetition_penalty != 1:
            seen_BV = torch.zeros(len(prompts), n_vocab, dtype=torch.bool)
            for seen_V, prompt in zip(seen_BV, prompts, strict=True):
                seen_V[torch.tensor(prompt)] = True
            self.seen_BV = seen_BV.to(self.device)

    def next_tokens(self) -> list[int]:
        """Draw and return the next token of each text."""
        self._shorten_full_contexts()
        uniform_B1 = torch.tensor([[generator.random()] for generator in self.generators], dtype=torch.float64)
        if self.device.type != "mps":  # MPS has no float64
            uniform_B1 = uniform_B1.to(self.device)
        logits_BV = self.model.logits(self.last_B1, self.cache, n_last=1)[:, -1, : self.n_vocab]
        self.last_B1 = sample_token(logits_BV, self.seen_BV, uniform_B1, self.params)
        if self.sync_tokens is not None:
            self.last_B1 = self.sync_tokens(self.last_B1)
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, self.last_B1, True)
        tokens = self.last_B1.flatten().tolist()  # the only synchronization with the device per token
        for context, token in zip(self.contexts, tokens, strict=True):
            context.append(token)
        return tokens

    def select(self, rows: list[int]) -> None:
        """Keep only these texts."""
        rows_B = torch.tensor(rows, device=self.device)
        self.contexts = [self.contexts[row] for row in rows]
        self.generators = [self.generators[row] for row in rows]
        self.cache.select(rows_B)
        self.cache.trim()
        self.last_B1 = self.last_B1.index_select(0, rows_B)
        self.seen_BV = None if self.seen_BV is None else self.seen_BV.index_select(0, rows_B)

    def _read(self, contexts: list[list[int]]) -> Cache:
        """Return a cache of each context without its last token; equal contexts are computed once."""
        distinct = list(dict.fromkeys(map(tuple, contexts)))
        longest = max(map(len, distinct))
        padding = [longest - len(context) for context in distinct]
        cache = self.model.new_cache(torch.tensor(padding, device=self.device))
        padded = [[0] * n + list(context[:-1]) for n, context in zip(padding, distinct, strict=True)]
        self.model.logits(torch.tensor(padded, dtype=torch.int64, device=self.device), cache, n_last=1)
        if len(distinct) < len(contexts):
            row_of = {context: row for row, context in enumerate(distinct)}
            cache.select(torch.tensor([row_of[tuple(context)] for context in contexts], device=self.device))
        return cache

    def _shorten_full_contexts(self) -> None:
        """Drop the older half of texts that exceed the context, and recompute the cache of the newer half."""
        full = [row for row, context in enumerate(self.contexts) if len(context) > self.limit]
        if not full:
            return
        for row in full:
            self.contexts[row] = self.contexts[row][-max(1, self.limit // 2) :]
        shortened = self._read([self.contexts[row] for row in full])
        self.cache.replace_rows(torch.tensor(full, device=self.device), shortened)
        self.cache.trim()
