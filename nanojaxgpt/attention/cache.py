"""The keys and values of earlier tokens, and attention over them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanojaxgpt.attention.plain import plain_attention
from nanojaxgpt.attention.request import Mask, alibi_bias, dense_mask, soft_cap
from nanojaxgpt.sharding import platform

BLOCK = 128  # keys; 64 are slower for a full cache, 512 for a short text
MASKED = -1e30


class Cache(NamedTuple):
    """Keys and values of one layer; slot s of a row holds the token at position s.

    A row's keys lie together for each head, as decoding reads them (1.5x at 8 rows on CPU).
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    used: jax.Array | None = None  # no query that counts sees a slot from here on; None: unknown
    rows_B: jax.Array | None = None  # those that have queries, a row of them each; None: all


def init_cache(
    num_layers: int, batch: int, length: int, num_kv_heads: int, head_dim: int, dtype: str
) -> tuple[Cache, ...]:
    """Return an empty cache for each layer, with `length` slots a row."""
    zeros = jnp.zeros((batch, num_kv_heads, length, head_dim), dtype)
    return (Cache(zeros, zeros),) * num_layers


def update_cache(
    cache: Cache, k_BTKH: jax.Array, v_BTKH: jax.Array, positions_BT: jax.Array
) -> Cache:
    """Return the cache with new keys and values in slots positions_BT[:, 0] and on."""

    def write(slots_KSH: jax.Array, new_TKH: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(slots_KSH, jnp.swapaxes(new_TKH, 0, 1), (0, start, 0))

    def write_rows(slots_BKSH: jax.Array, new_BTKH: jax.Array, start_B: jax.Array) -> jax.Array:
        for number, row in enumerate(cache.rows_B if cache.rows_B is not None else ()):
            new_1KTH = jnp.swapaxes(new_BTKH[number : number + 1], 1, 2)
            place = row, 0, start_B[number], 0
            slots_BKSH = jax.lax.dynamic_update_slice(slots_BKSH, new_1KTH, place)
        return slots_BKSH

    change = jax.vmap(write) if cache.rows_B is None else write_rows
    start_B = jnp.broadcast_to(positions_BT, k_BTKH.shape[:2])[:, 0]
    k_BKSH, v_BKSH = change(cache.k_BKSH, k_BTKH, start_B), change(cache.v_BKSH, v_BTKH, start_B)
    return cache._replace(k_BKSH=k_BKSH, v_BKSH=v_BKSH)


def read_cache(cache: Cache, start: jax.typing.ArrayLike, length: int) -> list[jax.Array]:
    """Return the keys and the values of `length` slots from `start` on, of the rows with queries.

    Only those are read.
    """

    def read(x_BKSH: jax.Array) -> jax.Array:
        if cache.rows_B is None:
            return jax.lax.dynamic_slice_in_dim(x_BKSH, start, length, 2)
        sizes = 1, x_BKSH.shape[1], length, x_BKSH.shape[3]
        return jnp.concatenate(
            [jax.lax.dynamic_slice(x_BKSH, (row, 0, start, 0), sizes) for row in cache.rows_B]
        )

    return [read(cache.k_BKSH), read(cache.v_BKSH)]


def attend_cache(
    q_BTNH: jax.Array,
    cache: Cache,
    mask: Mask,
    *,
    scale: float,
    softcap: float = 0.0,
    alibi: bool = False,
) -> jax.Array:
    """Return attention's output [B, T, N, H] of a few queries over the slots of a cache.

    It makes all T x S scores: a whole prompt belongs to `attend`, over its own keys, with
    `update_cache` beside it. Where it is known how much of the cache is used, a CPU reads only
    that (0.06x of the time for 160 of 2,176 slots); elsewhere a loop of unknown length costs more
    than it saves.
    """
    if cache.used is not None and platform() == "cpu":
        return attend_used(q_BTNH, cache, mask, scale=scale, softcap=softcap, alibi=alibi)
    k_BKSH, v_BKSH = read_cache(cache, 0, cache.k_BKSH.shape[2])
    return plain_attention(q_BTNH, k_BKSH, v_BKSH, mask, scale, softcap, alibi)


def attend_used(
    q_BTNH: jax.Array,
    cache: Cache,
    mask: Mask,
    *,
    scale: float,
    softcap: float = 0.0,
    alibi: bool = False,
) -> jax.Array:
    """Return attention's output [B, T, N, H] from the blocks of a cache that queries may see.

    A block that a query does not see changes none of its bits: it adds zeros, and scales by
    exp(0). So a row's bits depend on no other row. Sources: Milakov 2018, Rabe 2021.
    """
    (batch, length, heads, head_dim), slots = q_BTNH.shape, cache.k_BKSH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, cache.k_BKSH.shape[1], -1, head_dim)
    block = min(BLOCK, slots)
    used = slots if cache.used is None else cache.used
    first = jnp.int32(0)
    if mask.window:
        first = jnp.maximum(jnp.min(mask.query_positions_BT) - mask.window + 1, 0) // block

    def add_block(number: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top_BNT1, total_BNT1, out_BNTH = sums
        # The last block begins earlier where the slots are no multiple of it: seen keys are cut.
        start = jnp.minimum(number * block, slots - block)
        k_BKSH, v_BKSH = read_cache(cache, start, block)
        here = mask._replace(key_positions_BS=(start + jnp.arange(block))[None])
        scores_BKGTS = jnp.einsum(
            "BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32
        )
        scores_BNTS = soft_cap(scores_BKGTS.reshape(batch, heads, length, -1) * scale, softcap)
        if alibi:
            scores_BNTS += alibi_bias(here, heads)
        seen_B1TS = dense_mask(here) & (start + jnp.arange(block) >= number * block)
        scores_BNTS = jnp.where(seen_B1TS, scores_BNTS, MASKED)
        new_BNT1 = jnp.maximum(top_BNT1, jnp.max(scores_BNTS, -1, keepdims=True))
        weights_BNTS = jnp.where(seen_B1TS, jnp.exp(scores_BNTS - new_BNT1), 0)
        factor_BNT1 = jnp.exp(top_BNT1 - new_BNT1)
        part_BKGTH = jnp.einsum(
            "BKGTS,BKSH->BKGTH",
            weights_BNTS.reshape(scores_BKGTS.shape).astype(v_BKSH.dtype),
            v_BKSH,
            preferred_element_type=jnp.float32,
        )
        total_BNT1 = total_BNT1 * factor_BNT1 + jnp.sum(weights_BNTS, -1, keepdims=True)
        return new_BNT1, total_BNT1, out_BNTH * factor_BNT1 + part_BKGTH.reshape(out_BNTH.shape)

    top_BNT1 = jnp.full((batch, heads, length, 1), MASKED)
    sums = top_BNT1, jnp.zeros_like(top_BNT1), jnp.zeros((batch, heads, length, head_dim))
    last = jnp.minimum(-(-used // block), -(-slots // block))
    _, total_BNT1, out_BNTH = jax.lax.fori_loop(first, last, add_block, sums)
    out_BNTH /= jnp.maximum(total_BNT1, 1e-30)  # a row without a text sees nothing
    return jnp.swapaxes(out_BNTH, 1, 2).astype(cache.v_BKSH.dtype)
