"""Attention masks: a query sees earlier keys, within a window, in the same document.

Shapes: B samples, T queries, S keys (the queries are the last T keys), D documents in the batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """The documents that are packed into samples."""

    index_BS: Tensor  # int64: index of each key's document within its sample, never decreasing
    position_BT: Tensor  # int64: position of each query within its document
    cu_seqlens_D: Tensor | None = None  # int32 (D + 1,): 0, then the end of each document in the flattened (B x T)

    def to(self, device: torch.device) -> "Documents":
        """Copy to a device without synchronizing."""
        return Documents(*(tensor.to(device, non_blocking=True) for tensor in self))


class Visibility(NamedTuple):
    """The keys that each query sees. A back-end builds its mask from this."""

    n_queries: int
    n_keys: int
    device: torch.device
    window: int | None = None  # keys that a query sees, including its own; None: all earlier keys
    documents: Documents | None = None
    dtype: torch.dtype = torch.float32  # of the queries

    @property
    def effective_window(self) -> int | None:
        """The window; None if it reaches back to the first key."""
        return None if self.window is None or self.window >= self.n_keys else self.window


def find_documents(tokens_BT: Tensor, end_of_text: int) -> Documents:
    """Return the documents: one starts at the start of each sample and at each end-of-text token."""
    return documents_from_starts(tokens_BT == end_of_text)


def documents_from_starts(starts_BT: Tensor) -> Documents:
    """Return the documents: one starts at the start of each sample and where `starts_BT`, bool, is True."""
    index_BT = starts_BT.cumsum(1)
    position_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)
    start_BT = torch.where(starts_BT, position_T, 0).cummax(1).values
    is_first_T = position_T == 0
    starts_D = (starts_BT | is_first_T).flatten().nonzero().flatten()
    cu_seqlens_D = torch.cat([starts_D, starts_D.new_tensor([starts_BT.numel()])]).to(torch.int32)
    return Documents(index_BT, position_T - start_BT, cu_seqlens_D)


def left_padded(n_padding_B: Tensor, start: int, n_keys: int) -> Documents:
    """Treat each sample's left padding as a document, so that no text sees it. Queries are keys start..n_keys-1."""
    key_S = torch.arange(n_keys, device=n_padding_B.device)
    position_BS = key_S - n_padding_B[:, None]
    return Documents((position_BS >= 0).long(), position_BS[:, start:].clamp(min=0))


def is_visible(window: int | None, index_BS: Tensor | None, sample: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return True where the query sees the key. `sample`, `query` and `key` are indices whose shapes broadcast."""
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    if index_BS is not None:
        visible = visible & (index_BS[sample, query] == index_BS[sample, key])
    return visible


def boolean_mask(visibility: Visibility) -> Tensor:
    """Return the mask as bool (1 or B, 1, T, S): True where the query sees the key."""
    key_S = torch.arange(visibility.n_keys, device=visibility.device)
    query_11T1 = key_S[visibility.n_keys - visibility.n_queries :].view(1, 1, -1, 1)
    index_BS = visibility.documents and visibility.documents.index_BS
    sample_B111 = torch.arange(1 if index_BS is None else len(index_BS), device=visibility.device).view(-1, 1, 1, 1)
    return is_visible(visibility.window, index_BS, sample_B111, query_11T1, key_S)
