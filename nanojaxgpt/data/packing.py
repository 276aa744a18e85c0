"""In: a token store and a span of it. Out: tables of rows, cut from the stream or packed.

Dimensions: B rows, T tokens of a row, P pieces of documents.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from nanojaxgpt.data.rows import Batch, Rows, hash_words
from nanojaxgpt.data.store import Span, Store

GROUP = 1024  # successive pieces that share rows: planning is linear, and reading stays local


def wrap_rows(store: Store, span: Span, seq_len: int) -> Rows:
    """Return the span cut into windows of `seq_len`, at another offset in each epoch."""
    start, stop = span
    count = max((stop - start - seq_len) // seq_len, 0)  # one less than would fit: for the offsets

    def read(index_B: np.ndarray, key_B: np.ndarray) -> Batch:
        offset_B = hash_words(key_B, 0) % np.uint64(seq_len)
        start_B = (index_B * np.uint64(seq_len) + offset_B).astype(np.int64) + start
        rows_BT = store.read(start_B, seq_len + 1).astype(np.int32)
        weights_BT = np.broadcast_to(np.float32(1), (len(rows_BT), seq_len))
        return Batch(rows_BT[:, :-1], rows_BT[:, 1:], weights_BT)

    return Rows(count, read)


def cover_rows(store: Store, span: Span, seq_len: int) -> Rows:
    """Return windows that score every token of the span but its first exactly once.

    A span of fewer than two tokens gives no row.
    """
    start, stop = span
    length = min(seq_len + 1, stop - start)

    def read(index_B: np.ndarray, key_B: np.ndarray) -> Batch:
        start_B = start + index_B.astype(np.int64) * seq_len
        first_B = np.minimum(start_B, stop - length)  # the last window begins too early
        column_BT = (start_B - first_B)[:, None] + np.arange(seq_len + 1)
        rows_BT = store.read(first_B, length).astype(np.int32)
        rows_BT = np.take_along_axis(rows_BT, np.minimum(column_BT, length - 1), axis=1)
        weights_BT = (column_BT[:, 1:] < length).astype(np.float32)
        return Batch(rows_BT[:, :-1], rows_BT[:, 1:], weights_BT)

    return Rows(math.ceil(max(stop - start - 1, 0) / seq_len), read)


class RowPlan(NamedTuple):
    """Which pieces of documents stand in which row; a piece of n tokens takes n - 1 places."""

    borders: np.ndarray  # int64 [rows + 1]: row r holds the pieces [borders[r], borders[r + 1])
    start_P: np.ndarray  # int64: a piece's first token in the store
    places_P: np.ndarray  # int32: the targets it is scored on
    documents_P: np.ndarray | None = None  # int32: of preferences, a piece's number in the store
    labels_P: np.ndarray | None = None  # int32: of labelled texts, the last target of a piece


class Fit(NamedTuple):
    """How a span's examples fit rows of a length."""

    plan: RowPlan
    num_examples: int
    dropped: int
    cut: int


def packed_rows(store: Store, span: Span, seq_len: int) -> Rows:
    """Return the span's documents packed into rows; a segment is a document or a piece of one.

    Every target inside a document is scored exactly once, and none crosses a border.
    """
    return planned_rows(store, plan_rows(store.document_starts, span, seq_len), seq_len)


