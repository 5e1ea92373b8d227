"""Packing: whole documents side by side in samples, for rows whose answers alone are learned.

A document of L tokens takes L - 1 positions: its last token is only a target. Best-fit decreasing (arXiv:2404.10830):
each document, longest first, goes to the sample with the least room that it fits into.

Shape suffixes: D documents, T tokens of a sample (n_positions).
"""

from typing import Literal, NamedTuple

import numpy as np

from training.data.shards import Stream
from training.errors import UserError


class PackedStream:
    """The samples of a stream with targets of its own. A pure function of the stream, n_positions and `too_long`.

    Documents without a target, and by `too_long` those longer than a sample, are left out. Raises UserError if none
    is left.
    """

    def __init__(self, stream: Stream, n_positions: int, too_long: Literal["cut", "leave_out"]):
        self.stream, self.n_positions, self.too_long = stream, n_positions, too_long
        starts_D = stream.documents.astype(np.int64)
        ends_D = np.append(starts_D[1:], len(stream.tokens))
        is_long_D = ends_D - starts_D - 1 > n_positions
        self.n_long = int(is_long_D.sum())
        if too_long == "cut":
            ends_D = np.minimum(ends_D, starts_D + n_positions + 1)
        n_before = np.append(0, np.cumsum(stream.targets))
        is_kept_D = n_before[ends_D] > n_before[starts_D + 1]
        if too_long == "leave_out":
            is_kept_D &= ~is_long_D
        self.n_left_out = int((~is_kept_D).sum())
        if not is_kept_D.any():
            name = f"{stream.name}: " if stream.name else ""
            other = " or data.too_long: cut" if self.n_long and too_long == "leave_out" else ""
            raise UserError(f"data: {name}no answer fits into model.n_positions {n_positions}; use a larger one{other}")
        self.starts_D, self.lengths_D = starts_D[is_kept_D], (ends_D - starts_D)[is_kept_D] - 1
        packs = best_fit(self.lengths_D, n_positions)
        self.order_D, self.first_of_pack = packs.order_D, packs.first_of_pack
        self.n_samples = len(self.first_of_pack) - 1

    def fill(self, sample: int, tokens_T: np.ndarray, targets_T: np.ndarray, starts_T: np.ndarray) -> None:
        """Write a sample's tokens, its targets, and True where a document or the empty rest starts."""
        position = 0
        for document in self.order_D[self.first_of_pack[sample] : self.first_of_pack[sample + 1]]:
            start, length = int(self.starts_D[document]), int(self.lengths_D[document])
            tokens = self.stream.window(start, start + length + 1)
            is_target = self.stream.targets[start + 1 : start + length + 1]
            place = slice(position, position + length)
            tokens_T[place] = tokens[:-1]
            targets_T[place][is_target] = tokens[1:][is_target]
            starts_T[position] = True
            position += length
        if position < self.n_positions:
            starts_T[position] = True

    def describe(self) -> str:
        """Return a line about the samples."""
        n_rows, n_tokens = len(self.lengths_D), int(self.lengths_D.sum())
        share = n_tokens / (self.n_samples * self.n_positions)
        line = f"{n_rows:,} rows with answers in {self.n_samples:,} samples, {share:.1%} full"
        if self.n_long:
            verb = {"cut": "cut to it", "leave_out": "left out"}[self.too_long]
            line += f"; longer than model.n_positions {self.n_positions:,}, {verb}: {self.n_long:,} (data.too_long)"
        if n := self.n_left_out - (self.n_long if self.too_long == "leave_out" else 0):
            line += f"; without an answer in the context, left out: {n:,}"
        return line


class Packs(NamedTuple):
    """The documents in the order of the packs, and where each pack begins in it, with the end of the last."""

    order_D: np.ndarray
    first_of_pack: np.ndarray


def best_fit(lengths_D: np.ndarray, capacity: int) -> Packs:
    """Pack documents of 1 to `capacity` positions by best-fit decreasing. The same lengths give the same packs."""
    by_length_D = np.argsort(-lengths_D, kind="stable")
    pack_D = np.empty(len(lengths_D), np.int64)
    open_packs: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that is left
    has_pack = np.zeros(capacity + 1, bool)
    n_packs = 0
    for document in by_length_D.tolist():
        length = int(lengths_D[document])
        room = length + int(has_pack[length:].argmax())  # the least room that is enough, if there is any
        if has_pack[room]:
            pack = open_packs[room].pop()
            has_pack[room] = bool(open_packs[room])
        else:
            pack, room = n_packs, capacity
            n_packs += 1
        pack_D[document] = pack
        open_packs[room - length].append(pack)
        has_pack[room - length] = room > length  # a full pack is closed
    order_D = np.argsort(pack_D, kind="stable")
    return Packs(order_D, np.searchsorted(pack_D[order_D], np.arange(n_packs + 1)))
