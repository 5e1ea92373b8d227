"""Which keys a query may see: those before it, within a window, of its own document.

Shapes: B batch, T queries, S keys (the queries are the last T of them), D documents of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """The documents that samples are packed of."""

    index_BS: Tensor  # number of each key's document in its sample, never decreasing
    position_BT: Tensor  # place of each query in its document
    cu_seqlens_D: Tensor | None = None  # int32 (D + 1,): where documents end in the flattened (B x T), 0 first

    def to(self, device: torch.device) -> Documents:
        """The same on a device, without waiting for it."""
        return Documents(*(tensor.to(device, non_blocking=True) for tensor in self))


class Visibility(NamedTuple):
    """What a back-end makes its mask from."""

    n_queries: int
    n_keys: int
    device: torch.device
    window: int | None = None  # keys that a query sees, its own included
    documents: Documents | None = None
    dtype: torch.dtype = torch.float32  # of the queries

    @property
    def effective_window(self) -> int | None:
        """The window; None where every key before the query is in it."""
        return None if self.window is None or self.window >= self.n_keys else self.window


def find_documents(tokens_BT: Tensor, end_of_text: int) -> Documents:
    """A document begins at its end-of-text token, and where a sample begins."""
    begins_BT = tokens_BT == end_of_text
    index_BT = begins_BT.cumsum(1)
    begins_BT = begins_BT.clone()
    begins_BT[:, 0] = True
    place_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    start_BT = torch.where(begins_BT, place_T, 0).cummax(1).values
    starts_D = begins_BT.flatten().nonzero().flatten()
    cu_seqlens_D = torch.cat([starts_D, starts_D.new_tensor([tokens_BT.numel()])]).to(torch.int32)
    return Documents(index_BT, place_T - start_BT, cu_seqlens_D)


def left_padded(n_padding_B: Tensor, start: int, n_keys: int) -> Documents:
    """Samples whose first tokens are padding, which no other token sees; queries are keys start .. n_keys - 1."""
    place_S = torch.arange(n_keys, device=n_padding_B.device)
    position_BS = place_S - n_padding_B[:, None]
    return Documents((position_BS >= 0).long(), position_BS[:, start:].clamp(min=0))


def boolean_mask(visibility: Visibility) -> Tensor:
    """(1 or B, 1, T, S) of bool: True where the query may see the key."""
    key_S = torch.arange(visibility.n_keys, device=visibility.device)
    query_T1 = key_S[visibility.n_keys - visibility.n_queries :, None]
    mask = (key_S <= query_T1)[None, None]
    if visibility.window is not None:
        mask = mask & (key_S > query_T1 - visibility.window)
    if visibility.documents is not None:
        index_BS = visibility.documents.index_BS
        mask = mask & (index_BS[:, None, -visibility.n_queries :, None] == index_BS[:, None, None, :])
    return mask