def planned_rows(store: Store, plan: RowPlan, seq_len: int, weighted: bool = False) -> Rows:
    """Return the rows of a plan; with `weighted` targets have the weights of the store."""
    count_T = np.arange(plan.places_P.max(initial=0))

    def read(index_B: np.ndarray, key_B: np.ndarray) -> Batch:
        first_B, last_B = plan.borders[index_B], plan.borders[index_B + np.uint64(1)]
        count_B = last_B - first_B
        piece_P = count_up(first_B, count_B)
        places_P = plan.places_P[piece_P]
        used_P = np.cumsum(places_P, dtype=np.int64) - places_P  # by the pieces before this one
        row_start_B = np.arange(len(index_B)) * seq_len - used_P[np.cumsum(count_B) - count_B]
        first_P = used_P + np.repeat(row_start_B, count_B)
        segment_P = count_up(np.ones_like(count_B), count_B)
        fields = np.zeros((4, len(index_B) * seq_len), np.int32)
        tokens, targets, segments, positions = fields
        # A loop over slices: to index every token takes up to 7 times as long.
        pieces = plan.start_P[piece_P], places_P
        for piece, row in read_pieces(store.read, store.num_tokens, *pieces):
            first, size = int(first_P[piece]), len(row) - 1
            tokens[first : first + size] = row[:-1]
            targets[first : first + size] = row[1:]
            segments[first : first + size] = segment_P[piece]
            positions[first : first + size] = count_T[:size]
        tokens_BT, targets_BT, segments_BT, positions_BT = fields.reshape(4, -1, seq_len)
        weights_BT, documents_BT = (segments_BT > 0).astype(np.float32), None
        if plan.labels_P is not None:
            last_P = first_P + places_P - 1
            targets[last_P] = plan.labels_P[piece_P]
            weights_BT = np.zeros_like(weights_BT)
            weights_BT.ravel()[last_P] = 1
        elif weighted:
            weights = weights_BT.ravel()
            for piece, row in read_pieces(store.read_weights, store.num_tokens, *pieces):
                weights[int(first_P[piece]) :][: len(row) - 1] = row[1:]
        if plan.documents_P is not None:
            documents = np.full(len(index_B) * seq_len, -1, np.int32)
            documents[count_up(first_P, places_P)] = np.repeat(plan.documents_P[piece_P], places_P)
            documents_BT = documents.reshape(-1, seq_len)
        return Batch(tokens_BT, targets_BT, weights_BT, segments_BT, positions_BT, documents_BT)

    return Rows(len(plan.borders) - 1, read)


def read_pieces(
    read: Callable[[np.ndarray, int], np.ndarray],
    num_tokens: int,
    start_P: np.ndarray,
    places_P: np.ndarray,
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number, tokens) of each piece, one more token than it has places, in any order.

    `read` gives windows of one length: pieces are read by powers of two, in a few calls.
    """
    length_P = 2 ** np.ceil(np.log2(places_P + 1)).astype(np.int64)
    length_P = np.minimum(length_P, num_tokens)
    for length in np.unique(length_P):
        chosen = np.flatnonzero(length_P == length)
        first_P = np.minimum(start_P[chosen], num_tokens - length)  # there the store ends
        skipped_P = start_P[chosen] - first_P
        ends_P = skipped_P + places_P[chosen] + 1
        windows = read(first_P, int(length))
        numbers = zip(chosen.tolist(), skipped_P.tolist(), ends_P.tolist(), strict=True)
        for window, (piece, skipped, end) in zip(windows, numbers, strict=True):
            yield piece, window[skipped:end]


def plan_rows(document_starts: np.ndarray, span: Span, seq_len: int) -> RowPlan:
    """Return how the documents of the span are packed into rows of `seq_len` places.

    A document with more targets than that is cut, so that its pieces share one token. In each
    group of successive pieces the longest come first, and each goes to the first row where it fits.
    """
    start_P, places_P = cut_documents(document_starts, span, seq_len)
    order_P, borders = order_pieces(places_P, seq_len)
    return RowPlan(borders, start_P[order_P], places_P[order_P])


def order_pieces(places_P: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pieces' numbers row by row, and where each row begins among them, and the end."""
    row_P = first_fit(places_P, seq_len)
    order_P = np.argsort(row_P, kind="stable")
    _, first = np.unique(row_P[order_P], return_index=True)
    return order_P, np.append(first, len(row_P)).astype(np.int64)


