"""Text that grows token by token: whole characters only, and nothing that a stop string may take back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from training.model.gpt import GPT
from training.model.sampling import SamplingParams, sample


class TextCodec(Protocol):
    """What is needed of a tokenizer here. Its tokens stand for bytes of UTF-8, one after the other."""

    end_of_text: int
    vocab_size: int

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: Iterable[int]) -> str: ...


def encode_prompt(tokenizer: TextCodec, prompt: str) -> list[int]:
    """The prompt as the beginning of a document: after an end-of-text token, as in training."""
    return [tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()]


class Continuation:
    """What follows a prompt. `text` is settled: more is appended to it, and shown to `on_text`."""

    def __init__(self, tokenizer: TextCodec, stops: Sequence[str] = (), on_text: Callable[[str], object] | None = None):
        self.tokenizer, self.stops, self.on_text = tokenizer, stops, on_text
        self.text = ""
        # Why it ended: the document did, a stop string came, or it is as long as it may be. None: it goes on.
        self.finish_reason: Literal["end", "stop", "length"] | None = None
        self.pending: list[int] = []  # tokens whose last character is not whole
        self.held = ""  # characters that may be the beginning of a stop string

    def add(self, token: int) -> bool:
        """Take the next token; returns whether the text goes on."""
        if token == self.tokenizer.end_of_text:
            self.finish("end")
            return False
        self.pending.append(token)
        new = self.tokenizer.decode(self.pending)
        if not new.endswith("\N{REPLACEMENT CHARACTER}"):  # a character may be several tokens
            self.pending.clear()
            self._grow(new)
        return self.finish_reason is None

    def finish(self, reason: Literal["end", "length"] = "length") -> None:
        """No token follows: settle what was held back. Nothing happens to a text that has ended."""
        if self.finish_reason is None:
            self._grow(self.tokenizer.decode(self.pending))
        if self.finish_reason is None:
            self._settle(self.held)
            self.finish_reason = reason

    def _grow(self, new: str) -> None:
        """Settle all that no stop string can begin with. The stop string that is complete first counts."""
        text = self.held + new
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self.stops if stop in text]
        if found:
            self._settle(text[: min(found)[1]])
            self.finish_reason = "stop"
            return
        beginnings = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
        n_held = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
        self.held = text[len(text) - n_held :]
        self._settle(text[: len(text) - n_held])

    def _settle(self, new: str) -> None:
        self.text += new
        if self.on_text is not None:
            self.on_text(new)


def continue_texts(
    model: GPT,
    tokenizer: TextCodec,
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    *,
    seeds: Sequence[int | Sequence[int]],
    params: SamplingParams,
    stops: Sequence[str] = (),
    on_text: Callable[[str], object] | None = None,
    sync_tokens: Callable[[Tensor], Tensor] | None = None,
) -> list[Continuation]:
    """Continuations of prompts (from `encode_prompt`); `on_text` is called with each settled text."""
    texts = [Continuation(tokenizer, stops, on_text) for _ in prompts]

    def on_token(i: int, token: int) -> bool:
        return texts[i].add(token)

    sample(
        model,
        prompts,
        n_tokens,
        on_token,
        n_vocab=tokenizer.vocab_size,
        seeds=seeds,
        params=params,
        sync_tokens=sync_tokens,
    )
    for text in texts:
        text.finish()
    return texts
