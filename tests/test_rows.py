"""Which row stands where is a function of the place alone; every row comes once, in proportion."""

from itertools import pairwise

import numpy as np
import pytest
from conftest import assert_batches_equal
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojaxgpt.data.rows import (
    Batch,
    Rows,
    WeightedRows,
    hash_words,
    interleave,
    join_tables,
    make_eval_batches,
    make_ramp,
    make_train_rows,
    permute,
    read_batch,
    take_rows,
)  # fmt: skip
from nanojaxgpt.errors import DataError


def table(count: int, base: int = 0) -> Rows:
    """Return a table whose row n holds the number base + n."""

    def read(index_B, key_B):
        assert (index_B < count).all()
        tokens_BT = np.repeat(index_B.astype(np.int32)[:, None] + base, 2, 1)
        return Batch(tokens_BT, tokens_BT + 1, np.ones(tokens_BT.shape, np.float32))

    return Rows(count, read)


MIXTURE = (
    WeightedRows("a", 3, table(40)),
    WeightedRows("b", 1, table(9, 1000)),
    WeightedRows("c", 2, table(7, 2000)),
)


def first_column(read, step: int, batch_size: int) -> list[int]:
    return read(step, 0, batch_size).tokens_BT[:, 0].tolist()


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


def test_an_epoch_visits_every_row_once_and_the_next_differs():
    read = make_train_rows((WeightedRows("a", 1, table(61)),), 1, seed=5)
    epochs = [[first_column(read, e * 61 + i, 1)[0] for i in range(61)] for e in range(4)]
    assert all(sorted(epoch) == list(range(61)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_batch_is_a_function_of_seed_and_step():
    one, other = (make_train_rows(MIXTURE, 12, seed) for seed in (0, 1))
    again = make_train_rows(MIXTURE, 12, 0)
    for step in (9, 0, 2**40):
        assert first_column(one, step, 12) == first_column(again, step, 12)
        assert first_column(one, step, 12) != first_column(other, step, 12)
    assert first_column(one, 3, 12) != first_column(one, 4, 12)


@pytest.mark.parametrize("sources", [MIXTURE, MIXTURE[:1]])
@pytest.mark.parametrize("step", [0, 3, 4, 12345])  # epochs of a end within step 3 or 4
def test_rows_in_pieces_are_the_whole_batch(sources, step):
    read = make_train_rows(sources, 12, seed=3)
    for cuts in ((0, 12), (0, 6, 12), (0, 3, 6, 9, 12), range(13)):
        pieces = [read(step, a, b) for a, b in pairwise(cuts)]
        assert_batches_equal(take_rows(pieces, np.arange(12)), read(step, 0, 12))


def test_each_source_of_a_mixture_has_epochs_of_its_own():
    read = make_train_rows(MIXTURE, 6, seed=1)
    seen = np.array([first_column(read, step, 6) for step in range(160)]).ravel()
    for source, base in zip(MIXTURE, (0, 1000, 2000), strict=True):
        count = source.rows.count
        own = seen[(seen >= base) & (seen < base + 1000)] - base
        assert len(own) == len(seen) * source.weight // 6
        epochs = own[: len(own) // count * count].reshape(-1, count)
        np.testing.assert_array_equal(
            np.sort(epochs, 1), np.tile(np.arange(count), (len(epochs), 1))
        )
        assert len(np.unique(epochs, axis=0)) > len(epochs) // 2


weights_lists = st.lists(st.integers(1, 60), min_size=1, max_size=6)


@given(weights=weights_lists, start=st.integers(0, 2**40))
@settings(deadline=None, max_examples=100)
def test_any_window_of_a_mixture_has_its_proportions(weights, start):
    total = sum(weights)
    source_B, within_B = interleave(np.arange(start, start + 3 * total, dtype=np.uint64), weights)
    for first in (0, 1, total // 2, total):
        window_B = source_B[first : first + total]
        assert np.bincount(window_B, minlength=len(weights)).tolist() == weights
    for number, weight in enumerate(weights):
        mine = source_B == number
        np.testing.assert_array_equal(np.diff(within_B[mine].astype(int)), 1)  # no row left out
        share = np.arange(1, len(mine) + 1) * weight / total
        assert abs(np.cumsum(mine) - share).max() < len(weights)  # evenly spread


def test_a_large_denominator_takes_no_memory():
    weights = [2**31 - 333_334, 333_333]
    source_B, within_B = interleave(np.arange(2**50, 2**50 + 100_000, dtype=np.uint64), weights)
    assert abs((source_B == 1).sum() - 100_000 * 333_333 / 2**31) <= 1
    assert abs(within_B[0] / 2**50 - 1) < 1e-3


def test_a_source_smaller_than_its_share_of_a_batch_is_refused():
    with pytest.raises(DataError, match=r"split of c fills 7 sequences, but a batch needs 8"):
        make_train_rows(MIXTURE, 24, seed=0)
    make_train_rows(MIXTURE, 21, seed=0)


@pytest.mark.parametrize("counts", [[5], [3, 0, 4], [1, 1, 1]])
def test_an_evaluation_reads_all_tables_once(counts):
    tables = [table(count, 100 * number) for number, count in enumerate(counts)]
    expected = [100 * n + i for n, count in enumerate(counts) for i in range(count)]
    num_batches, read = make_eval_batches(join_tables(tables), 4)
    batches = [read(number, 0, 4) for number in range(num_batches)]
    seen = [b.tokens_BT[b.weights_BT[:, 0] > 0, 0].tolist() for b in batches]
    assert [number for batch in seen for number in batch] == expected
    assert all(seen)  # no batch of padding alone
    pieces = take_rows([read(0, 0, 1), read(0, 1, 4)], np.arange(4))
    assert_batches_equal(pieces, batches[0])


def test_nothing_to_validate_on_gives_no_batch():
    assert make_eval_batches(join_tables([table(0), table(0)]), 4)[0] == 0


@pytest.mark.parametrize(
    ("first", "full", "steps"), [(4, 32, 30), (1, 2, 1), (8, 8, 0), (3, 96, 7)]
)
def test_a_ramp_is_linear_in_rows_wherever_it_doubles(first, full, steps):
    ramp = make_ramp(full, first, steps)
    sizes = [ramp.size(step) for step in range(steps + 5)]
    assert (sizes[0], sizes[-5:]) == (first, [full] * 5)
    assert set(sizes) <= {first << k for k in range(10)}
    seen = np.cumsum([0, *sizes])
    assert [ramp.before(step) for step in range(steps + 6)] == seen.tolist()
    for step in [step for step, (a, b) in enumerate(pairwise(sizes), 1) if a < b]:
        line = first + (full - first) * ramp.before(step) / ramp.before(steps)
        off = 2 * full / max(steps, 1)  # the borders are whole steps
        assert abs(sizes[step] - line) <= off * sizes[step] / first


def test_without_a_ramp_every_batch_is_full():
    ramp = make_ramp(6, 0, 0)
    assert ([ramp.size(step) for step in range(3)], ramp.before(5)) == ([6] * 3, 30)


def test_growing_batches_read_the_same_rows_one_after_the_other():
    ramp, read = make_ramp(12, 3, 4), make_train_rows(MIXTURE, 12, seed=2)
    grown = [read_batch(read, ramp, step, 0, ramp.size(step)) for step in range(6)]
    assert [len(batch.tokens_BT) for batch in grown] == [3, 3, 6, 6, 12, 12]
    found = np.concatenate([batch.tokens_BT[:, 0] for batch in grown])
    wanted = np.concatenate([first_column(read, step, 12) for step in range(4)])
    np.testing.assert_array_equal(found, wanted[: len(found)])
