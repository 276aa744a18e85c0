"""The device's side of an engine, pure functions: slots of a cache that prompts are read into, and
that all draw their next tokens in one program.

Dimensions: B slots, P chunks of prompts that are read at once, C tokens of a chunk, W tokens that a
slot reads in a step: its last one and W - 1 drafts; R = B * W rows of logits, A alternatives, X
integers of K = 32 bits, one for each id. Rows never mix, and each array has one shape, so a slot's
bits don't depend on what the others hold.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanojaxgpt.attention.cache import BLOCK, Cache, init_cache
from nanojaxgpt.generate.requests import MOST_ALTERNATIVES
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.sample import GREEDY_BELOW, Sampling, filter_logits, where_on
from nanojaxgpt.sharding import constrain

CHUNK = 16  # tokens of a prompt that are read together, from a multiple of it on
WORD, ALL = 32, np.uint32(0xFFFFFFFF)  # bits of ids in an integer; all of them
CHUNKS = 4  # read at once, of one prompt or several: 64 tokens, whose products are worth a CPU


class Choice(NamedTuple):
    """How each slot draws: numbers of its request [B], and biases of the logits [B, V]."""

    seed: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    presence: Any
    frequency: Any
    bias_V: Any


class Slots(NamedTuple):
    """What the device knows of all slots beside their caches: `tokens_B`, drawn last, are read
    next.
    """

    tokens_B: jax.Array
    positions_B: jax.Array
    counts_BV: jax.Array  # how often each token was generated
    choice: Choice


class Scores(NamedTuple):
    """Log-probabilities of tokens, and the likeliest ones in their places; zeros if not asked."""

    chosen_R: jax.Array
    ids_RA: jax.Array
    likeliest_RA: jax.Array


class Drawn(NamedTuple):
    """The tokens of a step, of which the first `counts_B` hold; with their scores [R]."""

    tokens_BW: jax.Array
    counts_B: jax.Array
    scores: Scores


class Facts(NamedTuple):
    """The static facts of an engine's programs."""

    model: Transformer
    vocab_size: int  # ids from here on only pad the table
    context: int  # the first position that belongs to no text


def cache_length(context: int, width: int) -> int:
    """Return the places of a slot: for all chunks, and for what an idle slot writes."""
    return -(-(context + max(width, CHUNK)) // CHUNK) * CHUNK


def placed(slots: Slots) -> Slots:
    """Return the slots laid out on the mesh, always alike: another layout is another program."""
    return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), slots)


def placed_cache(cache: tuple[Cache, ...]) -> tuple[Cache, ...]:
    """Return a cache of all slots laid out on the mesh, always alike."""

    def place(layer: Cache) -> Cache:
        return Cache(*(constrain(x_BKSH, "batch", "kv_heads", None, None) for x_BKSH in layer[:2]))

    return tuple(map(place, cache))


