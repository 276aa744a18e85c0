"""The keys and values of earlier tokens, and attention over them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nanojaxgpt.attention.plain import plain_attention
from nanojaxgpt.attention.request import Mask


class Cache(NamedTuple):
    """Keys and values of one layer; slot s of a row holds the token at position s.

    A row's keys lie together for each head, as decoding reads them (1.5x at 8 rows on CPU).
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array


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

    write = jax.vmap(write)
    start_B = jnp.broadcast_to(positions_BT, k_BTKH.shape[:2])[:, 0]
    return Cache(write(cache.k_BKSH, k_BTKH, start_B), write(cache.v_BKSH, v_BTKH, start_B))


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
    `update_cache` beside it.
    """
    return plain_attention(q_BTNH, cache.k_BKSH, cache.v_BKSH, mask, scale, softcap, alibi)
