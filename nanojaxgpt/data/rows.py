"""In: tables of rows and a seed. Out: which row stands at which place, as a pure function of it.

Dimensions: B rows, T tokens of a row. Places and indices are uint64 arrays.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from nanojaxgpt.errors import DataError

Array = Any  # of NumPy while it is read, of jax when it is on the devices


class Batch(NamedTuple):
    """Rows of tokens with the tokens that follow them.

    Where `segments_BT` is None a row is one segment; where `positions_BT` is None they are 0..T-1.
    """

    tokens_BT: Array  # int32
    targets_BT: Array  # int32
    weights_BT: Array  # float32; 0: this target is not scored
    segments_BT: Array | None = None  # int32; 1, 2, ... in each row, 0: padding
    positions_BT: Array | None = None  # int32; they restart with each segment
    documents_BT: Array | None = None  # int32; of preferences: a document's number, -1: padding
    # float32; of preferences: the segment's log-probability by the reference model, at each place
    reference_BT: Array | None = None


# (step, first_row, last_row) -> the rows [first_row, last_row) of that step's batch.
ReadRows = Callable[[int, int, int], Batch]


class Rows(NamedTuple):
    """A table of `count` rows: `read(index_B, key_B)` gives the rows of these numbers.

    `key_B` differs from epoch to epoch, for a table that is cut anew in each.
    """

    count: int
    read: Callable[[np.ndarray, np.ndarray], Batch]


class WeightedRows(NamedTuple):
    """A table to train on, and how many of `sum(weights)` successive rows come from it."""

    name: str
    weight: int
    rows: Rows


class Ramp(NamedTuple):
    """The sizes of a run's batches: `first` rows, doubled until they are `full` from `steps` on.

    Every doubling takes as many steps as the one before. So the sizes are those of a ramp that is
    linear in tokens (Brown 2020), wherever that reaches a doubling; few sizes, for each one is a
    compiled program.
    """

    first: int
    full: int
    steps: int

    def stages(self) -> list[tuple[int, int]]:
        """Return (step, rows): from which 0-based step on batches have how many rows."""
        doublings = (self.full // self.first).bit_length() - 1
        begins = [-(-self.steps * k // doublings) for k in range(1, doublings + 1)]
        return [(begin, self.first << k) for k, begin in enumerate([0, *begins])]

    def size(self, step: int) -> int:
        """Return how many rows the batch of a 0-based step has."""
        return [rows for begin, rows in self.stages() if begin <= step][-1]

    def before(self, step: int) -> int:
        """Return how many rows all the batches before a 0-based step have."""
        begins, sizes = zip(*self.stages(), strict=True)
        ends = [*begins[1:], math.inf]
        spans = zip(begins, ends, sizes, strict=True)
        return sum(rows * max(0, min(step, end) - begin) for begin, end, rows in spans)


def make_ramp(full: int, first: int = 0, steps: int = 0) -> Ramp:
    """Return the ramp of the config's fields; without `first` all batches are `full`."""
    return Ramp(first, full, steps) if first else Ramp(full, full, 0)


def read_batch(read: ReadRows, ramp: Ramp, step: int, first_row: int, last_row: int) -> Batch:
    """Return rows [first_row, last_row) of a step's batch, where batches grow by a ramp."""
    before = ramp.before(step)
    return read(0, before + first_row, before + last_row)


