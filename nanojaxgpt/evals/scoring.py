"""In: contexts and continuations as ids, in groups. Out: each continuation's log-probability.

The rows of a group are the choices of one question. What they begin with is read once into a
key-value cache, and each choice's own tokens are run against it; rows that share little are run
whole. Lengths are padded to powers of two, and groups of one shape make batches of about as many
tokens each.

Dimensions: G groups of a batch, C choices, P tokens of a prefix, T of a whole row, S scored.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from nanojaxgpt import memory, sharding
from nanojaxgpt.errors import DataError
from nanojaxgpt.language_model import LOWER, LanguageModel, Score
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.projection import MOST_ROWS
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.sample import decoding_params_jit, padded_length, read

MOST_SHAPES = 8  # that one call compiles
# Shapes are merged where that adds fewer tokens than a compilation costs: 10 to 15 s of two CPU
# cores at 135M parameters. An accelerator is faster, so there it would pay to merge more.
COMPILE_TOKENS = 4096
DEVICE_TOKENS = {"cpu": 4096}  # of a batch on each device, by platform
MOST_TOKENS = 16384  # of a batch on each device elsewhere
LOGIT_TOKENS = 1024  # whose logits exist at once on a device
SAVING = 1.25  # a prefix is shared where whole rows would take this many times the tokens


class Pair(NamedTuple):
    """The ids of a context, and of the continuation to score after it."""

    context: Sequence[int]
    continuation: Sequence[int]


class RowGroup(NamedTuple):
    """Rows that begin with the same ids; of what a row has after them, the last `counts` count.

    `places` are the rows' places in what was asked, and an id is scored as the one that follows.
    """

    places: list[tuple[int, int]]
    prefix: list[int]
    suffixes: list[list[int]]
    counts: list[int]

    def shape(self, seq_len: int) -> "Shape":
        """Return the smallest shape that holds the group."""
        longest = padded_length(max(map(len, self.suffixes)) - 1, seq_len)
        if self.prefix:
            return Shape(len(self.counts), padded_length(len(self.prefix), seq_len), longest)
        return Shape(0, longest, padded_length(self.counts[0], seq_len))


class Shape(NamedTuple):
    """The sizes of a compiled program; `choices` is 0 where rows are run whole."""

    choices: int
    length: int  # of the prefix, or of the whole row
    suffix: int  # of each choice after the prefix, or the scored positions of a whole row

    @property
    def tokens(self) -> int:
        """What a group costs."""
        return self.length + self.choices * self.suffix

    def merged(self, other: "Shape") -> "Shape":
        """Return the shape that holds both."""
        return Shape(*map(max, self, other))


class RowBatch(NamedTuple):
    """Groups that are run together: `rows` of them, of which those that are missing are padding."""

    shape: Shape
    rows: int
    groups: list[RowGroup]


def check_pair(pair: Pair, seq_len: int) -> None:
    """Raise DataError for an empty context or continuation, or one longer than the context."""
    if not pair.continuation:
        raise DataError("a continuation has no tokens to score")
    if not pair.context:
        raise DataError("a context has no tokens for a continuation to follow")
    if len(pair.continuation) > seq_len:
        raise DataError(f"a continuation of {len(pair.continuation):,} tokens does not fit the "
                        f"model's context of {seq_len:,}")  # fmt: skip


def make_groups(number: int, pairs: Sequence[Pair], seq_len: int) -> list[RowGroup]:
    """Return the pairs of one question as one group, or one group each where they share little.

    Of what is longer than the context, the end counts, as in lm-eval. Raises DataError.
    """
    for pair in pairs:
        check_pair(pair, seq_len)
    rows = [[*pair.context, *pair.continuation][-seq_len - 1 :] for pair in pairs]
    counts = [len(pair.continuation) for pair in pairs]
    places = [(number, row) for row in range(len(rows))]
    # The token before the first scored one belongs to the suffix.
    most = min(len(row) - count - 1 for row, count in zip(rows, counts, strict=True))
    alike = (len(set(ids)) == 1 for ids in zip(*(row[:most] for row in rows), strict=True))
    shared = next((place for place, same in enumerate(alike) if not same), most)
    whole = sum(map(len, rows))
    if len(rows) > 1 and whole >= SAVING * (whole - (len(rows) - 1) * shared):
        return [RowGroup(places, rows[0][:shared], [row[shared:] for row in rows], counts)]
    return [
        RowGroup([place], [], [row], [count])
        for place, row, count in zip(places, rows, counts, strict=True)
    ]


def choose_shapes(found: Sequence[Shape]) -> dict[Shape, Shape]:
    """Return the shape to compile for each that was found; there are at most MOST_SHAPES.

    Two are merged as long as there are too many, or that costs less than a compilation.
    """
    counts, chosen = Counter(found), {shape: shape for shape in found}
    while True:
        merges = [
            (sum((both.tokens - one.tokens) * counts[one] for one in (left, right)), left, right)
            for left in counts
            for right in counts
            if left < right and bool(left.choices) == bool(right.choices)
            for both in [left.merged(right)]
        ]
        if not merges or (min(merges)[0] > COMPILE_TOKENS and len(counts) <= MOST_SHAPES):
            return chosen
        pair = min(merges)[1:]
        both = pair[0].merged(pair[1])
        chosen = {shape: both if to in pair else to for shape, to in chosen.items()}
        total = sum(counts.pop(one) for one in pair)
        counts[both] += total


def plan_batches(model: LanguageModel, groups: Sequence[RowGroup]) -> list[RowBatch]:
    """Return the batches of groups, the longest first, with a number of rows for each shape.

    The rows divide over the mesh. Raises MemoryExceeded where a batch can't fit.
    """
    shapes = [group.shape(model.config.seq_len) for group in groups]
    chosen = choose_shapes(shapes)
    members: dict[Shape, list[RowGroup]] = {}
    for group, shape in zip(groups, shapes, strict=True):
        members.setdefault(chosen[shape], []).append(group)
    shards = math.prod(model.mesh.shape[axis] for axis in sharding.RULES["batch"])
    platform = model.mesh.devices.flat[0].platform
    limit = DEVICE_TOKENS.get(platform, MOST_TOKENS)
    batches = []
    for shape, those in sorted(members.items(), key=lambda item: -item[0].tokens):
        asked = model.experiment.eval.batch_size
        most = max(1, asked // shards if asked else limit // shape.tokens)
        parts = math.ceil(len(those) / (most * shards))
        rows = math.ceil(math.ceil(len(those) / parts) / shards) * shards
        check_batch_memory(model, shape, rows // shards)
        batches += [
            RowBatch(shape, rows, those[first : first + rows])
            for first in range(0, len(those), rows)
        ]
    return batches


def check_batch_memory(model: LanguageModel, shape: Shape, rows: int) -> None:
    """Raise MemoryExceeded where a device can't hold a batch of `rows` rows beside the model."""
    cfg = model.config
    held = memory.shard_bytes(model.params)
    cache = memory.cache_bytes(cfg, rows, shape.length + shape.suffix) if shape.choices else 0
    tokens = max(rows, min(LOGIT_TOKENS, rows * shape.suffix))
    logits = 2 * 4 * tokens * cfg.vocab_size // model.mesh.shape["tensor"]
    # A copy of the layers, apart from each other, is what a cache is used with.
    parts = {"parameters": held * (2 if shape.choices else 1), "cache": cache, "logits": logits}
    memory.check("the evaluation", parts, model.mesh, lambda: LOWER)