def using(
    cache: tuple[Cache, ...], used: jax.Array, rows: jax.Array | None = None
) -> tuple[Cache, ...]:
    """Return the cache, of which the queries, those of some rows, see the first `used` places."""
    return tuple(layer._replace(used=used, rows_B=rows) for layer in cache)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def make_cache(cfg: ModelConfig, rows: int, length: int) -> tuple[Cache, ...]:
    """Return the empty cache of all slots, each array with a buffer of its own."""
    return placed_cache(
        init_cache(cfg.num_layers, rows, length, cfg.num_kv_heads, cfg.head_dim, cfg.compute_dtype)
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_slots(cfg: ModelConfig, rows: int) -> Slots:
    """Return empty slots, each array with a buffer of its own."""
    floats_B, ints_B = jnp.zeros(rows), jnp.zeros(rows, jnp.int32)
    counts_BV = jnp.zeros((rows, cfg.vocab_size), jnp.int32)
    shared = [floats_B] * 4
    choice = Choice(ints_B.astype(jnp.uint32), floats_B, ints_B, *shared, bias_V=counts_BV * 0.0)
    return placed(Slots(ints_B, ints_B, counts_BV, choice))


@functools.partial(jax.jit, donate_argnums=0)
def enter(
    slots: Slots, row: Any, token: Any, position: Any, choice: Choice, biased: tuple[Any, Any]
) -> Slots:
    """Return the slots with a request in one of them, whose last token is read at `position`.

    `biased` has ids and what is added to their logits; ids out of range fill it up.
    """
    bias_V = jnp.zeros(slots.counts_BV.shape[1]).at[biased[0]].set(biased[1], mode="drop")
    choice = choice._replace(bias_V=bias_V)
    choice = jax.tree.map(lambda all_B, one: all_B.at[row].set(one), slots.choice, choice)
    return placed(Slots(
        slots.tokens_B.at[row].set(token),
        slots.positions_B.at[row].set(position),
        slots.counts_BV.at[row].set(0),
        choice,
    ))  # fmt: skip


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_chunks(
    facts: Facts,
    params: Params,
    cache: tuple[Cache, ...],
    rows_P: jax.Array,
    starts_P: jax.Array,
    ids_PC: jax.Array,
    targets_PC: jax.Array,
    has_scores: Any,
) -> tuple[tuple[Cache, ...], Scores]:
    """Return the cache after some slots have read chunks, and the scores of the tokens that follow.

    A chunk sees what its slot has read before, here too: each layer writes all keys before it
    reads any. Padding after a text is overwritten before a query can see it. Chunks that start
    behind all text are none.
    """
    (chunks, length), is_chunk_P = ids_PC.shape, starts_P < facts.context
    used = jnp.max(jnp.where(is_chunk_P, starts_P + length, 0))
    found: Any = facts.model.apply(
        {"params": params}, ids_PC, starts_P[:, None] + jnp.arange(length),
        cache=using(cache, used, rows_P), logits=False,
    )  # fmt: skip
    (x_PCD, head), cache = found

    def score() -> Scores:
        logits_PCV = head(x_PCD)
        return score_tokens(
            logits_PCV.reshape(chunks * length, -1), targets_PC.ravel(), facts.vocab_size
        )

    scores = jax.lax.cond(has_scores, score, lambda: zero_like(score))
    return placed_cache(cache), scores


@functools.partial(jax.jit, donate_argnums=0)
def copy_slot(cache: tuple[Cache, ...], source: Any, target: Any, used: Any) -> tuple[Cache, ...]:
    """Return the cache with the first `used` keys and values of `source` in `target` as well."""
    length = cache[0].k_BKSH.shape[2]
    block = min(BLOCK, length)

    def copy_block(number: jax.Array, cache: tuple[Cache, ...]) -> tuple[Cache, ...]:
        start = jnp.minimum(number * block, length - block)

        def copy(all_BKSH: jax.Array) -> jax.Array:
            sizes = 1, all_BKSH.shape[1], block, all_BKSH.shape[3]
            one_1KSH = jax.lax.dynamic_slice(all_BKSH, (source, 0, start, 0), sizes)
            return jax.lax.dynamic_update_slice(all_BKSH, one_1KSH, (target, 0, start, 0))

        return jax.tree.map(copy, cache)

    return placed_cache(jax.lax.fori_loop(0, -(-used // block), copy_block, cache))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(2, 3))
def advance(
    facts: Facts,
    params: Params,
    cache: tuple[Cache, ...],
    slots: Slots,
    active_B: jax.Array,
    drafts_BD: jax.Array,
    allowed_BX: jax.Array,
    has_scores: Any,
) -> tuple[tuple[Cache, ...], Slots, Drawn]:
    """Return the cache and the slots one step on, and the tokens that the active ones drew.

    A slot reads its last token and its drafts (-1: none), and draws the token after each one with
    the key of that position; a draw counts where all drafts before it were drawn. So drafts never
    change what is drawn, only how much of it in a step. Idle slots write behind all text. The bits
    of `allowed_BX` are the ids that may follow the last token; a slot that lacks any has no drafts.
    """
    active_B &= slots.positions_B < facts.context
    start_B = jnp.where(active_B, slots.positions_B, facts.context)
    tokens_BW = jnp.concatenate([slots.tokens_B[:, None], jnp.maximum(drafts_BD, 0)], 1)
    width = tokens_BW.shape[1]
    positions_BW = start_B[:, None] + jnp.arange(width)
    used = jnp.max(jnp.where(active_B, slots.positions_B + width, 0))
    found: Any = facts.model.apply(
        {"params": params}, tokens_BW, positions_BW, cache=using(cache, used)
    )
    logits_BWV, cache = found
    logits_RV = logits_BWV.reshape(-1, logits_BWV.shape[-1])
    drawn_BW = draw_tokens(facts, logits_RV, slots, drafts_BD, allowed_BX, positions_BW + 1)
    scores = jax.lax.cond(
        has_scores,
        lambda: score_tokens(logits_RV, drawn_BW.ravel(), facts.vocab_size),
        lambda: zero_like(lambda: score_tokens(logits_RV, drawn_BW.ravel(), facts.vocab_size)),
    )
    right_BD = jnp.cumprod(drawn_BW[:, :-1] == drafts_BD, 1)
    counts_B = jnp.where(active_B, 1 + jnp.sum(right_BD, 1, dtype=jnp.int32), 0)
    last_B = jnp.take_along_axis(drawn_BW, jnp.maximum(counts_B - 1, 0)[:, None], 1)[:, 0]
    holds_BW = (jnp.arange(width) < counts_B[:, None]).astype(jnp.int32)
    rows_B1 = jnp.arange(len(active_B))[:, None]
    moved = Slots(
        jnp.where(active_B, last_B, slots.tokens_B),
        slots.positions_B + counts_B,
        slots.counts_BV.at[rows_B1, drawn_BW].add(holds_BW),
        slots.choice,
    )
    return placed_cache(cache), placed(moved), Drawn(drawn_BW, counts_B, scores)


def draw_tokens(
    facts: Facts,
    logits_RV: jax.Array,
    slots: Slots,
    drafts_BD: jax.Array,
    allowed_BX: jax.Array,
    positions_BW: jax.Array,
) -> jax.Array:
    """Return the tokens [B, W] drawn for these positions, each by its slot's choice."""
    width, choice = positions_BW.shape[1], slots.choice

    def rows(x_B: jax.Array) -> jax.Array:
        return jnp.repeat(x_B, width, 0)

    temperature_R1, top_k_R1, top_p_R1, min_p_R1, presence_R1, frequency_R1 = (
        rows(x_B)[:, None] for x_B in choice[1:-1]
    )

    def shift(logits_RV: jax.Array) -> jax.Array:
        known_BDV = jax.nn.one_hot(drafts_BD, logits_RV.shape[-1], dtype=jnp.int32)
        more_BWV = jnp.pad(jnp.cumsum(known_BDV, 1), ((0, 0), (1, 0), (0, 0)))
        counts_RV = (slots.counts_BV[:, None] + more_BWV).reshape(logits_RV.shape)
        penalties_RV = presence_R1 * (counts_RV > 0) + frequency_R1 * counts_RV
        return logits_RV - penalties_RV + rows(choice.bias_V)

    has_bias_B = jnp.any(choice.bias_V != 0, -1)
    is_shifted_R1 = (presence_R1 != 0) | (frequency_R1 != 0) | rows(has_bias_B)[:, None]
    logits_RV = where_on(is_shifted_R1, shift, logits_RV)

    def limit(logits_RV: jax.Array) -> jax.Array:
        bits_BXK = allowed_BX[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32) & 1
        bits_BV = bits_BXK.reshape(len(allowed_BX), -1)[:, : logits_RV.shape[-1]]
        return jnp.where(rows(bits_BV), logits_RV, -jnp.inf)

    is_limited_B1 = jnp.any(allowed_BX != ALL, -1, keepdims=True)
    is_limited_BW = is_limited_B1 & (jnp.arange(width) == 0)
    logits_RV = where_on(is_limited_BW.reshape(-1, 1), limit, logits_RV)
    how = Sampling(temperature_R1, top_k_R1, top_p_R1, min_p_R1, facts.vocab_size)
    logits_RV = filter_logits(logits_RV, how)

    def key(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.key(seed), position)

    def categorical() -> jax.Array:
        keys_R = jax.vmap(key)(rows(choice.seed), positions_BW.ravel())
        return jax.vmap(jax.random.categorical)(keys_R, logits_RV).astype(jnp.int32)

    likeliest_R = jnp.argmax(logits_RV, -1).astype(jnp.int32)
    is_random_R = temperature_R1[:, 0] >= GREEDY_BELOW
    drawn_R = jax.lax.cond(jnp.any(is_random_R), categorical, lambda: likeliest_R)
    return jnp.where(is_random_R, drawn_R, likeliest_R).reshape(positions_BW.shape)


def score_tokens(logits_RV: jax.Array, tokens_R: jax.Array, vocab_size: int) -> Scores:
    """Return the log-probabilities of tokens, and of the likeliest ones in their places."""
    known_RV = jnp.where(jnp.arange(logits_RV.shape[-1]) < vocab_size, logits_RV, -jnp.inf)
    log_probs_RV = jax.nn.log_softmax(known_RV)
    likeliest_RA, ids_RA = jax.lax.top_k(log_probs_RV, min(MOST_ALTERNATIVES, vocab_size))
    chosen_R = jnp.take_along_axis(log_probs_RV, tokens_R[:, None], 1)[:, 0]
    return Scores(chosen_R, ids_RA.astype(jnp.int32), likeliest_RA)


def zero_like(make: Any) -> Any:
    """Return zeros of the shapes that a function gives, without running it."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(make))
