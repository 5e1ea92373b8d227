"""The first part of a source: what is left of its limit while it is read."""

import math
from collections.abc import Iterator

from training.config import LimitConfig
from training.data.chunks import mark_blank
from training.data.tokenizer import Tokenizer


class Budget:
    """What is left of a limit. The document that reaches it is the last, and is read whole.

    Without a tokenizer, which is made from the text, a byte counts as a token: no more text is read than with it.
    """

    def __init__(self, limit: LimitConfig | None, tokenizer: Tokenizer | None):
        values = {} if limit is None else limit.model_dump(exclude_none=True)
        self.unit, self.left = next(iter(values.items()), (None, math.inf))
        self.tokenizer = tokenizer if self.unit == "tokens" else None

    @property
    def is_spent(self) -> bool:
        """True if no further document is read."""
        return self.left <= 0

    def spend(self, text: str, starts_document: bool) -> None:
        """Count a text, which may be a part of a document."""
        if self.unit is None:
            return
        starts = starts_document and self.unit != "bytes"
        self.left -= starts if self.unit == "documents" else starts + self._size(text)

    def _size(self, text: str) -> int:
        return len(text.encode() if self.tokenizer is None else self.tokenizer.encode_batch([text])[0])

    def end_of(self, text: str) -> int | None:
        """Return where a text is cut that reaches the limit: after a line if one ends there. None: it does not."""
        if self.unit in (None, "documents") or self._size(text) < self.left:
            return None
        n_bytes = self.left
        if self.tokenizer is not None:
            tokens = self.tokenizer.encode_batch([text])[0][: self.left]
            n_bytes = int(self.tokenizer.token_bytes[tokens].sum())
        end = len(text.encode()[:n_bytes].decode(errors="ignore"))
        return text.find("\n", end) + 1 or end


def first_part(parts: Iterator[tuple[int, str]], budget: Budget) -> Iterator[tuple[int, str]]:
    """Yield the first part of one file, as (number of the document, text). The last document is cut: it may be all."""
    for number, text, starts, is_blank in mark_blank(parts):
        if starts and budget.is_spent:
            return
        end = None if is_blank else budget.end_of(text)
        yield number, text[:end]
        if end is not None:
            return
        if not is_blank:
            budget.spend(text, starts)
