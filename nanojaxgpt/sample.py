"""Token ids from a model and its cache: prefill, decode, filters; text stays in the caller."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanojaxgpt.attention import Cache, init_cache
from nanojaxgpt.model import ModelConfig, Transformer
from nanojaxgpt.projection import decoding_params


class Sampling(NamedTuple):
    """How the next token is chosen; the defaults sample from the model as it is."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # keep the k likeliest; 0: all
    top_p: float = 1.0  # keep the likeliest that make up this probability
    min_p: float = 0.0  # keep those at least this fraction as likely as the likeliest
    vocab_size: int = 0  # ids from here on are padding of the table; 0: none is
    end_id: int = -1  # a row that draws this is done; -1: none ends


class Decoding(NamedTuple):
    """Where generation stands: `tokens_B` were drawn last and stand at `positions_B`."""

    cache: tuple[Cache, ...]
    tokens_B: jax.Array
    positions_B: jax.Array
    done_B: jax.Array
    rng_B: jax.Array


def filter_logits(logits_BV: jax.Array, how: Sampling) -> jax.Array:
    """Return float32 logits at the temperature, with -inf where a filter says no."""
    if 0 < how.vocab_size < logits_BV.shape[-1]:
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[-1]) < how.vocab_size, logits_BV, -jnp.inf)
    if how.temperature == 0:
        return logits_BV
    logits_BV = logits_BV / how.temperature
    least_B1 = jnp.full((logits_BV.shape[0], 1), -jnp.inf)
    if 0 < how.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, how.top_k)[0][:, -1:]
    if how.min_p > 0:
        best_B1 = jnp.max(logits_BV, -1, keepdims=True)
        least_B1 = jnp.maximum(least_B1, best_B1 + jnp.log(how.min_p))
    if how.top_p < 1:
        kept_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
        sorted_BV = -jnp.sort(-kept_BV, axis=-1)
        before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV), -1) - jax.nn.softmax(sorted_BV)
        nucleus_BV = jnp.where(before_BV < how.top_p, sorted_BV, jnp.inf)
        least_B1 = jnp.maximum(least_B1, jnp.min(nucleus_BV, -1, keepdims=True))
    return jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)


def choose(logits_BV: jax.Array, state: Decoding, how: Sampling) -> Decoding:
    """Return the state with the next token of each row, drawn for the position after."""
    logits_BV = filter_logits(logits_BV, how)
    positions_B = state.positions_B + 1
    if how.temperature == 0:
        tokens_B = jnp.argmax(logits_BV, -1)
    else:
        keys_B = jax.vmap(jax.random.fold_in)(state.rng_B, positions_B)
        tokens_B = jax.vmap(jax.random.categorical)(keys_B, logits_BV)
    tokens_B = jnp.where(state.done_B, how.end_id, tokens_B).astype(jnp.int32)
    done_B = state.done_B | (tokens_B == how.end_id)
    return state._replace(tokens_B=tokens_B, positions_B=positions_B, done_B=done_B)


def prefill(
    model: Transformer,
    params: Any,
    prompts_BT: jax.Array,
    lengths_B: jax.Array,
    rng_B: jax.Array,
    done_B: jax.Array,
    cache_len: int,
    how: Sampling,
) -> Decoding:
    """Read the prompts (right-padded, of `lengths_B` tokens) and draw the first token of each.

    Slot s of the cache holds position s. What the padding writes is overwritten by the tokens
    drawn before any query can see it.
    """
    cfg, (batch, length) = model.cfg, prompts_BT.shape
    cache = init_cache(
        cfg.num_layers, batch, cache_len, cfg.num_kv_heads, cfg.head_dim, cfg.compute_dtype
    )
    positions_BT = jnp.broadcast_to(jnp.arange(length), prompts_BT.shape)
    (x_BTD, head), cache = model.apply(
        {"params": params}, prompts_BT, positions_BT, cache=cache, logits=False
    )
    last_B1D = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], 1)
    state = Decoding(cache, lengths_B, lengths_B - 1, done_B, rng_B)
    return choose(head(last_B1D)[:, 0], state, how)


