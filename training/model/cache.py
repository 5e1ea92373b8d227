"""What a model keeps of the tokens it has read, so that the next ones cost one token each.

Shapes: B batch, R some samples of it, T new tokens, S all tokens.
"""

from __future__ import annotations

from torch import Tensor


class LayerCache:
    """A layer's tensors, by name, each growing along its second-last dimension."""

    def __init__(self) -> None:
        self.kept: dict[str, tuple[Tensor, int]] = {}

    def append(self, name: str, new: Tensor) -> Tensor:
        """Take `new` (..., T, D); returns everything so far (..., S, D)."""
        buffer, n_old = self.kept.get(name, (new[..., :0, :], 0))
        n_all = n_old + new.shape[-2]
        if n_all > buffer.shape[-2]:  # half as much again, so that few tokens cause a copy
            grown = new.new_empty(*new.shape[:-2], n_all + n_all // 2, new.shape[-1])
            grown[..., :n_old, :] = buffer[..., :n_old, :]
            buffer = grown
        buffer[..., n_old:n_all, :] = new
        self.kept[name] = (buffer, n_all)
        return buffer[..., :n_all, :]


class Cache:
    """The cache of a whole model. `n_padding_B`: tokens at the beginning of each sample that are no text."""

    def __init__(self, n_layer: int, n_padding_B: Tensor | None = None) -> None:
        self.layers = [LayerCache() for _ in range(n_layer)]
        self.n_tokens = 0  # read so far, padding included
        self._pad(n_padding_B)

    def _pad(self, n_padding_B: Tensor | None) -> None:
        self.min_padding = 0 if n_padding_B is None else int(n_padding_B.min())
        self.n_padding_B = n_padding_B if n_padding_B is not None and bool(n_padding_B.any()) else None

    def select(self, rows_B: Tensor) -> None:
        """Keep these samples, in this order; a sample may be kept several times."""
        for layer in self.layers:
            layer.kept = {name: (buffer.index_select(0, rows_B), n) for name, (buffer, n) in layer.kept.items()}
        self._pad(None if self.n_padding_B is None else self.n_padding_B.index_select(0, rows_B))

    def replace_rows(self, rows_R: Tensor, read: Cache) -> None:
        """Let these samples have read what those of `read` have, which are without padding, and nothing else."""
        start = self.n_tokens - read.n_tokens
        for layer, new in zip(self.layers, read.layers, strict=True):
            for name, (buffer, n) in layer.kept.items():
                new_buffer, n_new = new.kept[name]
                buffer[rows_R, ..., start:n, :] = new_buffer[..., :n_new, :]
        n_padding_B = rows_R.new_zeros(len(buffer)) if self.n_padding_B is None else self.n_padding_B
        self._pad(n_padding_B.index_fill(0, rows_R, start))

    def trim(self) -> None:
        """Forget the places that are padding in every sample."""
        n = min(self.min_padding, self.n_tokens)
        for layer in self.layers:
            layer.kept = {name: (buffer[..., n:, :], n_all - n) for name, (buffer, n_all) in layer.kept.items()}
        self.n_tokens -= n
        self._pad(None if self.n_padding_B is None else self.n_padding_B - n)

    @property
    def max_text_tokens(self) -> int:
        """Tokens of the sample that has the most text."""
        return self.n_tokens - self.min_padding
