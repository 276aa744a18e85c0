"""Windows and packed documents: every target once, none across a border, losses as if alone."""

from typing import NamedTuple

import jax
import numpy as np
import pytest
from conftest import allocates_at_most, random_tokens, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from nanojaxgpt.data.packing import cover_rows, packed_rows, plan_rows, wrap_rows
from nanojaxgpt.data.rows import WeightedRows, make_eval_batches, make_train_rows
from nanojaxgpt.model.transformer import Transformer, init_params


class ArrayStore(NamedTuple):
    """What a table needs of a store."""

    tokens: np.ndarray
    document_starts: np.ndarray

    @property
    def num_tokens(self):
        return len(self.tokens)

    def read(self, starts_B, length):
        assert starts_B.min() >= 0
        assert starts_B.max() + length <= len(self.tokens)
        return self.tokens[starts_B[:, None] + np.arange(length)]


def numbered(*lengths: int) -> ArrayStore:
    """Return documents of these lengths, in which each token tells its own position."""
    ends = np.cumsum(lengths)
    return ArrayStore(np.arange(ends[-1], dtype=np.uint16), ends - lengths)


PLAIN = numbered(10_000)


def read_all(rows):
    """Return every row of a table as one batch."""
    index_B = np.arange(rows.count, dtype=np.uint64)
    return rows.read(index_B, np.zeros_like(index_B))


@pytest.mark.parametrize("make_rows", [wrap_rows, cover_rows, packed_rows])
def test_a_table_is_as_small_as_its_data_for_any_seq_len(make_rows):
    with allocates_at_most(2**20):  # an array of one float32 for each place has 38 MiB
        assert make_rows(numbered(1000), (0, 1000), 10_000_000).count in (0, 1)


def test_targets_follow_tokens_inside_the_span():
    read = make_train_rows((WeightedRows("a", 1, wrap_rows(PLAIN, (100, 9_000), 16)),), 8, seed=0)
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


def test_windows_begin_at_another_offset_in_each_epoch():
    seq_len, length = 16, 1_000
    rows = wrap_rows(PLAIN, (50, 50 + length), seq_len)
    assert rows.count == (length - seq_len) // seq_len
    read = make_train_rows((WeightedRows("a", 1, rows),), 1, seed=5)
    epochs = []
    for epoch in range(8):
        steps = range(epoch * rows.count, (epoch + 1) * rows.count)
        epochs.append(sorted(int(read(step, 0, 1).tokens_BT[0, 0]) for step in steps))
        assert np.diff(epochs[-1]).tolist() == [seq_len] * (rows.count - 1)
    offsets = [starts[0] - 50 for starts in epochs]
    assert len(set(offsets)) > 3
    assert min(offsets) >= 0
    assert max(offsets) < seq_len


def test_every_offset_fits_the_smallest_span():
    seq_len, batch_size = 7, 3
    stop = (batch_size + 1) * seq_len
    rows = wrap_rows(numbered(stop), (0, stop), seq_len)
    read = make_train_rows((WeightedRows("a", 1, rows),), batch_size, seed=0)
    targets = np.array([read(step, 0, batch_size).targets_BT for step in range(200)])
    assert targets.max() == stop - 1  # the largest offset was met
    assert wrap_rows(PLAIN, (0, stop - 1), seq_len).count == batch_size - 1
    assert wrap_rows(PLAIN, (0, 3), seq_len).count == 0


@pytest.mark.parametrize("length", [2, 3, 16, 17, 18, 33, 128, 129, 130, 1000])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_eval_target_is_scored_once(length, batch_size):
    store = numbered(40 + length)
    num_batches, read = make_eval_batches(cover_rows(store, (40, 40 + length), 16), batch_size)
    scored = []
    for number in range(num_batches):
        batch = read(number, 0, batch_size)
        assert batch.tokens_BT.shape == (batch_size, 16)
        real = batch.weights_BT == 1
        assert ((batch.weights_BT == 0) | real).all()
        np.testing.assert_array_equal(batch.targets_BT[real], batch.tokens_BT[real] + 1)
        scored += batch.targets_BT[real].tolist()
    assert scored == list(range(41, 40 + length))


@pytest.mark.parametrize("length", [0, 1])
@pytest.mark.parametrize("table", [cover_rows, packed_rows])
def test_nothing_to_score_gives_no_row(table, length):
    assert table(PLAIN, (5, 5 + length), 16).count == 0


