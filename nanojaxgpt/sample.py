"""Token ids from a model and its cache: prefill, decode, filters; text_stream.py has the text."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanojaxgpt.attention.cache import Cache, init_cache
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.projection import decoding_params
from nanojaxgpt.model.transformer import Transformer

GREEDY_BELOW = 1e-5  # temperatures below are greedy, as in vLLM; 1e-40 would divide by zero
INFINITY_BITS = 0x7F800000  # of a float32


class Sampling(NamedTuple):
    """How the next token is chosen; the defaults sample from the model as it is.

    The filters apply in this order, each to what the one before has left. Their numbers may be
    arrays [B, 1], one for each row.
    """

    temperature: float | jax.Array = 1.0  # below GREEDY_BELOW: the likeliest
    top_k: int | jax.Array = 0  # keep the k likeliest; 0: all
    top_p: float | jax.Array = 1.0  # keep the fewest likeliest that reach this, at least one
    min_p: float | jax.Array = 0.0  # keep those at least this fraction as likely as the likeliest
    vocab_size: int = 0  # ids from here on are padding of the table; 0: none is
    end_ids: tuple[int, ...] = ()  # a row that draws one of these is done, and repeats it

    @property
    def greedy(self) -> Any:
        """Whether the likeliest token is taken, the lowest id among equals; bool, or [B, 1]."""
        return self.temperature < GREEDY_BELOW


class Decoding(NamedTuple):
    """Where generation stands: `tokens_B`, drawn last, are read next, at `positions_B`.

    `rng_B` is the key of each row's next draw.
    """

    cache: tuple[Cache, ...]
    tokens_B: jax.Array
    positions_B: jax.Array
    done_B: jax.Array
    rng_B: jax.Array


def where_on(is_on: Any, change: Callable, logits_BV: jax.Array) -> jax.Array:
    """Return change(logits) where it is on, for all rows or [B, 1]; other rows keep their bits.

    Nothing is computed where it is on for no row.
    """
    if isinstance(is_on, bool):
        return change(logits_BV) if is_on else logits_BV
    return jax.lax.cond(
        jnp.any(is_on),
        lambda logits_BV: jnp.where(is_on, change(logits_BV), logits_BV),
        lambda logits_BV: logits_BV,
        logits_BV,
    )


def filter_logits(logits_BV: jax.Array, how: Sampling) -> jax.Array:
    """Return float32 logits at the temperature, with -inf for the tokens that are filtered out.

    Tokens rank by logit, the lower id first among equals. Unless greedy, the largest logit is 0.
    """
    vocab_size = logits_BV.shape[-1]
    if 0 < how.vocab_size < vocab_size:
        logits_BV = jnp.where(jnp.arange(vocab_size) < how.vocab_size, logits_BV, -jnp.inf)

    def scale(logits_BV: jax.Array) -> jax.Array:
        return (logits_BV - jnp.max(logits_BV, -1, keepdims=True)) / how.temperature

    def keep_top_k(logits_BV: jax.Array) -> jax.Array:
        first_BV = first_by_rank(logits_BV, jnp.ones_like(logits_BV), how.top_k)
        return jnp.where(first_BV, logits_BV, -jnp.inf)

    def keep_top_p(logits_BV: jax.Array) -> jax.Array:
        first_BV = first_by_rank(logits_BV, jax.nn.softmax(logits_BV), how.top_p)
        return jnp.where(first_BV, logits_BV, -jnp.inf)

    def keep_min_p(logits_BV: jax.Array) -> jax.Array:
        log = math.log if isinstance(how.min_p, float | int) else jnp.log
        return jnp.where(logits_BV >= log(how.min_p), logits_BV, -jnp.inf)

    drawn = how.temperature >= GREEDY_BELOW
    for is_on, change in (
        (drawn, scale),
        (drawn & (how.top_k > 0) & (how.top_k < vocab_size), keep_top_k),
        (drawn & (how.top_p < 1), keep_top_p),
        (drawn & (how.min_p > 0), keep_min_p),
    ):
        logits_BV = where_on(is_on, change, logits_BV)
    return logits_BV


def first_by_rank(
    logits_BV: jax.Array, weights_BV: jax.Array, enough: float | jax.Array
) -> jax.Array:
    """Return which tokens are the fewest, from the first by rank, whose weights sum to `enough`.

    At least one is. The largest logit is 0, and equal logits have equal weights. Bisection finds
    the last logit by 31 sums: for 50,257 tokens a fifth of the time of a sort on CPU.
    """
    # The distances below 0, as integers of the same order: these can be bisected, and have no
    # subnormals, which some backends take for 0.
    far_BV = jax.lax.bitcast_convert_type(jnp.abs(logits_BV), jnp.int32)

    def total(chosen_BV: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(chosen_BV, weights_BV, 0), -1, keepdims=True)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B1, high_B1 = bounds
        middle_B1 = low_B1 + (high_B1 - low_B1) // 2
        is_enough_B1 = total(far_BV <= middle_B1) >= enough
        low_B1 = jnp.where(is_enough_B1, low_B1, middle_B1 + 1)
        return low_B1, jnp.where(is_enough_B1, middle_B1, high_B1)

    low_B1 = jnp.zeros((len(far_BV), 1), jnp.int32)
    last_B1, _ = jax.lax.fori_loop(0, 31, halve, (low_B1, low_B1 + INFINITY_BITS))
    tied_BV = far_BV == last_B1
    weight_B1 = jnp.max(jnp.where(tied_BV, weights_BV, 0), -1, keepdims=True)
    ties_B1 = jnp.maximum(jnp.ceil((enough - total(far_BV < last_B1)) / weight_B1), 1)
    return (far_BV < last_B1) | (tied_BV & (jnp.cumsum(tied_BV, -1) <= ties_B1))


def choose(logits_BV: jax.Array, state: Decoding, how: Sampling) -> Decoding:
    """Return the state with the next token of each row; rows that are done stay as they are."""
    logits_BV, rng_B = filter_logits(logits_BV, how), state.rng_B
    if how.greedy:
        drawn_B = jnp.argmax(logits_BV, -1)
    else:
        rng_B, draw_B = jnp.moveaxis(jax.vmap(jax.random.split)(rng_B), 1, 0)
        drawn_B = jax.vmap(jax.random.categorical)(draw_B, logits_BV)
    tokens_B = jnp.where(state.done_B, state.tokens_B, drawn_B.astype(jnp.int32))
    positions_B = jnp.where(state.done_B, state.positions_B, state.positions_B + 1)
    done_B = state.done_B | jnp.isin(tokens_B, jnp.array(how.end_ids, jnp.int32))
    return Decoding(state.cache, tokens_B, positions_B, done_B, rng_B)


def empty_cache(cfg: ModelConfig, rows: int, slots: int) -> tuple[Cache, ...]:
    """Return the cache of a model that has read nothing."""
    return init_cache(
        cfg.num_layers, rows, slots, cfg.num_kv_heads, cfg.head_dim, cfg.compute_dtype
    )


def read(
    model: Transformer, params: Params, ids_BT: jax.Array, cache_len: int
) -> tuple[tuple[jax.Array, Callable], tuple[Cache, ...]]:
    """Return ((x_BTD, head), cache) of the model after ids from position 0 on.

    Slot s of the cache holds position s. What padding on the right writes is overwritten by the
    tokens drawn before any query can see it.
    """
    cache = empty_cache(model.cfg, len(ids_BT), cache_len)
    positions_BT = jnp.broadcast_to(jnp.arange(ids_BT.shape[1]), ids_BT.shape)
    found: Any = model.apply(
        {"params": params}, ids_BT, positions_BT, cache=cache, logits=False, prefill=True
    )
    return found


def decode(
    model: Transformer,
    params: Params,
    state: Decoding,
    count: jax.Array | int,
    how: Sampling,
    width: int,
) -> tuple[Decoding, jax.Array]:
    """Return the state after `count` more tokens of each row, and those tokens [B, width].

    `count` may be traced, up to `width`; the columns from there on are zeros.
    """

    def step(index: int, carry: tuple[Decoding, jax.Array]) -> tuple[Decoding, jax.Array]:
        state, tokens_BC = carry
        logits_B1V, cache = model.apply(
            {"params": params}, state.tokens_B[:, None], state.positions_B[:, None],
            cache=state.cache,
        )  # fmt: skip
        state = choose(logits_B1V[:, 0], state._replace(cache=cache), how)
        return state, tokens_BC.at[:, index].set(state.tokens_B)

    tokens_BC = jnp.zeros((len(state.tokens_B), width), jnp.int32)
    return jax.lax.fori_loop(0, count, step, (state, tokens_BC))


def row_keys(rng: jax.Array, rows: int) -> jax.Array:
    """Return a key for each row, which does not depend on how many there are.

    `rng` is one key, or already one for each row.
    """
    if rng.ndim:
        return rng
    return jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(rows))


@functools.partial(jax.jit, static_argnames=("model", "max_tokens", "how"))
def generate(
    model: Transformer,
    params: Params,
    prompts_BT: jax.Array,
    lengths_B: jax.Array,
    rng: jax.Array,
    *,
    max_tokens: int,
    how: Sampling,
) -> jax.Array:
    """Return `max_tokens` new ids of each row [B, max_tokens], one compiled program.

    Prompts are padded on the right. `rng` is a key, or one for each row. Rows that are done repeat
    their end id. Raises ValueError where prompt and new tokens don't fit the context.
    """
    rows, length = prompts_BT.shape
    if length + max_tokens - 1 > model.cfg.seq_len:  # the last one is never read
        raise ValueError(
            f"{length} + {max_tokens} tokens don't fit a context of {model.cfg.seq_len}"
        )
    params = decoding_params(model.cfg, params, rows)
    (x_BTD, head), cache = read(model, params, prompts_BT, length + max_tokens)
    last_B1D = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], 1)
    state = Decoding(cache, lengths_B, lengths_B - 1, jnp.zeros(rows, bool), row_keys(rng, rows))
    state = choose(head(last_B1D)[:, 0], state, how)
    _, rest_BC = decode(model, params, state, max_tokens - 1, how, max_tokens)
    return jnp.concatenate([state.tokens_B[:, None], rest_BC[:, :-1]], 1)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def fill(
    model: Transformer,
    params: Params,
    cache: tuple[Cache, ...],
    ids_T: jax.Array,
    rows_B: jax.Array,
) -> tuple[Cache, ...]:
    """Return the cache with these ids, from position 0 on, in the rows where `rows_B` is true."""
    _, filled = read(model, params, ids_T[None], len(ids_T))

    def write(slots_BKSH: jax.Array, new_1KTH: jax.Array) -> jax.Array:
        first_BKTH = slots_BKSH[:, :, : len(ids_T)]
        first_BKTH = jnp.where(rows_B[:, None, None, None], new_1KTH, first_BKTH)
        return slots_BKSH.at[:, :, : len(ids_T)].set(first_BKTH)

    return jax.tree.map(write, cache, filled)


empty_cache_jit = jax.jit(
    empty_cache, static_argnums=(0, 1, 2)
)  # a buffer of its own for each array
decoding_params_jit = jax.jit(decoding_params, static_argnames=("cfg", "rows"))
decode_jit = jax.jit(decode, static_argnames=("model", "how", "width"), donate_argnames=("state",))


def padded_length(length: int, seq_len: int) -> int:
    """Return the power of two from `length` on, or the context: few shapes to compile."""
    return min(seq_len, 1 << (length - 1).bit_length())


def stream(
    cfg: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    rng: jax.Array,
    how: Sampling,
    chunk: int = 8,
    slots: int = 0,
) -> Iterator[np.ndarray]:
    """Yield new ids [B, up to `chunk`] as they are drawn, first one, until all rows are done.

    Within the context these are the ids that `generate` gives for the same `rng`. Each row has its
    own context, whatever the others hold: the last `seq_len` tokens of its prompt, and where that
    is full, the last half of it, and so on. The cache has `slots`, or what the prompts need: calls
    with as many share a program. Raises ValueError for an empty prompt.
    """
    model, contexts = Transformer(cfg), [list(prompt)[-cfg.seq_len :] for prompt in prompts]
    if not all(contexts):
        raise ValueError("a prompt must have at least one token")
    rows, longest = len(contexts), max(map(len, contexts))
    # Attention reads the whole cache, so it is no longer than these tokens need.
    needed = max(padded_length(longest, cfg.seq_len), -(-(longest + max_tokens) // 64) * 64)
    slots = max(slots, needed)
    state = Decoding(
        empty_cache_jit(cfg, rows, min(cfg.seq_len, slots)),
        jnp.array([context[-1] for context in contexts], jnp.int32),
        jnp.array([len(context) - 1 for context in contexts], jnp.int32),
        jnp.zeros(rows, bool),
        jnp.copy(row_keys(rng, rows)),  # the state is donated, the caller's keys are not
    )
    params = decoding_params_jit(cfg, params, rows)  # once, not in every chunk
    made, done_B, unread = 0, np.zeros(rows, bool), list(range(rows))
    while made < max_tokens and not done_B.all():
        state = fill_rows(model, params, state, contexts, unread)
        active = [row for row in range(rows) if not done_B[row]]
        left = min(cfg.seq_len + 1 - len(contexts[row]) for row in active)
        count = min(chunk if made else 1, max_tokens - made, left)
        state, tokens_BC = decode_jit(model, params, state, count, how, chunk)
        tokens_BC = np.asarray(tokens_BC)[:, :count]
        yield tokens_BC
        made, done_B = made + count, np.asarray(state.done_B)
        unread = []
        for row in active:
            contexts[row] += tokens_BC[row].tolist()
            if len(contexts[row]) > cfg.seq_len and not done_B[row]:
                contexts[row] = contexts[row][-max(1, cfg.seq_len // 2) :]
                unread.append(row)


def fill_rows(
    model: Transformer,
    params: Params,
    state: Decoding,
    contexts: Sequence[Sequence[int]],
    rows: Sequence[int],
) -> Decoding:
    """Return the state with the contexts of these rows in its cache; equal ones are read once."""
    cache, same = state.cache, dict[tuple[int, ...], list[int]]()
    for row in rows:
        same.setdefault(tuple(contexts[row]), []).append(row)
    for context, members in same.items():
        ids_T = np.zeros(padded_length(len(context), model.cfg.seq_len), np.int32)
        ids_T[: len(context)] = context
        cache = fill(model, params, cache, ids_T, np.isin(np.arange(len(contexts)), members))
    last_B = jnp.array([len(context) - 1 for context in contexts], jnp.int32)
    chosen_B = np.isin(np.arange(len(contexts)), rows)
    positions_B = jnp.where(chosen_B, last_B, state.positions_B)
    return state._replace(cache=cache, positions_B=positions_B)
