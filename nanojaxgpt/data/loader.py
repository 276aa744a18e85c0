"""In: token ids and a span of them. Out: batches, each a pure function of its place.

Dimensions: B rows, T tokens of a row.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from nanojaxgpt.errors import DataError


class Batch(NamedTuple):
    """Rows of tokens with the tokens that follow them.

    Where `segments_BT` is None a row is one segment; where `positions_BT` is None they are 0..T-1.
    """

    tokens_BT: np.ndarray  # int32
    targets_BT: np.ndarray  # int32
    weights_BT: np.ndarray  # float32; 0: this target is padding
    segments_BT: np.ndarray | None = None  # int32
    positions_BT: np.ndarray | None = None  # int32


ReadRows = Callable[[int, int, int], Batch]


def make_train_rows(
    tokens: np.ndarray, span: tuple[int, int], seq_len: int, batch_size: int, seed: int
) -> ReadRows:
    """Return `read(step, first_row, last_row)`: rows [first_row, last_row) of that step's batch.

    In every epoch the span is cut, at another offset, into windows of `seq_len`, and each window is
    visited once, in another order; both follow from `seed` and the epoch, so that a batch depends
    on nothing but (seed, step). Raises DataError where the span is shorter than a batch.
    """
    start, stop = span
    num_windows = (stop - start - seq_len) // seq_len  # one less than would fit: room for offsets
    if num_windows < batch_size:
        raise DataError(
            f"the training split has {stop - start:,} tokens, but {batch_size} sequences of "
            f"{seq_len} need {(batch_size + 1) * seq_len:,}; use more text, "
            "or a smaller train.batch_size or model.seq_len"
        )
    windows = np.lib.stride_tricks.sliding_window_view(tokens[start:stop], seq_len + 1)

    def read(step: int, first_row: int, last_row: int) -> Batch:
        position_B = step * batch_size + np.arange(first_row, last_row, dtype=np.uint64)
        epoch_B, index_B = np.divmod(position_B, np.uint64(num_windows))
        key_B = hash_words(seed, epoch_B)
        offset_B = hash_words(key_B, 0) % np.uint64(seq_len)
        window_B = permute(index_B, num_windows, key_B)
        rows_BT = windows[offset_B + window_B * np.uint64(seq_len)].astype(np.int32)
        weights_BT = np.ones((len(rows_BT), seq_len), np.float32)
        return Batch(rows_BT[:, :-1], rows_BT[:, 1:], weights_BT)

    return read


def make_eval_batches(
    tokens: np.ndarray, span: tuple[int, int], seq_len: int, batch_size: int
) -> tuple[int, ReadRows]:
    """Return the number of batches and `read(batch_index, first_row, last_row)`.

    Together they score every token of the span but its first exactly once; what is missing from
    the last batch has weight 0. A span of fewer than two tokens gives no batch.
    """
    start, stop = span
    num_windows = math.ceil(max(stop - start - 1, 0) / seq_len)

    def read(batch_index: int, first_row: int, last_row: int) -> Batch:
        window_B = batch_index * batch_size + np.arange(first_row, last_row)
        index_BT = start + window_B[:, None] * seq_len + np.arange(seq_len + 1)
        rows_BT = tokens[np.minimum(index_BT, stop - 1)].astype(np.int32)
        weights_BT = (index_BT[:, 1:] < stop).astype(np.float32)
        return Batch(rows_BT[:, :-1], rows_BT[:, 1:], weights_BT)

    return math.ceil(num_windows / batch_size), read


NUM_ROUNDS = 4


def permute(index_B: np.ndarray, size: int, key_B: np.ndarray) -> np.ndarray:
    """Return where a random permutation of `size` numbers takes each index; uint64 in and out.

    A Feistel network on a rectangle of at least `size` cells: each round shifts the row by a hash
    of the column and then the column by a hash of the row, which can be undone, so that no two
    cells meet. Cells past `size` walk on until they are inside (Black and Rogaway 2002).
    """
    columns = math.isqrt(size - 1) + 1
    rows, columns = np.uint64(-(-size // columns)), np.uint64(columns)

    def shift(cell_B: np.ndarray, key_B: np.ndarray) -> np.ndarray:
        row_B, column_B = np.divmod(cell_B, columns)
        for turn in range(1, 2 * NUM_ROUNDS, 2):
            row_B = (row_B + hash_words(key_B, turn, column_B) % rows) % rows
            column_B = (column_B + hash_words(key_B, turn + 1, row_B) % columns) % columns
        return row_B * columns + column_B

    cell_B = shift(index_B, key_B)
    while (outside_B := cell_B >= size).any():
        cell_B[outside_B] = shift(cell_B[outside_B], key_B[outside_B])
    return cell_B


def hash_words(*words: int | np.ndarray) -> np.ndarray:
    """Return a uint64 hash of the words, elementwise, after SplitMix64 (Steele et al. 2014)."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = (state ^ word) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state
