"""Text from a model, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from training.model.gpt import GPT


class Tokenizer(Protocol):
    """What a prompt needs of a tokenizer."""

    end_of_text: int

    def encode(self, text: str) -> np.ndarray: ...


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """(T,): the prompt as the beginning of a document: after an end-of-text token, as in training."""
    return torch.from_numpy(np.concatenate([[tokenizer.end_of_text], tokenizer.encode(prompt)]))


@torch.inference_mode()
def sample(
    model: GPT,
    prompt_T: Tensor,
    n_tokens: int,
    *,
    n_vocab: int,
    generator: torch.Generator,
    temperature: float = 0.8,
    top_k: int | None = 50,
    stop: int | None = None,
) -> Iterator[int]:
    """Up to `n_tokens` token ids that continue prompt_T (at least one id), one by one, ending before `stop`.

    Only ids below `n_vocab` are drawn: rows of the embedding past the tokenizer's size have no text.
    Where the context is full, the older half is forgotten. `generator` lives on the CPU.
    """
    limit, device = model.config.n_positions, model.wte.weight.device
    context = prompt_T[-limit:].tolist()
    cache, fresh = model.new_cache(), context
    for _ in range(n_tokens):
        if len(context) > limit:
            context = context[-max(1, limit // 2) :]
            cache, fresh = model.new_cache(), context
        logits_V = model.logits(torch.tensor([fresh], device=device), cache)[0, -1, :n_vocab].float().cpu()
        fresh = [_draw(logits_V, temperature, top_k, generator)]
        if fresh[0] == stop:
            return
        context = context + fresh
        yield fresh[0]


def _draw(logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(top_k).values[-1], float("-inf"))
    scores_V = (logits_V - logits_V.max()) / temperature  # finite at the likeliest token, however cold
    return int(torch.multinomial(scores_V.softmax(0), 1, generator=generator))
