"""Matrix products as a CPU takes them fastest, and what decides that."""

from typing import Any

import jax
import jax.numpy as jnp

from nanojaxgpt.cpu import has_avx512, multiplies_bfloat16
from nanojaxgpt.sharding import platform


def alone_on_cpu() -> bool:
    """Return whether the traced program will run on one device, a CPU."""
    return platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1


def multiply(terms: str, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Return an einsum, summed in float32: of bfloat16, XLA's CPU backend does so only if asked."""
    summed = jnp.float32 if platform() == "cpu" else dtype
    return jnp.einsum(terms, a, b, preferred_element_type=summed).astype(dtype)


def multiply_transposed(first: jax.Array, second: jax.Array, dtype: Any) -> jax.Array:
    """Return first^T second, [..., A, B] of [..., T, A] and [..., T, B]: a sum over tokens."""
    if alone_on_cpu() and gains_by_transpose(first, second):
        return multiply("...AT,...TB->...AB", transposed(first), second, dtype)
    return multiply("...TA,...TB->...AB", first, second, dtype)


def gains_by_transpose(first: jax.Array, second: jax.Array) -> bool:
    """Return whether a CPU takes the product of `transposed(first)` and `second` faster.

    XLA's fast kernel takes no product over the first axes of both operands. Transposed first, it is
    1.5x to 4.9x as fast in bfloat16 on a CPU with instructions for it; in float32 1.2x to 1.8x if
    `first` is a narrow matrix, on a CPU without AVX-512 (with it 0.9x); see
    scripts/bench_products.py.
    """
    if first.dtype == jnp.bfloat16:
        return multiplies_bfloat16()
    narrow = first.ndim == 2 and 2 * first.shape[-1] <= second.shape[-1]
    return narrow and not has_avx512()


def transposed(x: jax.Array) -> jax.Array:
    """Return a transpose that XLA does not fold into the product: one that is padded and cut."""
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
    return jnp.swapaxes(padded, -1, -2)[..., :-1, :]
