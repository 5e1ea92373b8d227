"""The batch that the loader returns, the engine splits and the model reads."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from training.kernels.attention.masks import Documents, documents_from_starts, find_documents


class Batch(NamedTuple):
    """B samples of T tokens: a step's global batch, one rank's part of it, or a micro-batch."""

    tokens_BT: Tensor  # int64
    targets_BT: Tensor  # int64: the token after each one; -1: no target
    key_B: Tensor | None = None  # int64: seeds of the samples' random numbers; None: nothing is random
    n_targets: int = 1  # targets in the GLOBAL batch: summed losses are divided by it
    end_of_text: int | None = None  # the token that starts each document; None: each sample is one document
    documents: Documents | None = None  # on the device: their boundaries, set by `to` if `end_of_text` is
    starts_BT: Tensor | None = None  # bool: where documents start, if `end_of_text` does not tell
    n_tokens: int | None = None  # of the GLOBAL batch: divides auxiliary losses; None: n_targets

    @property
    def n_local_targets(self) -> int:
        """The number of targets in this part of the batch."""
        return int((self.targets_BT >= 0).sum())

    def rows(self, rows: slice) -> "Batch":
        """Return the samples of a slice."""
        return self._map(lambda tensor: tensor[rows])

    def cropped(self, n_tokens: int) -> "Batch":
        """Return the first `n_tokens` tokens of each sample."""
        return self._map(lambda tensor: tensor[:, :n_tokens] if tensor.ndim > 1 else tensor)

    def dummy(self) -> "Batch":
        """Return one sample of zeros, for a rank that has no samples left while others compute."""
        return self._map(lambda tensor: tensor.new_zeros(1, *tensor.shape[1:]))

    def to(self, device: torch.device) -> "Batch":
        """Copy to the device without waiting for it, and locate the documents."""
        located = None
        if self.starts_BT is not None:
            located = documents_from_starts(self.starts_BT).to(device)
        elif self.end_of_text is not None:  # on the host: on the device the count of documents would synchronize
            located = find_documents(self.tokens_BT, self.end_of_text).to(device)

        def copy(tensor: Tensor) -> Tensor:
            if device.type != "cuda":
                return tensor.to(device)
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            pinned.numpy()[...] = tensor.numpy()  # `copy_` would wake all threads, which takes milliseconds
            return pinned.to(device, non_blocking=True)

        return self._replace(starts_BT=None)._map(copy)._replace(documents=located)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        names = ("tokens_BT", "targets_BT", "key_B", "starts_BT")
        tensors = {name: getattr(self, name) for name in names}
        return self._replace(**{name: change(tensor) for name, tensor in tensors.items() if tensor is not None})
