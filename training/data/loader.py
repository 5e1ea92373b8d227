"""Samples: a pure function of (seed, epoch, sample index), without state to save or restore.

A sample is a window of n_positions + 1 tokens; windows follow one another n_positions apart. Sample i of an
epoch is the window that a seeded permutation names, which is computed (a Feistel network), never stored.
Whoever asks for a sample gets the same tokens, on any number of ranks, in any micro-batches, after any restart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.data.shards import Split
from training.errors import UserError

IGNORED_TARGET = -1  # target where there is no text
MIXTURE_BLOCK = 1024  # samples over which a mixture keeps its proportions
ROUNDS = 8


class Samples:
    """Samples of a split, by index.

    With a seed: every epoch permutes the whole windows anew, and indices go on past `n_samples` into the next
    epochs. Where sources are weighted, each block of 1024 samples holds each source in its exact share (in the
    long run; within a sample in a block), and each source has epochs of its own.

    With seed None, for evaluation: the windows in order, each once; the last may be partly empty, with targets
    of -1 there.
    """

    def __init__(self, split: Split, *, n_positions: int, seed: int | None):
        self.split, self.n_positions, self.seed = split, n_positions, seed
        self.is_sequential = seed is None
        count = (lambda n: -(-n // n_positions)) if self.is_sequential else (lambda n: n // n_positions)
        self.windows = np.array([count(max(len(stream.tokens) - 1, 0)) for stream in split.streams])
        for stream, windows in zip(split.streams, self.windows, strict=True):
            if not windows:
                raise UserError(
                    f"data: {stream.path.name} has {len(stream.tokens)} tokens, fewer than one window of"
                    f" {2 if self.is_sequential else n_positions + 1}: give more text or a smaller model.n_positions"
                )
        self.n_samples = int(self.windows.sum())
        self.mixture = None if self.is_sequential or split.weights is None else Mixture(split.weights, seed)

    def at(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets, both int64 (len(indices), n_positions), of samples 0, 1, 2, ... of the run."""
        rows = np.full((len(indices), self.n_positions + 1), IGNORED_TARGET, np.int64)
        for row, stream, window in zip(rows, *self.locate(np.asarray(indices, np.int64)), strict=True):
            start = window * self.n_positions
            tokens = self.split.streams[stream].window(start, start + self.n_positions + 1)
            row[: len(tokens)] = tokens
        if rows.max(initial=0) >= self.split.vocab_size:
            raise UserError(
                f"{self._where()}: token {rows.max()} is not below the vocabulary's {self.split.vocab_size}"
            )
        # An empty position is never a target, so any valid token can stand there.
        return np.maximum(rows[:, :-1], 0), np.ascontiguousarray(rows[:, 1:])

    def random_keys(self, indices: np.ndarray) -> np.ndarray:
        """int64 below 2^48: for each sample of the run, where what is random in it comes from."""
        return (permutation_key(self.seed, -2, indices) >> np.uint64(16)).astype(np.int64)

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which stream and which of its windows each sample is."""
        if self.is_sequential:
            if indices.size and not 0 <= indices.min() <= indices.max() < self.n_samples:
                raise IndexError(f"samples 0 to {self.n_samples - 1} are there, not {indices.min()} to {indices.max()}")
            ends = np.cumsum(self.windows)
            stream = np.searchsorted(ends, indices, side="right")
            return stream, indices - (ends - self.windows)[stream]
        stream, draw = self.mixture.draw(indices) if self.mixture else (np.zeros_like(indices), indices)
        windows = self.windows[stream]
        epoch, index = np.divmod(draw, windows)
        return stream, permute_index(index, windows, permutation_key(self.seed, stream, epoch))

    def _where(self) -> str:
        return str(self.split.streams[0].path.parent)


class Mixture:
    """Which source a sample comes from, and the how manieth of that source's samples it is."""

    def __init__(self, weights: Sequence[float], seed: int):
        self.seed = seed
        self.share = np.array(weights) / np.sum(weights)
        self.largest = int(self.share.argmax())

    def drawn(self, blocks: np.ndarray) -> np.ndarray:
        """(len(blocks), n_sources): samples of each source before a block; a floor, the largest takes the rest."""
        drawn = np.floor(blocks[:, None] * MIXTURE_BLOCK * self.share).astype(np.int64)
        drawn[:, self.largest] += blocks * MIXTURE_BLOCK - drawn.sum(1)
        return drawn

    def draw(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, number among the source's own samples) of each sample."""
        block, place = np.divmod(indices, MIXTURE_BLOCK)
        place = permute_index(place, np.full_like(place, MIXTURE_BLOCK), permutation_key(self.seed, -1, block))
        before, after = self.drawn(block), self.drawn(block + 1)
        ends = np.cumsum(after - before, axis=1)
        source = (place[:, None] >= ends).sum(1)
        row = np.arange(len(indices))
        start = ends[row, source] - (after - before)[row, source]
        return source, before[row, source] + place - start


def permutation_key(seed: int, stream: np.ndarray | int, epoch: np.ndarray) -> np.ndarray:
    """A permutation's 64-bit key; stream -1 is the order within a mixture's blocks."""
    mixed = splitmix64(np.full(epoch.shape, seed, np.uint64))
    mixed = splitmix64(mixed + np.asarray(stream).astype(np.uint64))
    return splitmix64(mixed + epoch.astype(np.uint64))


def permute_index(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Elementwise, the place of `index` in the permutation of 0 .. size - 1 that `key` chooses.

    A balanced Feistel network permutes the next power of four; what falls outside walks on along its cycle
    until it falls inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Integer
    arithmetic only: the same on every machine. At least 256 places, for fewer are shuffled badly.
    """
    half = np.maximum((np.frompyfunc(int.bit_length, 1, 1)(size - 1).astype(np.uint64) + 1) // 2, 4).astype(np.uint64)
    index, size = index.astype(np.uint64), size.astype(np.uint64)
    place = feistel(index, half, key)
    while (outside := place >= size).any():
        place[outside] = feistel(place[outside], half[outside], key[outside])
    return place.astype(np.int64)


def feistel(value: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A keyed bijection of the numbers of 2 x half bits, elementwise, uint64."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for i in range(ROUNDS):
        left, right = right, left ^ (splitmix64(key + (np.uint64(i) << np.uint64(56)) + right) & mask)
    return (left << half) | right


def splitmix64(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014), elementwise, after a step of its counter."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