def check_packed(store, span, seq_len) -> float:
    """Check every row of a packed span; return the share of padding."""
    rows = packed_rows(store, span, seq_len)
    begins = store.document_starts
    first = {*begins.tolist(), span[0]}
    expected = [target for target in range(*span) if target not in first]
    if not expected:
        assert rows.count == 0
        return 0.0
    batch = read_all(rows)
    real = batch.weights_BT == 1
    np.testing.assert_array_equal(real, batch.segments_BT > 0)
    assert ((batch.weights_BT == 0) | real).all()
    for field in (batch.tokens_BT, batch.targets_BT, batch.positions_BT):
        assert not field[~real].any()
    np.testing.assert_array_equal(batch.targets_BT[real], batch.tokens_BT[real] + 1)
    assert sorted(batch.targets_BT[real].tolist()) == expected
    for tokens_T, segments_T, positions_T in zip(
        batch.tokens_BT, batch.segments_BT, batch.positions_BT, strict=True
    ):
        numbers = segments_T[segments_T > 0]
        np.testing.assert_array_equal(segments_T[: len(numbers)], numbers)  # padding comes last
        assert set(np.diff(numbers, prepend=0).tolist()) <= {0, 1}
        for number in range(1, numbers.max() + 1):
            piece = tokens_T[segments_T == number]
            np.testing.assert_array_equal(np.diff(piece), 1)
            np.testing.assert_array_equal(positions_T[segments_T == number], np.arange(len(piece)))
            assert len({int(np.searchsorted(begins, token, "right")) for token in piece}) == 1
    return 1 - real.mean()


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    seq_len=st.integers(1, 20),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@settings(deadline=None, max_examples=150)
def test_packed_targets_come_once_and_never_cross_a_border(lengths, seq_len, cut):
    start, stop = sorted(int(part * sum(lengths)) for part in cut)
    check_packed(numbered(*lengths), (start, stop), seq_len)


def test_packing_wastes_little_and_stays_local():
    lengths = np.random.default_rng(0).lognormal(3, 1, 5_000).astype(int) + 2
    store = ArrayStore(np.arange(lengths.sum()), np.cumsum(lengths) - lengths)
    assert check_packed(store, (0, int(lengths.sum())), 128) < 0.02
    plan = plan_rows(store.document_starts, (0, int(lengths.sum())), 128)
    spread = [
        np.ptp(plan.start_P[a:b]) for a, b in zip(plan.borders, plan.borders[1:], strict=False)
    ]
    assert max(spread) < lengths.sum() / 3


def test_packed_losses_are_those_of_the_documents_alone():
    lengths = [5, 30, 2, 9, 17, 1, 12, 3, 8]
    ends = np.cumsum(lengths)
    store = ArrayStore(random_tokens(int(ends[-1])), ends - lengths)
    batch = read_all(packed_rows(store, (0, int(ends[-1])), 16))
    assert batch.segments_BT.max() > 1
    cfg = small_model(num_layers=1)
    model, params = Transformer(cfg), init_params(cfg, jax.random.key(0))

    def losses(tokens_BT, targets_BT, *context):
        logits_BTV, _ = jax.jit(model.apply)({"params": params}, tokens_BT, *context)
        return -np.take_along_axis(
            np.asarray(jax.nn.log_softmax(logits_BTV)), targets_BT[..., None], -1
        )[..., 0]

    packed_BT = losses(batch.tokens_BT, batch.targets_BT, batch.positions_BT, batch.segments_BT)
    blind_BT = losses(batch.tokens_BT, batch.targets_BT)
    real = batch.weights_BT > 0
    row_P, place_P = np.nonzero(real & (batch.positions_BT == 0))
    tokens, targets = np.zeros((2, len(row_P), 16), np.int32)
    for number, (row, first) in enumerate(zip(row_P, place_P, strict=True)):
        tokens[number, : 16 - first] = batch.tokens_BT[row, first:]  # what follows is never seen
        targets[number, : 16 - first] = batch.targets_BT[row, first:]
    document_of, place = np.cumsum(batch.positions_BT[real] == 0) - 1, batch.positions_BT[real]
    alone = losses(tokens, targets)[document_of, place]
    assert abs(blind_BT[real] - alone).max() > 1e-3  # without segments they would differ
    np.testing.assert_allclose(packed_BT[real], alone, atol=1e-5)