def score_pairs(
    model: LanguageModel,
    questions: Sequence[Sequence[Pair]],
    known: Callable[[int, int], bool] = lambda question, row: False,
    each: Callable[[Sequence[RowBatch]], Iterator[RowBatch]] = iter,
) -> Iterator[tuple[Shape, list[tuple[tuple[int, int], Score]]]]:
    """Yield the scores of each batch, with the places of their pairs, and the batch's shape.

    A batch whose pairs are all `known` is left out: batches depend on all pairs, so that those
    that are run give the same bits. The batches go through `each`, a progress bar say. Raises
    DataError, MemoryExceeded.
    """
    seq_len = model.config.seq_len
    groups = [
        group
        for number, pairs in enumerate(questions)
        for group in make_groups(number, pairs, seq_len)
    ]
    batches = [
        batch
        for batch in plan_batches(model, groups)
        if not all(known(*place) for group in batch.groups for place in group.places)
    ]
    if not batches:
        return
    layers = model.params
    if any(batch.shape.choices for batch in batches):
        with model.on_devices("the evaluation"):
            layers = decoding_params_jit(model.config, model.params, MOST_ROWS + 1)
    for batch in each(batches):
        with model.on_devices("the evaluation"):
            if batch.shape.choices:
                found = run_choices(model, layers, batch)
            else:
                found = run_rows(model, batch)
        yield batch.shape, found


