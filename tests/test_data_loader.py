"""Samples are a pure function of (seed, epoch, sample index), batches of (seed, step)."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.loader import MIXTURE_BLOCK, Loader, Mixture, Samples, feistel, permutation_key, permute_index
from training.data.shards import Split, Stream
from training.errors import UserError
from training.optim.batch_schedule import BatchSchedule


def split_of(*lengths: int, weights: tuple[float, ...] | None = None) -> Split:
    """Return streams whose token at position p of stream s is 1000 s + p, so that tokens show their position."""
    streams = tuple(
        Stream(Path(f"data/train-{s}.tokens"), np.arange(n, dtype="<u2") + 1000 * s, np.zeros(1, "<u8"), n_bytes=n)
        for s, n in enumerate(lengths)
    )
    return Split("train", streams, weights, 2**16)


def permutation(n: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    return permute_index(np.arange(n), np.full(n, n), permutation_key(seed, 0, np.full(n, epoch)))


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6))
@settings(max_examples=50, deadline=None)
def test_an_epoch_holds_every_window_once(n, seed, epoch):
    assert sorted(permutation(n, seed, epoch)) == list(range(n))


@given(value=st.integers(0, 2**62 - 1), half=st.integers(4, 31), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_the_feistel_network_is_invertible(value, half, seed):
    """An inverse in Python integers recovers the number, so the network is a bijection of any size."""
    value %= 4**half

    def mix(z):
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    as_array = [np.array([x], np.uint64) for x in (value, half, seed)]
    left, right = divmod(int(feistel(*as_array)[0]), 2**half)
    for i in reversed(range(8)):
        left, right = right ^ (mix((seed + (i << 56) + left) % 2**64) % 2**half), left
    assert (left << half) + right == value


def test_the_permutation_never_changes():
    """A change here changes the data of every resumed run."""
    assert permutation(10, seed=1, epoch=2).tolist() == [9, 3, 2, 4, 5, 0, 6, 7, 8, 1]
    assert permutation(10**6, seed=3)[:4].tolist() == [734092, 759820, 855731, 233843]


def test_epochs_and_seeds_differ():
    first = permutation(1000)
    assert (permutation(1000, epoch=1) == first).sum() < 10
    assert (permutation(1000, seed=1) == first).sum() < 10


@pytest.mark.parametrize("n", [2, 3, 7, 100])
def test_every_window_is_equally_likely_at_every_position(n):
    """Chi-squared over 4000 epochs, and over all orders of 3 windows: at most five standard deviations."""
    epochs = 4000
    index = np.tile(np.arange(n), epochs)
    orders = permute_index(
        index, np.full_like(index, n), permutation_key(0, 0, np.repeat(np.arange(epochs), n))
    ).reshape(epochs, n)
    for counts in [np.bincount(orders[:, place], minlength=n) for place in (0, n // 2, n - 1)]:
        chi = ((counts - epochs / n) ** 2 / (epochs / n)).sum()
        assert abs(chi - (n - 1)) < 5 * np.sqrt(2 * (n - 1))
    if n == 3:
        _, counts = np.unique(orders, axis=0, return_counts=True)
        assert len(counts) == 6
        assert ((counts - epochs / 6) ** 2 / (epochs / 6)).sum() < 5 + 5 * np.sqrt(10)


def test_neighbors_are_not_kept_together():
    steps = np.diff(permutation(10_000))
    assert abs(np.corrcoef(permutation(10_000)[:-1], permutation(10_000)[1:])[0, 1]) < 0.05
    assert (np.abs(steps) == 1).sum() < 20


def test_a_sample_is_consecutive_tokens_and_the_target_is_the_next():
    tokens, targets = Samples(split_of(1001), n_positions=10, seed=0).at(range(100))
    assert tokens.shape == targets.shape == (100, 10)
    assert tokens.dtype == targets.dtype == np.int64
    assert (targets == tokens + 1).all()
    assert sorted(tokens[:, 0]) == list(range(0, 1000, 10))


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_samples_do_not_depend_on_how_they_are_divided(data):
    """Any division of the samples among ranks, micro-batches and restarts gives the same rows."""
    weights = data.draw(st.sampled_from([None, (0.7, 0.3)]))
    split = split_of(330, 550, weights=weights) if weights else split_of(330)
    samples = Samples(split, n_positions=8, seed=data.draw(st.integers(0, 99)))
    begin = data.draw(st.integers(0, 5000))
    whole = samples.at(range(begin, begin + 64))[0]
    cuts = sorted(data.draw(st.lists(st.integers(0, 64), max_size=4)))
    again = Samples(split, n_positions=8, seed=samples.seed)
    parts = [again.at(range(begin + a, begin + b))[0] for a, b in zip([0, *cuts], [*cuts, 64], strict=True)]
    assert (np.concatenate(parts) == whole).all()


def test_every_epoch_is_complete_and_in_another_order():
    samples = Samples(split_of(331), n_positions=8, seed=5)
    n = samples.n_samples
    assert n == 41
    epochs = samples.at(range(3 * n))[0][:, 0].reshape(3, n)
    assert (np.sort(epochs) == np.arange(0, 8 * n, 8)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_evaluation_reads_every_token_once_and_in_order():
    samples = Samples(split_of(24), n_positions=10, seed=None)
    tokens, targets = samples.at(range(samples.n_samples))
    assert targets[targets >= 0].tolist() == list(range(1, 24))
    assert targets[2].tolist() == [21, 22, 23] + [-1] * 7
    assert tokens[2].tolist() == [20, 21, 22, 23] + [0] * 6
    with pytest.raises(IndexError):
        samples.at([3])


def test_a_complete_last_window_is_not_followed_by_an_empty_one():
    assert Samples(split_of(21), n_positions=10, seed=None).n_samples == 2


@given(
    weights=st.lists(st.floats(1e-4, 1e3), min_size=2, max_size=8),
    blocks=st.integers(1, 10**6),
)
@settings(deadline=None)
def test_a_mixture_keeps_its_proportions(weights, blocks):
    share = np.array(weights) / sum(weights)
    mixture = Mixture(weights, seed=0)
    before, after = mixture.n_drawn(np.array([blocks, blocks + 1]))
    assert before.sum() == blocks * MIXTURE_BLOCK
    assert (after >= before).all()
    assert (np.abs(before - blocks * MIXTURE_BLOCK * share) < len(weights)).all()


def test_a_mixture_gives_each_source_its_own_samples_in_turn():
    mixture = Mixture((1, 3), seed=7)
    source, number = mixture.draw(np.arange(5 * MIXTURE_BLOCK))
    for s, share in enumerate((0.25, 0.75)):
        assert sorted(number[source == s]) == list(range(int(5 * MIXTURE_BLOCK * share)))
        for block in range(5):
            assert (source[block * MIXTURE_BLOCK : (block + 1) * MIXTURE_BLOCK] == s).sum() == MIXTURE_BLOCK * share
    first, second = (source[block * MIXTURE_BLOCK : (block + 1) * MIXTURE_BLOCK] for block in (0, 1))
    assert (first != second).any()


def test_each_source_of_a_mixture_has_its_own_epochs():
    samples = Samples(split_of(81, 801, weights=(1.0, 1.0)), n_positions=8, seed=0)
    stream, window = samples.locate(np.arange(MIXTURE_BLOCK))
    assert np.ptp(np.bincount(window[stream == 0], minlength=10)) <= 1
    assert np.ptp(np.bincount(window[stream == 1], minlength=100)) <= 1


def test_text_shorter_than_a_window_is_an_error_with_the_numbers():
    with pytest.raises(UserError, match=r"train-0.tokens has 10 tokens, fewer than one window of 11"):
        Samples(split_of(10), n_positions=10, seed=0)
    with pytest.raises(UserError, match=r"train-1.tokens has 5 tokens"):
        Samples(split_of(100, 5, weights=(1, 1)), n_positions=10, seed=0)
    with pytest.raises(UserError, match=r"has 1 tokens, fewer than one window of 2"):
        Samples(split_of(1), n_positions=10, seed=None)


def test_a_token_beyond_the_vocabulary_is_an_error_and_not_a_crash_on_the_device():
    split = split_of(100)
    samples = Samples(Split("train", split.streams, None, 99), n_positions=99, seed=0)
    with pytest.raises(UserError, match=r"^data: token 99 is not below the vocabulary's 99"):
        samples.at([0])


# --- a step's batch ----------------------------------------------------------------------------------


def test_a_rank_gets_its_part_of_the_batch_with_the_samples_keys():
    samples = Samples(split_of(331), n_positions=8, seed=5, end_of_text=300)
    indices = 3 * 16 + np.arange(4, 9)
    batch = Loader(samples, BatchSchedule([(0, 16 * 8)]), lambda _: range(4, 9)).at(3)
    tokens, targets = samples.at(indices)
    assert (batch.tokens_BT.numpy() == tokens).all() and (batch.targets_BT.numpy() == targets).all()
    assert (batch.key_B.numpy() == samples.random_keys(indices)).all()
    assert batch.end_of_text == 300


def test_nothing_is_random_in_an_evaluation():
    assert Samples(split_of(331), n_positions=8, seed=None).batch([0, 3]).key_B is None


def test_a_prefetched_batch_is_read_once_and_belongs_to_its_step(monkeypatch):
    samples = Samples(split_of(331), n_positions=8, seed=5)
    loader, n_reads, read = Loader(samples, BatchSchedule([(0, 4 * 8)]), range), [], Samples.read
    monkeypatch.setattr(Samples, "read", lambda self, indices: n_reads.append(len(indices)) or read(self, indices))
    expected = [samples.batch(4 * step + np.arange(4)).tokens_BT.tolist() for step in range(3)]
    n_reads.clear()
    loader.prefetch(1)
    assert loader.at(1).tokens_BT.tolist() == expected[1] and len(n_reads) == 1
    loader.prefetch(0)
    assert loader.at(2).tokens_BT.tolist() == expected[2]
    assert loader.at(0).tokens_BT.tolist() == expected[0]


def test_a_lasting_prefetch_error_is_raised_by_the_step_that_needs_the_batch(monkeypatch):
    loader = Loader(Samples(split_of(331), n_positions=8, seed=5), BatchSchedule([(0, 4 * 8)]), range)
    with monkeypatch.context() as patch:
        patch.setattr(Samples, "read", failing)
        loader.prefetch(1)
        with pytest.raises(UserError, match="damaged"):
            loader.at(1)
        loader.prefetch(1)
    assert len(loader.at(1).tokens_BT) == 4, "a network file system that failed once is no reason to stop"


def failing(_samples, _indices):
    raise UserError("damaged")


@pytest.mark.parametrize(
    ("n_tokens", "indices"),
    [(None, range(41)), (1000, range(41)), (31, [0, 13, 27]), (7, [0]), (0, [0])],
)
def test_evaluation_samples_are_spread_evenly(n_tokens, indices):
    samples = Samples(split_of(329), n_positions=8, seed=None)
    n_tokens = n_tokens if n_tokens != 31 else 3 * 8 + 7
    (spread,) = samples.evenly_spaced(n_tokens)
    assert spread.tolist() == list(indices)


@pytest.mark.parametrize(
    ("n_tokens", "indices"),
    [
        (None, [range(41), range(41, 61), range(61, 62)]),
        (31 * 8, [range(0, 40, 2), range(41, 61, 2), [61]]),
        (0, [[0], [41], [61]]),
    ],
)
def test_evaluation_samples_are_spread_evenly_over_each_source(n_tokens, indices):
    """Streams of 41, 20 and 1 windows."""
    samples = Samples(split_of(329, 161, 3), n_positions=8, seed=None)
    assert [part.tolist() for part in samples.evenly_spaced(n_tokens)] == [list(part) for part in indices]
