"""Text from sampled tokens: outputs complete characters only, and holds back the beginning of a stop string."""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

import numpy as np
from torch import Tensor

from training.model.gpt import GPT
from training.model.sampling import SamplingParams, sample


class TextCodec(Protocol):
    """A tokenizer whose tokens stand for consecutive bytes of UTF-8."""

    end_of_text: int
    vocab_size: int

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: Iterable[int]) -> str: ...


def encode_prompt(tokenizer: TextCodec, prompt: str) -> list[int]:
    """Return the prompt's tokens after an end-of-text token, because documents begin with one in training."""
    return [tokenizer.end_of_text, *tokenizer.encode(prompt).tolist()]


class Continuation:
    """The continuation of one prompt. `text` only grows; `on_text` receives each addition."""

    def __init__(self, tokenizer: TextCodec, stops: Sequence[str] = (), on_text: Callable[[str], object] | None = None):
        self.tokenizer, self.stops, self.on_text = tokenizer, stops, on_text
        self.text = ""
        # "end": end of the document, "stop": a stop string, "length": the token limit; None: not finished
        self.finish_reason: Literal["end", "stop", "length"] | None = None
        self.pending: list[int] = []  # tokens of an incomplete character
        self.held_back = ""  # characters that may be the beginning of a stop string

    def add(self, token: int) -> bool:
        """Add the next token; return True if the text continues."""
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
        beginnings = (stop[:n] for stop in self.stops for n in range(1, len(stop)))
        n_held = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
        self.held_back = text[len(text) - n_held :]
        self._append(text[: len(text) - n_held])

    def _append(self, new: str) -> None:
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
    """Return the finished continuation of each prompt (from `encode_prompt`). `on_text` receives text of all prompts.

    `sampling.sample` explains `seeds` and `sync_tokens`.
    """
    texts = [Continuation(tokenizer, stops, on_text) for _ in prompts]

    def on_token(i: int, token: int) -> bool:
        return texts[i].add(token)

    n_vocab = tokenizer.vocab_size
    sample(model, prompts, n_tokens, on_token, n_vocab=n_vocab, seeds=seeds, params=params, sync_tokens=sync_tokens)
    for text in texts:
        text.finish()
    return texts
