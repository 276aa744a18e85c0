"""Batches depend on nothing but their place; every window and every target comes once."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojaxgpt.data.loader import hash_words, make_eval_batches, make_train_rows, permute
from nanojaxgpt.errors import DataError

TOKENS = np.arange(10_000, dtype=np.uint16)  # each token tells its own position


def assert_batches_equal(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def permute_all(size, key):
    index = np.arange(size, dtype=np.uint64)
    return permute(index, size, np.full(size, key, np.uint64))


@pytest.mark.parametrize("size", [*range(1, 70), 100, 255, 256, 257, 1000, 4096, 4097, 99_991])
def test_permutation_meets_every_number_once(size):
    permuted = permute_all(size, 7)
    np.testing.assert_array_equal(np.sort(permuted), np.arange(size))


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=100)
def test_permutation_meets_every_number_once_for_any_key(size, key):
    assert len(np.unique(permute_all(size, key))) == size


def test_permutation_looks_random():
    size = 10_000
    one, other = permute_all(size, 1).astype(int), permute_all(size, 2).astype(int)
    index = np.arange(size)
    assert abs(np.corrcoef(one, index)[0, 1]) < 0.04
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.04
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.04
    assert (np.diff(one) == 1).sum() < 10  # neighbours part
    assert (one == other).sum() < 10


def test_small_permutations_are_all_met():
    keys = hash_words(0, np.arange(600, dtype=np.uint64))
    orders, counts = np.unique([permute_all(3, key) for key in keys], axis=0, return_counts=True)
    assert len(orders) == 6
    assert counts.min() > 50


def test_permutation_of_a_huge_domain_stays_inside():
    size = 2**40 + 12345
    index = np.arange(size - 1000, size, dtype=np.uint64)
    permuted = permute(index, size, np.full(1000, 3, np.uint64))
    assert len(np.unique(permuted)) == 1000
    assert permuted.max() < size
    assert permuted.min() < size // 10


def test_targets_follow_tokens_inside_the_span():
    read = make_train_rows(TOKENS, (100, 9_000), seq_len=16, batch_size=8, seed=0)
    for step in (0, 1, 500):
        batch = read(step, 0, 8)
        assert batch.tokens_BT.shape == batch.targets_BT.shape == (8, 16)
        assert batch.tokens_BT.dtype == batch.targets_BT.dtype == np.int32
        assert batch.weights_BT.dtype == np.float32
        np.testing.assert_array_equal(np.diff(batch.tokens_BT, axis=1), 1)
        np.testing.assert_array_equal(batch.targets_BT, batch.tokens_BT + 1)
        np.testing.assert_array_equal(batch.weights_BT, 1)
        assert batch.tokens_BT.min() >= 100
        assert batch.targets_BT.max() < 9_000
        assert batch.segments_BT is batch.positions_BT is None


def test_batch_is_a_function_of_seed_and_step():
    def first_tokens(seed, step):
        read = make_train_rows(TOKENS, (0, 9_000), 16, 8, seed)
        return read(step, 0, 8).tokens_BT

    np.testing.assert_array_equal(first_tokens(0, 3), first_tokens(0, 3))
    assert (first_tokens(0, 3) != first_tokens(1, 3)).any()
    assert (first_tokens(0, 3) != first_tokens(0, 4)).any()


@pytest.mark.parametrize("step", [0, 69, 70, 12345])  # step 70 straddles two epochs of 561 rows
def test_rows_in_pieces_are_the_whole_batch(step):
    read = make_train_rows(TOKENS, (0, 9_000), seq_len=16, batch_size=8, seed=3)
    whole = read(step, 0, 8)
    for cuts in ((0, 8), (0, 3, 8), (0, 1, 2, 3, 4, 5, 6, 7, 8)):
        pieces = [read(step, a, b) for a, b in pairwise(cuts)]
        for field in range(3):
            joined = np.concatenate([piece[field] for piece in pieces])
            np.testing.assert_array_equal(joined, whole[field])


def test_an_epoch_visits_every_window_once_and_the_next_differs():
    seq_len, length = 16, 1_000
    num_windows = (length - seq_len) // seq_len
    read = make_train_rows(TOKENS, (50, 50 + length), seq_len, batch_size=1, seed=5)
    epochs = []
    for epoch in range(8):
        steps = range(epoch * num_windows, (epoch + 1) * num_windows)
        epochs.append([int(read(step, 0, 1).tokens_BT[0, 0]) for step in steps])
    for starts in epochs:
        assert np.diff(np.sort(starts)).tolist() == [seq_len] * (num_windows - 1)
        assert starts != sorted(starts)
    offsets = [min(starts) - 50 for starts in epochs]
    assert len(set(offsets)) > 3
    assert min(offsets) >= 0
    assert max(offsets) < seq_len
    orders = {tuple(np.argsort(starts)) for starts in epochs}
    assert len(orders) == len(epochs)


def test_every_offset_fits_the_smallest_span():
    seq_len, batch_size = 7, 3
    stop = (batch_size + 1) * seq_len
    read = make_train_rows(TOKENS, (0, stop), seq_len, batch_size, seed=0)
    targets = np.array([read(step, 0, batch_size).targets_BT for step in range(200)])
    assert targets.max() == stop - 1  # the largest offset was met


def test_span_shorter_than_a_batch_is_refused():
    with pytest.raises(DataError, match=r"27 tokens, but 3 sequences of 7 need 28"):
        make_train_rows(TOKENS, (10, 37), seq_len=7, batch_size=3, seed=0)


@pytest.mark.parametrize("length", [2, 3, 16, 17, 18, 33, 128, 129, 130, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_eval_target_is_scored_once(length, batch_size):
    num_batches, read = make_eval_batches(TOKENS, (40, 40 + length), 16, batch_size)
    scored = []
    for number in range(num_batches):
        batch = read(number, 0, batch_size)
        assert batch.tokens_BT.shape == (batch_size, 16)
        real = batch.weights_BT == 1
        assert ((batch.weights_BT == 0) | real).all()
        np.testing.assert_array_equal(batch.targets_BT[real], batch.tokens_BT[real] + 1)
        scored += batch.targets_BT[real].tolist()
        assert max(batch.targets_BT.max(), batch.tokens_BT.max()) < 40 + length
    assert scored == list(range(41, 40 + length))
    assert real.any()  # no batch of padding alone


def test_eval_rows_in_pieces_are_the_whole_batch():
    num_batches, read = make_eval_batches(TOKENS, (0, 501), 16, 8)
    last = num_batches - 1
    whole, pieces = read(last, 0, 8), [read(last, 0, 3), read(last, 3, 8)]
    for field in range(3):
        joined = np.concatenate([piece[field] for piece in pieces])
        np.testing.assert_array_equal(joined, whole[field])


@pytest.mark.parametrize("length", [0, 1])
def test_nothing_to_score_gives_no_batch(length):
    assert make_eval_batches(TOKENS, (5, 5 + length), 16, 8)[0] == 0


def test_memmap_gives_the_same_batches(tmp_path):
    TOKENS.tofile(tmp_path / "tokens.bin")
    memmap = np.memmap(tmp_path / "tokens.bin", np.uint16, "r")
    readers = [make_train_rows(tokens, (0, 10_000), 16, 8, 0) for tokens in (memmap, TOKENS)]
    assert_batches_equal(*(read(4, 0, 8)[:3] for read in readers))
    readers = [make_eval_batches(tokens, (0, 10_000), 16, 8)[1] for tokens in (memmap, TOKENS)]
    assert_batches_equal(*(read(4, 0, 8)[:3] for read in readers))