def run_rows(model: LanguageModel, batch: RowBatch) -> list[tuple[tuple[int, int], Score]]:
    """Return the scores of a batch of whole rows."""
    transformer = Transformer(model.config)
    shape, rows = batch.shape, batch.rows
    ids_GT, start_G = np.zeros((rows, shape.length), np.int32), np.zeros(rows, np.int32)
    targets_GS = np.zeros((rows, shape.suffix), np.int32)
    for row, group in enumerate(batch.groups):
        ids, count = group.suffixes[0], group.counts[0]
        ids_GT[row, : len(ids) - 1] = ids[:-1]
        targets_GS[row, :count] = ids[-count:]
        start_G[row] = len(ids) - 1 - count
    arrays = place_rows(model, 0, ids_GT, start_G, targets_GS)
    scores_GS, greedy_GS = map(
        np.asarray, score_rows(transformer, model.params, *arrays, vocab=counted_rows(model))
    )
    return [
        (group.places[0], add_up(scores_GS[row], greedy_GS[row], slice(0, group.counts[0])))
        for row, group in enumerate(batch.groups)
    ]


def run_choices(
    model: LanguageModel, layers: Params, batch: RowBatch
) -> list[tuple[tuple[int, int], Score]]:
    """Return the scores of a batch of groups with a shared prefix; `layers` are apart."""
    transformer = Transformer(model.config)
    shape, rows = batch.shape, batch.rows
    prefix_GP, lengths_G = np.zeros((rows, shape.length), np.int32), np.zeros(rows, np.int32)
    ids_CGS = np.zeros((shape.choices, rows, shape.suffix + 1), np.int32)
    for row, group in enumerate(batch.groups):
        lengths_G[row] = len(group.prefix)
        prefix_GP[row, : len(group.prefix)] = group.prefix
        for choice, ids in enumerate(group.suffixes):
            ids_CGS[choice, row, : len(ids)] = ids
    own = place_rows(model, 1, ids_CGS[..., :-1], ids_CGS[..., 1:])
    arrays = place_rows(model, 0, prefix_GP, lengths_G) + own
    scores_CGS, greedy_CGS = map(
        np.asarray, score_choices(transformer, layers, *arrays, vocab=counted_rows(model))
    )
    found = []
    for row, group in enumerate(batch.groups):
        for choice, (ids, count) in enumerate(zip(group.suffixes, group.counts, strict=True)):
            part = slice(len(ids) - 1 - count, len(ids) - 1)
            one = add_up(scores_CGS[choice, row], greedy_CGS[choice, row], part)
            found.append((group.places[choice], one))
    return found


def add_up(scores_S: np.ndarray, greedy_S: np.ndarray, part: slice) -> Score:
    """Return the score of the tokens of `part`, summed in float64."""
    chosen = scores_S[part].astype(np.float64)
    return Score(float(chosen.sum()), bool(greedy_S[part].all()), len(chosen))


def counted_rows(model: LanguageModel) -> int:
    """Return how many rows of the vocabulary count, the others being padding; 0: all."""
    return model.vocab_rows if model.vocab_rows < model.config.vocab_size else 0


