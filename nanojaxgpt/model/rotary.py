"""Positions: rotary ones with their scalings, and fixed sine waves. Source of the scalings:
transformers' modeling_rope_utils.py, by whose logits tests/test_families.py checks them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from nanojaxgpt.config.rotary import Rotary


def frequencies(rotary: Rotary, dimensions: int, length: int) -> tuple[np.ndarray, float]:
    """Return each pair's angle a token, float32 [dimensions / 2], and the factor of its waves.

    `length` is the context, by which longrope chooses between `short` and `long`.
    """
    half, factor = dimensions // 2, rotary.factor
    plain = rotary.base ** (-np.arange(half, dtype=np.float32) / half)
    if rotary.scaling == "linear":
        return plain / np.float32(factor), 1.0
    if rotary.scaling == "llama3":
        turns = rotary.original * plain / (2 * math.pi)  # within the first context
        share = np.clip((turns - rotary.low) / (rotary.high - rotary.low), 0, 1)
        return ((1 - share) * plain / factor + share * plain).astype(np.float32), 1.0
    if rotary.scaling == "yarn":
        ramp = yarn_ramp(rotary, dimensions, half)
        stretched = plain / factor * ramp + plain * (1 - ramp)
        return stretched.astype(np.float32), rotary.attention or 0.1 * math.log(factor) + 1
    if rotary.scaling == "longrope":
        factors = rotary.long if length > rotary.original else rotary.short
        waves = math.sqrt(1 + math.log(factor) / math.log(rotary.original))
        return plain / np.array(factors, np.float32), rotary.attention or waves
    return plain, 1.0


def yarn_ramp(rotary: Rotary, dimensions: int, half: int) -> np.ndarray:
    """Return how far each pair is stretched, from 0 (as it was) to 1 (by the factor)."""

    def pair(turns: float) -> float:
        """Return the pair that turns so often within the first context."""
        return dimensions * math.log(rotary.original / (turns * 2 * math.pi)) / (
            2 * math.log(rotary.base)
        )  # fmt: skip

    low, high = pair(rotary.fast), pair(rotary.slow)
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dimensions - 1)
    high += 0.001 * (low == high)
    return np.clip((np.arange(half, dtype=np.float32) - low) / (high - low), 0, 1)


def rotate(
    x_BTNH: jax.Array, positions_BT: jax.Array, rotary: Rotary, length: int = 0
) -> jax.Array:
    """Return queries or keys turned by their positions (RoPE; first half against second)."""
    turned = rotary.turned(x_BTNH.shape[-1])
    if turned < x_BTNH.shape[-1]:
        rest_BTNH = x_BTNH[..., turned:]
        whole = Rotary(**{**rotary.__dict__, "fraction": 1.0})
        x_BTNH = rotate(x_BTNH[..., :turned], positions_BT, whole, length)
        return jnp.concatenate([x_BTNH, rest_BTNH], -1)
    angle, factor = frequencies(rotary, turned, length)
    angles = positions_BT[..., None, None].astype(jnp.float32) * angle
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    if factor != 1:
        sin, cos = sin * factor, cos * factor
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, -1)
    turned_BTNH = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned_BTNH.astype(x_BTNH.dtype)


def sinusoids(positions_BT: jax.Array, embed_dim: int) -> jax.Array:
    """Return fixed sine and cosine positions [B, T, D], interleaved (Vaswani 2017)."""
    half = embed_dim // 2
    angle = 10000.0 ** (-np.arange(half, dtype=np.float32) / half)
    angles = positions_BT[..., None].astype(jnp.float32) * angle
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1)
    return waves.reshape(*positions_BT.shape, embed_dim)
