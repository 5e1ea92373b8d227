"""The key-value cache for generation. Shapes: B batch, R selected samples, T new tokens, S all tokens."""

from torch import Tensor


class LayerCache:
    """Tensors of one layer by name; each grows along its second-last dimension."""

    def __init__(self) -> None:
        self.buffers: dict[str, tuple[Tensor, int]] = {}  # by name: buffer, tokens in it

    def append(self, name: str, new: Tensor) -> Tensor:
        """Append `new` (..., T, D) and return everything so far, (..., S, D)."""
        buffer, n_old = self.buffers.get(name, (new[..., :0, :], 0))
        n_all = n_old + new.shape[-2]
        if n_all > buffer.shape[-2]:  # grow by half: most tokens then need no copy
            grown = new.new_empty(*new.shape[:-2], n_all + n_all // 2, new.shape[-1])
            grown[..., :n_old, :] = buffer[..., :n_old, :]
            buffer = grown
        buffer[..., n_old:n_all, :] = new
        self.buffers[name] = (buffer, n_all)
        return buffer[..., :n_all, :]


class Cache:
    """The caches of all layers. `n_padding_B`: padding tokens at the beginning of each sample."""

    def __init__(self, n_layer: int, n_padding_B: Tensor | None = None) -> None:
        self.layers = [LayerCache() for _ in range(n_layer)]
        self.n_tokens = 0  # tokens read so far, padding included
        self._set_padding(n_padding_B)

    def _set_padding(self, n_padding_B: Tensor | None) -> None:
        self.min_padding = 0 if n_padding_B is None else int(n_padding_B.min())
        self.n_padding_B = None if n_padding_B is None or not n_padding_B.any() else n_padding_B

    def select(self, rows_B: Tensor) -> None:
        """Keep these samples, in this order; a sample may be repeated."""
        selected = self.selected(rows_B)
        self.layers = selected.layers
        self._set_padding(selected.n_padding_B)

    def selected(self, rows_B: Tensor) -> "Cache":
        """Return a cache of copies of these samples, in this order; a sample may be repeated."""
        padding_B = None if self.n_padding_B is None else self.n_padding_B.index_select(0, rows_B)
        new = Cache(len(self.layers), padding_B)
        new.n_tokens = self.n_tokens
        for layer, copy in zip(self.layers, new.layers, strict=True):
            copy.buffers = {name: (buffer.index_select(0, rows_B), n) for name, (buffer, n) in layer.buffers.items()}
        return new

    def replace_rows(self, rows_R: Tensor, other: "Cache") -> None:
        """Overwrite R samples with those of `other`, which have no padding."""
        start = self.n_tokens - other.n_tokens
        for layer, new in zip(self.layers, other.layers, strict=True):
            for name, (buffer, n) in layer.buffers.items():
                new_buffer, n_new = new.buffers[name]
                buffer[rows_R, ..., start:n, :] = new_buffer[..., :n_new, :]
        n_padding_B = rows_R.new_zeros(len(buffer)) if self.n_padding_B is None else self.n_padding_B
        self._set_padding(n_padding_B.index_fill(0, rows_R, start))

    def trim(self) -> None:
        """Drop the leading tokens that are padding in every sample."""
        n = min(self.min_padding, self.n_tokens)
        for layer in self.layers:
            layer.buffers = {name: (buffer[..., n:, :], n_all - n) for name, (buffer, n_all) in layer.buffers.items()}
        self.n_tokens -= n
        self._set_padding(None if self.n_padding_B is None else self.n_padding_B - n)
