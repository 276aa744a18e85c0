"""In: the data of a run and a step. Out: text in which a person sees what the model sees there."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from nanojaxgpt.data.examples import describe_facts
from nanojaxgpt.data.loader import RunData
from nanojaxgpt.data.packing import plan_examples
from nanojaxgpt.data.rows import (
    Batch,
    Ramp,
    WeightedRows,
    interleave,
    make_eval_batches,
    make_train_rows,
    places,
    read_batch,
)
from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.errors import DataError

LEGEND = """
Each line is a position: segment, position in it, input token -> target token, and the target's
weight in the loss."""
BAR = 40  # characters of the longest bar of a histogram


def show_examples(data: RunData, seq_len: int, overlong: str) -> Iterator[str]:
    """Yield what the sources of examples hold: what is trained on, how long they are, what fits."""
    for name, store in data.examples:
        yield f"{name}: {describe_facts(store.examples, store.num_tokens)}"
        starts = np.append(store.document_starts, store.num_tokens)
        lengths = np.diff(starts)
        if store.examples["kind"] == "preferences":
            lengths = lengths.reshape(-1, 2).sum(1)
        fit = plan_examples(store, (0, store.num_tokens), seq_len, overlong)
        yield (f"  {fit.num_examples:,} examples of {lengths.min():,} to {lengths.max():,} tokens, "
               f"mean {lengths.mean():,.1f}")  # fmt: skip
        yield f"  at model.seq_len={seq_len}, {fit.dropped:,} are dropped and {fit.cut:,} cut"
        yield from histogram(lengths)
        yield ""


def histogram(lengths: np.ndarray) -> Iterator[str]:
    """Yield a line for each doubling of the length: how many there are, and a bar."""
    doublings = np.ceil(np.log2(lengths)).astype(int)
    counts = np.bincount(doublings)
    for doubling in range(doublings.min(), len(counts)):
        bar = "#" * -(-BAR * counts[doubling] // counts.max())
        yield f"  up to {2**doubling:>7,} tokens {counts[doubling]:>9,} {bar}".rstrip()


def show_step(
    data: RunData, split: str, step: int, seq_len: int, ramp: Ramp, seed: int, rows: int
) -> Iterator[str]:
    """Yield lines about the batch of a step, and its first `rows` rows in full.

    Steps count from 1, as in the log of a run; with `split="validation"` they are the batches of
    an evaluation. Raises DataError where there is no such batch.
    """
    counts, batch_size = Counter(), ramp.size(step - 1)
    if split == "train":
        sources = data.train(seq_len)
        read = make_train_rows(sources, ramp.full, seed)
        counts = count_sources(sources, ramp.before(step - 1), batch_size)
    else:
        table = data.validation(seq_len)
        num_batches, read = make_eval_batches(table, batch_size)
        if step > num_batches:
            raise DataError(f"the validation split has only {num_batches} batches, not {step}")
        batch_size = min(batch_size, table.count - (step - 1) * batch_size)  # the last is smaller
    batch = read_batch(read, ramp, step - 1, 0, batch_size)
    yield f"{split}, step {step}: {batch_size} rows of {seq_len} positions"
    yield from describe_batch(batch)
    for name, count in counts.items():
        yield f"  from {name}: {count} rows"
    yield LEGEND
    for row in range(min(rows, batch_size)):
        yield ""
        yield from show_row(batch, row, data.tokenizer, data.labels)


def count_sources(sources: tuple[WeightedRows, ...], before: int, batch_size: int) -> Counter[str]:
    """Return how many rows of a batch come from each source; `before` are those read before it."""
    weights = [source.weight for source in sources]
    source_B, _ = interleave(places(0, batch_size, before, before + batch_size), weights)
    return Counter({s.name: int((source_B == n).sum()) for n, s in enumerate(sources)})


def segments(batch: Batch) -> np.ndarray:
    """Return the batch's segments; where it has none, a row is one."""
    return np.ones_like(batch.tokens_BT) if batch.segments_BT is None else batch.segments_BT


def describe_batch(batch: Batch) -> Iterator[str]:
    """Yield the counts of a batch."""
    segments_BT, scored = segments(batch), int((batch.weights_BT > 0).sum())
    padding, size = int((segments_BT == 0).sum()), batch.tokens_BT.size
    yield f"  tokens: {size - padding:,}, padding: {padding:,} ({padding / size:.1%})"
    yield f"  scored targets: {scored:,} ({scored / size:.1%})"
    yield f"  segments: {int(segments_BT.max(axis=1).sum()):,}"


def show_row(
    batch: Batch, row: int, tokenizer: Tokenizer, labels: tuple[str, ...] = ()
) -> Iterator[str]:
    """Yield one row: each of its segments as text and then place by place."""
    segment_T, weight_T = segments(batch)[row], batch.weights_BT[row]
    positions_BT = batch.positions_BT
    position_T = np.arange(len(segment_T)) if positions_BT is None else positions_BT[row]
    borders = [0, *(np.flatnonzero(np.diff(segment_T)) + 1).tolist(), len(segment_T)]
    tokens_T, targets_T = batch.tokens_BT[row], batch.targets_BT[row]
    for first, last in pairwise(borders):
        segment = segment_T[first]
        if not segment:
            scored = int((weight_T[first:last] > 0).sum())
            yield f"-- row {row}, padding: {last - first} positions, {scored} of them scored"
            continue
        text = show_text(tokenizer, tokens_T[first:last])
        which = ("rejected", "chosen")[segment % 2] + ", " if batch.documents_BT is not None else ""
        yield f"-- row {row}, segment {segment}: {which}{last - first} positions, {text}"
        for place in range(first, last):
            token = show_token(tokenizer, int(tokens_T[place]))
            target = show_token(tokenizer, int(targets_T[place]))
            if labels and weight_T[place]:
                target = f"label {labels[targets_T[place]]}"
            mark = f"{weight_T[place]:g}" if weight_T[place] else "0  not scored"
            yield f"{segment:>4} {position_T[place]:>5}  {token:<16} -> {target:<16} {mark}"


def show_text(tokenizer: Tokenizer, tokens_T: np.ndarray) -> str:
    """Return the text of the tokens in quotes, with the end tokens between documents visible."""
    ends = np.flatnonzero(tokens_T == tokenizer.end_id)
    parts = [tokenizer.decode(part[part != tokenizer.end_id]) for part in np.split(tokens_T, ends)]
    return " <end> ".join(map(repr, parts))


def show_token(tokenizer: Tokenizer, token: int) -> str:
    """Return a token as a person can tell it: its text in quotes, or its number."""
    if token == tokenizer.end_id:
        return "<end>"
    text = tokenizer.decode([token])
    return f"<{token}>" if not text or "\ufffd" in text else repr(text)