def decode(
    model: Transformer, params: Any, state: Decoding, count: int, how: Sampling
) -> tuple[Decoding, jax.Array]:
    """Return the state after `count` more tokens of each row, and those tokens [B, count]."""

    def step(state: Decoding, _: None) -> tuple[Decoding, jax.Array]:
        logits_B1V, cache = model.apply(
            {"params": params}, state.tokens_B[:, None], state.positions_B[:, None],
            cache=state.cache,
        )  # fmt: skip
        state = choose(logits_B1V[:, 0], state._replace(cache=cache), how)
        return state, state.tokens_B

    state, tokens_CB = jax.lax.scan(step, state, None, length=count)
    return state, tokens_CB.T


@functools.partial(jax.jit, static_argnames=("model", "max_tokens", "how"))
def generate(
    model: Transformer,
    params: Any,
    prompts_BT: jax.Array,
    lengths_B: jax.Array,
    rng: jax.Array,
    *,
    max_tokens: int,
    how: Sampling,
) -> jax.Array:
    """Return `max_tokens` new ids of each row [B, max_tokens], one compiled program.

    Rows that are done repeat `how.end_id`. Raises ValueError where prompt and new tokens don't
    fit the context.
    """
    if prompts_BT.shape[1] + max_tokens - 1 > model.cfg.seq_len:  # the last one is never read
        raise ValueError(
            f"{prompts_BT.shape[1]} + {max_tokens} tokens don't fit a context of "
            f"{model.cfg.seq_len}"
        )
    cache_len = prompts_BT.shape[1] + max_tokens
    params = decoding_params(params, len(prompts_BT))
    rng_B, done_B = jax.random.split(rng, len(prompts_BT)), jnp.zeros(len(prompts_BT), bool)
    state = prefill(model, params, prompts_BT, lengths_B, rng_B, done_B, cache_len, how)
    first_B = state.tokens_B
    _, rest_BC = decode(model, params, state, max_tokens - 1, how)
    return jnp.concatenate([first_B[:, None], rest_BC], 1)


_decoding_params = jax.jit(decoding_params, static_argnames="rows")
_prefill = jax.jit(prefill, static_argnames=("model", "cache_len", "how"))
_decode = jax.jit(decode, static_argnames=("model", "count", "how"), donate_argnames=("state",))


def stream(
    cfg: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    seed: int,
    how: Sampling,
    chunk: int = 8,
) -> Iterator[np.ndarray]:
    """Yield new ids [B, up to `chunk`] as they are made, until all rows are done.

    Within the context these are the ids that `generate` gives. Where it is full, each row goes
    on from the last half of what it holds, as if that were its prompt. Prompts must be shorter
    than the context: ValueError.
    """
    model, rows = Transformer(cfg), [list(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    if min(map(len, rows)) < 1 or longest >= cfg.seq_len:
        raise ValueError(f"prompts must have 1 to {cfg.seq_len - 1} tokens, not {longest}")
    params = _decoding_params(params, len(rows))  # once, not in every chunk
    rng_B, made = jax.random.split(jax.random.key(seed), len(rows)), 0
    done_B = np.zeros(len(rows), bool)
    while made < max_tokens and not done_B.all():
        lengths = np.array([len(row) for row in rows], np.int32)
        width = min(cfg.seq_len, 1 << int(lengths.max() - 1).bit_length())  # few shapes to compile
        padded_BT = np.zeros((len(rows), max(width, 1)), np.int32)
        for row, ids in zip(padded_BT, rows, strict=True):
            row[: len(ids)] = ids
        # Attention reads the whole cache, so it is no longer than these tokens need.
        cache_len = min(cfg.seq_len, -(-(int(lengths.max()) + max_tokens - made) // 64) * 64)
        cache_len = max(cache_len, padded_BT.shape[1])
        state = _prefill(model, params, padded_BT, lengths, rng_B, done_B, cache_len, how)
        tokens_BC = np.asarray(state.tokens_B)[:, None]
        room = cfg.seq_len - int(lengths.max())
        while True:
            tokens_BC = tokens_BC[:, : max_tokens - made]
            yield tokens_BC
            made, room = made + tokens_BC.shape[1], room - tokens_BC.shape[1]
            for row, ids in zip(rows, tokens_BC.tolist(), strict=True):
                row.extend(ids)
            done_B = np.asarray(state.done_B)
            if done_B.all() or made >= max_tokens or room < 1:
                break
            state, tokens_BC = _decode(model, params, state, min(chunk, room), how)
            tokens_BC = np.asarray(tokens_BC)
        rows = [row[-max(1, cfg.seq_len // 2) :] for row in rows]
        rng_B = jax.vmap(jax.random.fold_in)(rng_B, jnp.full(len(rows), made))