def make_train_rows(sources: tuple[WeightedRows, ...], batch_size: int, seed: int) -> ReadRows:
    """Return `read(step, first_row, last_row)`: rows [first_row, last_row) of that step's batch.

    In every epoch of a source each of its rows is visited once, in another order, which follows
    from `seed`, the source's number and the epoch: a batch depends on nothing but (seed, step).
    Raises DataError where a source has fewer rows than it gives to one batch.
    """
    weights = [source.weight for source in sources]
    for source in sources:
        needed = -(-batch_size * source.weight // sum(weights))
        if source.rows.count < needed:
            raise DataError(
                f"the training split of {source.name} fills {source.rows.count:,} sequences, but a "
                f"batch needs {needed:,}; use more data, or a smaller train.batch_size or "
                "model.seq_len"
            )
    if len(sources) == 1:
        return lambda step, first_row, last_row: read_shuffled(
            sources[0].rows, places(step, batch_size, first_row, last_row), seed
        )
    seeds = [int(hash_words(seed, number)[0]) for number in range(len(sources))]

    def read(step: int, first_row: int, last_row: int) -> Batch:
        source_B, place_B = interleave(places(step, batch_size, first_row, last_row), weights)
        return gather(
            source_B,
            lambda number, chosen: read_shuffled(
                sources[number].rows, place_B[chosen], seeds[number]
            ),
        )

    return read


def make_eval_batches(rows: Rows, batch_size: int) -> tuple[int, ReadRows]:
    """Return the number of batches and `read(batch_index, first_row, last_row)`.

    Together they hold every row once; the rows missing from the last batch have weight 0.
    """

    def read(batch_index: int, first_row: int, last_row: int) -> Batch:
        index_B = places(batch_index, batch_size, first_row, last_row)
        batch = rows.read(np.minimum(index_B, np.uint64(rows.count - 1)), np.zeros_like(index_B))
        return batch._replace(weights_BT=batch.weights_BT * (index_B < rows.count)[:, None])

    return math.ceil(rows.count / batch_size), read


def join_tables(tables: list[Rows]) -> Rows:
    """Return the table of all tables' rows, one table after the other."""
    borders = np.cumsum([0, *(rows.count for rows in tables)]).astype(np.uint64)

    def read(index_B: np.ndarray, key_B: np.ndarray) -> Batch:
        return gather(
            np.searchsorted(borders, index_B, side="right") - 1,
            lambda number, chosen: tables[number].read(
                index_B[chosen] - borders[number], key_B[chosen]
            ),
        )

    return tables[0] if len(tables) == 1 else Rows(int(borders[-1]), read)


def gather(table_B: np.ndarray, read: Callable[[int, np.ndarray], Batch]) -> Batch:
    """Return rows of several tables in order; `read(table, chosen)` gives those of one table."""
    numbers = np.unique(table_B)
    chosen = [np.flatnonzero(table_B == number) for number in numbers]
    parts = [read(int(number), rows) for number, rows in zip(numbers, chosen, strict=True)]
    return take_rows(parts, np.argsort(np.concatenate(chosen)))


def take_rows(parts: list[Batch], order_B: np.ndarray) -> Batch:
    """Return the rows of all parts, one part after the other, in this order."""
    fields = zip(*parts, strict=True)
    return Batch(*(None if f[0] is None else np.concatenate(f)[order_B] for f in fields))


def places(step: int, batch_size: int, first_row: int, last_row: int) -> np.ndarray:
    """Return where rows [first_row, last_row) of a step's batch stand among all rows ever read."""
    return np.arange(step * batch_size + first_row, step * batch_size + last_row, dtype=np.uint64)


def read_shuffled(rows: Rows, place_B: np.ndarray, seed: int) -> Batch:
    """Return the rows at these places of the endless row of epochs, each in an order of its own."""
    epoch_B, index_B = np.divmod(place_B, np.uint64(rows.count))
    key_B = hash_words(seed, epoch_B)
    return rows.read(permute(index_B, rows.count, key_B), key_B)


def interleave(place_B: np.ndarray, weights: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the source of each place, and its place among the rows of that source.

    Any `sum(weights)` successive places hold each source exactly `weight` times, evenly spread:
    the first source takes place p wherever floor(p * share) grows, the second does the same among
    the places that are left, and so on. The sum of the weights is at most 2^31.
    """
    left = sum(weights)
    cycle_B, place_B = np.divmod(place_B, np.uint64(left))
    source_B, within_B = np.zeros(len(place_B), np.int64), np.zeros_like(place_B)
    open_B = np.ones(len(place_B), bool)
    for number, weight in enumerate(weights):
        whole, part = np.uint64(left), np.uint64(weight)
        before_B = place_B * part // whole
        taken_B = open_B & ((place_B + np.uint64(1)) * part // whole > before_B)
        source_B[taken_B] = number
        within_B[taken_B] = cycle_B[taken_B] * part + before_B[taken_B]
        open_B &= ~taken_B
        place_B, left = place_B - before_B, left - weight
    return source_B, within_B


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