def plan_examples(store: Store, span: Span, seq_len: int, overlong: str) -> Fit:
    """Return how the examples of the span are packed into rows of `seq_len` places.

    One that is too long is dropped, or with `overlong="cut"` loses its end, though not its label,
    and is dropped only if nothing to train on is left. The two documents of a preference stand
    side by side in one row, and are dropped where they don't fit it together.
    """
    kind, start_D = store.examples["kind"], store.document_starts
    first, last = np.searchsorted(start_D, span)
    start_D = start_D[first:last]
    number_D = np.arange(first, last, dtype=np.int32)
    places_D = (np.diff(np.append(start_D, span[1])) - 1).astype(np.int32)
    per = 2 if kind == "preferences" else 1
    places_X = places_D.reshape(-1, per).sum(1, dtype=np.int32)
    kept_X = places_X <= seq_len
    cut = 0
    if overlong == "cut" and per == 1:
        long = np.flatnonzero(~kept_X)
        for number in long.tolist():
            trained = kind == "labels" or store.read_weights(start_D[[number]], seq_len + 1)[0, 1:]
            kept_X[number] = np.any(trained)
        cut = int(kept_X[long].sum())
        places_D = np.minimum(places_D, seq_len)
        places_X = places_D
    order_X, borders = order_pieces(places_X[kept_X], seq_len)
    pieces = np.arange(len(places_D)).reshape(-1, per)[kept_X][order_X].ravel()
    labels = None
    if kind == "labels":
        end_P = np.append(start_D[1:], span[1])[pieces]
        labels = store.read(end_P - 1, 1)[:, 0].astype(np.int32)
    documents = number_D[pieces] if kind == "preferences" else None
    plan = RowPlan(borders * per, start_D[pieces], places_D[pieces], documents, labels)
    return Fit(plan, len(kept_X), int((~kept_X).sum()), cut)


def cut_documents(
    document_starts: np.ndarray, span: Span, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the first token of each piece (int64) and how many targets it has (int32)."""
    start, stop = span
    inside = document_starts[(document_starts > start) & (document_starts < stop)]
    borders = np.concatenate([[start], inside, [stop]]).astype(np.int64)
    num_targets = np.maximum(np.diff(borders) - 1, 0)
    num_pieces = -(-num_targets // seq_len)
    piece_P = count_up(np.zeros_like(num_pieces), num_pieces)
    start_P = np.repeat(borders[:-1], num_pieces) + piece_P * seq_len
    left_P = np.repeat(num_targets, num_pieces) - piece_P * seq_len
    return start_P, np.minimum(left_P, seq_len).astype(np.int32)


def first_fit(places_P: np.ndarray, seq_len: int) -> np.ndarray:
    """Return the row of each piece, int64; rows of different groups are far apart.

    All groups place their next piece at once, so that a million pieces take a second.
    """
    num_groups = -(-len(places_P) // GROUP)
    places = np.zeros(num_groups * GROUP, np.int32)
    places[: len(places_P)] = places_P
    places = places.reshape(num_groups, GROUP)
    order = np.argsort(-places, axis=1, kind="stable")
    # Any two rows of a first fit together hold more than one row's places.
    most = min(GROUP, 2 * int(places.sum(1, dtype=np.int64).max(initial=0)) // seq_len + 2)
    free, group = np.full((num_groups, most), seq_len, np.int32), np.arange(num_groups)
    row = np.zeros_like(places, dtype=np.int64)
    for chosen in order.T:
        needed = places[group, chosen]
        fit = np.argmax(free >= needed[:, None], axis=1)
        free[group, fit] -= needed
        row[group, chosen] = fit
    return (row + group[:, None] * GROUP).ravel()[: len(places_P)]


def count_up(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Return start, start + 1, ... for each of the lengths, one after the other."""
    offset = np.cumsum(length) - length
    return np.repeat(start - offset, length) + np.arange(int(length.sum()))
