"""A call of attention: its mask, and its static facts, which decide about the kernel."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Mask(NamedTuple):
    """The keys that a query sees: earlier ones of its own document, `window` of them (0: all)."""

    query_positions_BT: jax.Array
    key_positions_BS: jax.Array
    query_segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    window: int = 0


@dataclasses.dataclass(frozen=True)
class Request:
    """The static facts of a call of attention; the defaults are the most common choices."""

    platform: str  # cpu, gpu, tpu: where the program will run
    query_length: int
    key_length: int
    heads: int
    key_heads: int
    head_dim: int
    dtype: str
    window: int = 0  # in tokens; 0: none
    packed: bool = False  # rows hold several documents
    softcap: float = 0.0
    alibi: bool = False
    dropout: float = 0.0  # of the weights
    sequence_shards: int = 1  # devices that share the queries of a row
    blocks: str = ""  # model.attention_blocks, of splash


def dense_mask(mask: Mask) -> jax.Array:
    """Return the mask as bool [B, 1, T, S], True where the query sees the key."""
    query_BT1, key_B1S = mask.query_positions_BT[..., None], mask.key_positions_BS[:, None]
    seen_BTS = key_B1S <= query_BT1
    if mask.window:
        seen_BTS &= query_BT1 - key_B1S < mask.window
    if mask.query_segments_BT is not None and mask.key_segments_BS is not None:
        seen_BTS &= mask.query_segments_BT[..., None] == mask.key_segments_BS[:, None]
    return seen_BTS[:, None]


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Return the slope of each head [N] (Press 2022; between powers of two as its code does)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return np.array(slopes, np.float32)


def alibi_bias(mask: Mask, num_heads: int) -> jax.Array:
    """Return the bias [B, N, T, S]: minus slope times distance."""
    distance_BTS = mask.query_positions_BT[..., None] - mask.key_positions_BS[:, None]
    return distance_BTS[:, None].astype(jnp.float32) * -alibi_slopes(num_heads)[:, None, None]


def soft_cap(scores: jax.Array, cap: float) -> jax.Array:
    """Return scores squashed into (-cap, cap) by tanh; a `cap` of 0 leaves them as they are."""
    return cap * jnp.tanh(scores / cap) if cap else scores