def place_rows(model: LanguageModel, axis: int, *arrays: np.ndarray) -> list[jax.Array]:
    """Return arrays on the mesh, the rows along `axis` divided over it."""
    spec = sharding.partition_spec([None] * axis + ["batch"])
    layout = NamedSharding(model.mesh, spec)
    return [jax.make_array_from_callback(x.shape, layout, x.__getitem__) for x in arrays]


@functools.partial(jax.jit, static_argnames=("model", "vocab"))
def score_rows(
    model: Transformer,
    params: Params,
    ids_GT: jax.Array,
    start_G: jax.Array,
    targets_GS: jax.Array,
    *,
    vocab: int,
) -> tuple[jax.Array, jax.Array]:
    """Return log-probability and greediness [G, S] of targets after the positions start_G on."""
    found: Any = model.apply({"params": params}, ids_GT, logits=False)
    (x_GTD, head), _ = found
    places_GS = start_G[:, None] + jnp.arange(targets_GS.shape[1])
    places_GS = jnp.minimum(places_GS, ids_GT.shape[1] - 1)
    x_GSD = jnp.take_along_axis(x_GTD, places_GS[..., None], 1)
    return token_scores(x_GSD, head, targets_GS, vocab)


@functools.partial(jax.jit, static_argnames=("model", "vocab"))
def score_choices(
    model: Transformer,
    params: Params,
    prefix_GP: jax.Array,
    lengths_G: jax.Array,
    ids_CGS: jax.Array,
    targets_CGS: jax.Array,
    *,
    vocab: int,
) -> tuple[jax.Array, jax.Array]:
    """Return log-probability and greediness [C, G, S] of the ids that follow `ids_CGS`."""
    count = ids_CGS.shape[2]
    # What the padding of a prefix writes is overwritten by the choice, or comes after its queries.
    _, cache = read(model, params, prefix_GP, prefix_GP.shape[1] + count)
    positions_GS = lengths_G[:, None] + jnp.arange(count)

    def score_choice(choice: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        ids_GS, targets_GS = choice
        found: Any = model.apply(
            {"params": params}, ids_GS, positions_GS, cache=cache, logits=False
        )
        (x_GSD, head), _ = found
        return token_scores(x_GSD, head, targets_GS, vocab)

    return jax.lax.map(score_choice, (ids_CGS, targets_CGS))


def token_scores(
    x_GSD: jax.Array, head: Callable[[jax.Array], jax.Array], targets_GS: jax.Array, vocab: int
) -> tuple[jax.Array, jax.Array]:
    """Return each target's log-probability, float32, and whether it is the likeliest, [G, S].

    Of the vocabulary the first `vocab` count; 0: all. Not all positions' logits exist at once.
    """
    groups, count = targets_GS.shape
    shards = math.prod(map(sharding.axis_size, sharding.RULES["batch"]))
    parts = math.gcd(count, padded_length(max(1, groups * count // LOGIT_TOKENS // shards), count))

    def score(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits_GSV = head(part[0])
        if vocab:
            counts_V = jnp.arange(logits_GSV.shape[-1]) < vocab
            logits_GSV = jnp.where(counts_V, logits_GSV, -jnp.inf)
        chosen_GS = jnp.take_along_axis(logits_GSV, part[1][..., None], -1)[..., 0]
        scores_GS = chosen_GS - jax.nn.logsumexp(logits_GSV, -1)
        return scores_GS, jnp.argmax(logits_GSV, -1) == part[1]

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(groups, parts, count // parts, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:  # on every device: each process reads all of it
        return sharding.constrain(jnp.moveaxis(x, 0, 1).reshape(groups, count), None, None)

    return jax.tree.map(join, jax.lax.map(score, (split(x_GSD), split(targets_GS))))


def roll(ids: Sequence[int], first: int, seq_len: int) -> list[Pair]:
    """Return the pairs that score each id of a text once, after as much context as fits.

    Before the text stands `first`; the windows are those of lm-eval.
    """
    pairs, done = [], 0
    while done < len(ids):
        count = min(seq_len, len(ids) - done)
        end = done + count
        context = ids[end - seq_len - 1 : done] if done else [first]
        pairs.append(Pair(context, ids[done:end]))
        done = end
    return pairs
