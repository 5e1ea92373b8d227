"""Batches as a pure function of (seed, step): there is no state to save or restore.

A sample is a window of n_positions + 1 tokens; windows start n_positions apart. A seeded
permutation maps sample i of an epoch to its window; a Feistel network computes it, so it is never stored. A sample
has the same tokens on any number of ranks, in any micro-batch, after any restart.

Shape suffixes: B samples, T tokens of each (n_positions), S sources.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

import numpy as np

from training.config import ModelConfig
from training.data.packing import PackedStream
from training.data.shards import Split
from training.data.tokenizer import Tokenizer
from training.errors import UserError
from training.optim.batch_schedule import BatchSchedule

if TYPE_CHECKING:
    from training.batch import Batch

IGNORED_TARGET = -1  # target of an empty position: no loss there
MIXTURE_BLOCK = 1024  # samples; every block has the sources in proportion to their weights
FEISTEL_ROUNDS = 8


class Samples:
    """Samples of a split, by index. Raises UserError if a stream is shorter than one window.

    With a seed, for training: each epoch is a new permutation of the complete windows; index `n_samples` is the first
    of the second epoch. If sources have weights, each block of 1024 samples has the sources in proportion to their
    weights, in whole samples; rounding does not add up over blocks. Then each source has its own epochs.
    Without a seed, for evaluation: every window once, in order; the last may be partly empty, with targets of -1.
    `end_of_text` is the token that starts documents; None: documents in a sample are not isolated from each other.
    The samples of a stream with targets of its own are packs of whole documents in place of windows (`packing.py`).
    """

    def __init__(
        self,
        split: Split,
        *,
        n_positions: int,
        seed: int | None,
        end_of_text: int | None = None,
        too_long: Literal["cut", "leave_out"] = "cut",
    ):
        self.split, self.n_positions, self.seed, self.end_of_text = split, n_positions, seed, end_of_text
        self.is_sequential = seed is None
        self.packed = {
            number: PackedStream(stream, n_positions, too_long)
            for number, stream in enumerate(split.streams)
            if stream.targets is not None
        }
        n_targets = np.array([max(len(stream.tokens) - 1, 0) for stream in split.streams])
        self.windows = (n_targets + (n_positions - 1 if self.is_sequential else 0)) // n_positions
        for number, packed in self.packed.items():
            self.windows[number] = packed.n_samples
        for stream, windows in zip(split.streams, self.windows, strict=True):
            if not windows:
                raise UserError(
                    f"data: {stream.name or stream.path.name} has {len(stream.tokens)} tokens, fewer than one window of"
                    f" {2 if self.is_sequential else n_positions + 1}: give more text or a smaller model.n_positions"
                )
        self.n_samples = int(self.windows.sum())
        self.mixture = None if self.is_sequential or split.weights is None else Mixture(split.weights, seed)

    def describe(self) -> Iterator[str]:
        """Yield a line about each stream whose samples are packed."""
        for number, packed in self.packed.items():
            name = self.split.streams[number].name
            yield f"{self.split.name}{name and f' ({name})'}: {packed.describe()}"

    def batch(self, indices: Sequence[int] | np.ndarray) -> "Batch":
        """Return the samples as a batch of torch tensors on the host; `key_B` is None without a seed."""
        import torch  # preparing data must not wait for this import

        from training.batch import Batch

        indices = np.asarray(indices, np.int64)
        tokens_BT, targets_BT, starts_BT = self.read(indices)
        key_B = None if self.is_sequential else torch.from_numpy(self.random_keys(indices))
        return Batch(
            torch.from_numpy(tokens_BT),
            torch.from_numpy(targets_BT),
            key_B,
            end_of_text=self.end_of_text,
            starts_BT=torch.from_numpy(starts_BT) if self.packed else None,
        )

    def at(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens_BT, targets_BT), both int64, of the samples with these indices."""
        return self.read(np.asarray(indices, np.int64))[:2]

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (tokens_BT, targets_BT, starts_BT) of samples: int64, int64, and True where a document starts.

        Raises UserError for a token beyond the vocabulary.
        """
        shape = len(indices), self.n_positions
        tokens_BT, targets_BT = np.zeros(shape, np.int64), np.full(shape, IGNORED_TARGET, np.int64)
        starts_BT = np.zeros(shape, bool)
        for row, (stream, window) in enumerate(zip(*self.locate(indices), strict=True)):
            if stream in self.packed:
                self.packed[stream].fill(window, tokens_BT[row], targets_BT[row], starts_BT[row])
                continue
            start = window * self.n_positions
            tokens = self.split.streams[stream].window(start, start + self.n_positions + 1)
            tokens_BT[row, : len(tokens)] = tokens[: self.n_positions]
            targets_BT[row, : len(tokens) - 1] = tokens[1:]
            if self.packed and self.end_of_text is not None:
                starts_BT[row] = tokens_BT[row] == self.end_of_text
        largest = max(tokens_BT.max(initial=0), targets_BT.max(initial=0))
        if largest >= (size := self.split.vocab_size):
            folder = self.split.streams[0].path.parent
            raise UserError(f"{folder}: token {largest} is not below the vocabulary's {size}")
        return tokens_BT, targets_BT, starts_BT

    def random_keys(self, indices: np.ndarray) -> np.ndarray:
        """Return a key for each sample's random numbers: int64 (B,), below 2^48."""
        return (permutation_key(self.seed, -2, indices) >> np.uint64(16)).astype(np.int64)

    def evenly_spaced(self, n_tokens: int | None) -> list[np.ndarray]:
        """Return, by stream, the indices of n_tokens // n_positions samples, spread evenly; None: of all samples.

        Streams get samples in proportion to their size, and at least one.
        """
        n = self.n_samples if n_tokens is None else min(self.n_samples, n_tokens // self.n_positions)
        indices = []
        for end, windows in zip(np.cumsum(self.windows).tolist(), self.windows.tolist(), strict=True):
            first = end - windows
            n_of_stream = max(1, n * end // self.n_samples - n * first // self.n_samples)
            indices.append(first + np.arange(n_of_stream) * windows // n_of_stream)
        return indices

    def locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (stream, window in the stream) of each sample, both (B,)."""
        if self.is_sequential:
            if indices.size and not 0 <= indices.min() <= indices.max() < self.n_samples:
                raise IndexError(f"samples 0 to {self.n_samples - 1} are there, not {indices.min()} to {indices.max()}")
            ends = np.cumsum(self.windows)
            stream = np.searchsorted(ends, indices, side="right")
            return stream, indices - (ends - self.windows)[stream]
        stream, number = self.mixture.draw(indices) if self.mixture else (np.zeros_like(indices), indices)
        windows = self.windows[stream]
        epoch, index = np.divmod(number, windows)
        return stream, permute_index(index, windows, permutation_key(self.seed, stream, epoch))


def build_samples(
    split: Split,
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    seed: int | None = None,
    too_long: Literal["cut", "leave_out"] = "cut",
) -> Samples:
    """Build the samples of a split as a model reads them. Raises UserError if the text is too short."""
    end_of_text = tokenizer.end_of_text if model.isolate_documents else None
    return Samples(split, n_positions=model.n_positions, seed=seed, end_of_text=end_of_text, too_long=too_long)


class Loader:
    """One rank's part of every step's global batch, whose first sample follows the last one of the step before.

    `local_range(n)` is this rank's part of n samples.
    """

    def __init__(self, samples: Samples, batches: BatchSchedule, local_range: Callable[[int], range]):
        self.samples, self.batches, self.local_range = samples, batches, local_range
        self._prefetched: tuple[int, Batch] | None = None

    def at(self, step: int) -> "Batch":
        """Return this rank's part of a step's batch. Raises UserError or OSError if the data cannot be read."""
        prefetched, self._prefetched = self._prefetched, None
        return self._read(step) if prefetched is None or prefetched[0] != step else prefetched[1]

    def prefetch(self, step: int) -> None:
        """Read a step's batch and keep it for `at`, which reads again if this read failed."""
        with suppress(UserError, OSError):
            self._prefetched = step, self._read(step)

    def _read(self, step: int) -> "Batch":
        n_positions, n_tokens = self.samples.n_positions, self.batches.batch_tokens(step)
        first, local = self.batches.tokens(step) // n_positions, self.local_range(n_tokens // n_positions)
        return self.samples.batch(first + np.arange(local.start, local.stop))._replace(n_tokens=n_tokens)


class Mixture:
    """Maps a sample number to (source, sample number within that source)."""

    def __init__(self, weights: Sequence[float], seed: int):
        self.seed = seed
        self.share = np.array(weights) / np.sum(weights)
        self.largest = int(self.share.argmax())

    def n_drawn(self, blocks: np.ndarray) -> np.ndarray:
        """Return (len(blocks), S): each source's samples before each block, rounded down; the largest gets the rest."""
        drawn = np.floor(blocks[:, None] * MIXTURE_BLOCK * self.share).astype(np.int64)
        drawn[:, self.largest] += blocks * MIXTURE_BLOCK - drawn.sum(1)
        return drawn

    def draw(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (source, number among the source's samples) of each sample, both (B,)."""
        block, index = np.divmod(indices, MIXTURE_BLOCK)
        index = permute_index(index, np.full_like(index, MIXTURE_BLOCK), permutation_key(self.seed, -1, block))
        before, after = self.n_drawn(block), self.n_drawn(block + 1)
        ends = np.cumsum(after - before, axis=1)
        source = (index[:, None] >= ends).sum(1)
        return source, index + (after - ends)[np.arange(len(index)), source]


def permutation_key(seed: int, stream: np.ndarray | int, epoch: np.ndarray) -> np.ndarray:
    """Return 64-bit keys. Stream -1 is the order within a mixture's blocks, -2 the samples' random keys."""
    key = splitmix64(np.full(epoch.shape, seed, np.uint64))
    key = splitmix64(key + np.asarray(stream).astype(np.uint64))
    return splitmix64(key + epoch.astype(np.uint64))


def permute_index(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return, elementwise, the place of `index` in the permutation of 0 .. size - 1 that `key` chooses.

    A balanced Feistel network permutes the next power of four; a result outside is permuted again until it is inside
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Integer arithmetic gives the same result on
    every machine. Sizes below 256 use a network of 256, because a smaller one shuffles badly.
    """
    half = np.maximum((np.frompyfunc(int.bit_length, 1, 1)(size - 1).astype(np.uint64) + 1) // 2, 4).astype(np.uint64)
    index, size = index.astype(np.uint64), size.astype(np.uint64)
    place = feistel(index, half, key)
    while (outside := place >= size).any():
        place[outside] = feistel(place[outside], half[outside], key[outside])
    return place.astype(np.int64)


def feistel(value: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Apply a keyed bijection of the numbers of 2 x half bits, elementwise, uint64."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for i in range(FEISTEL_ROUNDS):
        left, right = right, left ^ (splitmix64(key + (np.uint64(i) << np.uint64(56)) + right) & mask)
    return (left << half) | right


def splitmix64(z: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's counter step and finalizer (Steele et al. 2014), elementwise."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
