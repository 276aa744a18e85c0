"""Causal attention with windows, packed documents and a KV cache; one kernel per backend."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from nanojaxgpt.sharding import partition_spec

CAUSAL_BLOCK = 64  # queries a block of `blocked_attention`


class Cache(NamedTuple):
    """Keys and values of one layer; slot s of a row holds the token at position s.

    A row's keys lie together for each head, as decoding reads them (1.5x at 8 rows on CPU).
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array


class Mask(NamedTuple):
    """What a query may see: earlier keys of its own document, `window` of them (0: all)."""

    query_positions_BT: jax.Array
    key_positions_BS: jax.Array
    query_segments_BT: jax.Array | None = None
    key_segments_BS: jax.Array | None = None
    window: int = 0


def dense_mask(mask: Mask) -> jax.Array:
    """Return the mask as bool [B, 1, T, S], True where the query sees the key."""
    query_BT1, key_B1S = mask.query_positions_BT[..., None], mask.key_positions_BS[:, None]
    seen_BTS = key_B1S <= query_BT1
    if mask.window:
        seen_BTS &= query_BT1 - key_B1S < mask.window
    if mask.query_segments_BT is not None:
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
    return -alibi_slopes(num_heads)[:, None, None] * distance_BTS[:, None].astype(jnp.float32)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    scale: float,
    alibi: bool = False,
    kernel: str = "auto",
    dropout: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Return attention's output [B, T, N, H]; `dropout` acts on the weights where `rng` is given.

    Rows are whole sequences without a cache, so T = S and positions count up. `auto` picks a
    fused kernel only where it applies; one asked for by name raises ValueError where it does not.
    """
    dropout = dropout if rng is not None else 0.0
    kernel = choose_kernel(q_BTNH, alibi, dropout, kernel)
    if kernel == "splash":
        return splash_attention(q_BTNH, k_BSKH, v_BSKH, mask, scale)
    bias = alibi_bias(mask, q_BTNH.shape[2]) if alibi else None
    if kernel == "plain":
        k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
        return plain_attention(q_BTNH, k_BKSH, v_BKSH, mask, scale, bias, dropout, rng)
    if kernel == "cudnn" and mask.query_segments_BT is None:
        return jax.nn.dot_product_attention(
            q_BTNH, k_BSKH, v_BSKH, scale=scale, is_causal=True, implementation="cudnn",
            local_window_size=(mask.window - 1, 0) if mask.window else None,
        )  # fmt: skip
    if kernel == "xla" and q_BTNH.shape[1] > CAUSAL_BLOCK and not alibi:
        return blocked_attention(q_BTNH, k_BSKH, v_BSKH, mask, scale)
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, bias, dense_mask(mask), scale=scale, implementation=kernel
    )


def blocked_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, scale: float
) -> jax.Array:
    """Return attention by blocks of queries, each over the keys that its mask can show it.

    With 4 blocks that is 0.63 of the full square, with a window less.
    """
    outs = []
    for start in range(0, q_BTNH.shape[1], CAUSAL_BLOCK):
        rows = slice(start, start + CAUSAL_BLOCK)
        keys = slice(max(0, start + 1 - mask.window) if mask.window else 0, rows.stop)
        positions, segments = mask.query_positions_BT, mask.query_segments_BT
        part = Mask(positions[:, rows], positions[:, keys], window=mask.window)
        if segments is not None:
            part = part._replace(
                query_segments_BT=segments[:, rows], key_segments_BS=segments[:, keys]
            )
        outs.append(
            jax.nn.dot_product_attention(
                q_BTNH[:, rows],
                k_BSKH[:, keys],
                v_BSKH[:, keys],
                mask=dense_mask(part),
                scale=scale,
                implementation="xla",
            )
        )
    return jnp.concatenate(outs, 1)


def choose_kernel(q_BTNH: jax.Array, alibi: bool, dropout: float, asked: str) -> str:
    """Return the kernel to use: plain, xla, cudnn or splash."""
    fused = not alibi and not dropout
    fits = {
        "cudnn": fused and q_BTNH.dtype == jnp.bfloat16,
        "splash": fused and q_BTNH.shape[1] % 128 == 0,
    }
    if q_BTNH.shape[1] == 1 or asked == "auto":  # a single token only initializes parameters
        fast = {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "xla")
        asked = fast if fits.get(fast, True) else "xla"
    if not fits.get(asked, True):
        raise ValueError(
            f"model.attention={asked!r} can't do this: cudnn needs bfloat16, splash a length that "
            "divides by 128, neither ALiBi nor dropout on the weights; use 'auto'"
        )
    return "plain" if dropout else asked


def plain_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    mask: Mask,
    scale: float,
    bias_BNTS: jax.Array | None = None,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Return attention by its formula [B, T, N, H]: the oracle of the kernels, what decoding
    uses, and the one with dropout.
    """
    batch, length, heads, head_dim = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(batch, length, k_BKSH.shape[1], -1, head_dim)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32
    )
    scores_BNTS = scores_BKGTS.reshape(batch, heads, length, -1) * scale
    if bias_BNTS is not None:
        scores_BNTS += bias_BNTS
    weights_BNTS = jax.nn.softmax(jnp.where(dense_mask(mask), scores_BNTS, -1e30))
    if dropout:
        kept_BNTS = jax.random.bernoulli(rng, 1 - dropout, weights_BNTS.shape)
        weights_BNTS = jnp.where(kept_BNTS, weights_BNTS / (1 - dropout), 0)
    weights_BKGTS = weights_BNTS.reshape(scores_BKGTS.shape).astype(v_BKSH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BKSH->BTKGH", weights_BKGTS, v_BKSH)
    return out_BTKGH.reshape(q_BTNH.shape)


def attend_cache(
    q_BTNH: jax.Array, cache: Cache, mask: Mask, *, scale: float, alibi: bool = False
) -> jax.Array:
    """Return attention's output [B, T, N, H] over the slots of a cache."""
    bias = alibi_bias(mask, q_BTNH.shape[2]) if alibi else None
    return plain_attention(q_BTNH, cache.k_BKSH, cache.v_BKSH, mask, scale, bias)


def splash_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, scale: float
) -> jax.Array:
    """Return attention by JAX's splash kernel for TPU (interpreted, slowly, elsewhere)."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    seq_len = q_BTNH.shape[1]

    def shard(
        q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, segments_BT: jax.Array | None
    ) -> jax.Array:
        shape = (seq_len, seq_len)
        local = splash.LocalMask(shape, (mask.window - 1, 0), 0) if mask.window else None
        seen = splash.CausalMask(shape) if local is None else local
        kernel = splash.make_splash_mha_single_device(
            splash.MultiHeadMask([seen] * q_BNTH.shape[1]),
            interpret=jax.default_backend() != "tpu",
        )
        if segments_BT is None:
            return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH)
        return jax.vmap(lambda q, k, v, s: kernel(q, k, v, splash.SegmentIds(s, s)))(
            q_BNTH, k_BKSH, v_BKSH, segments_BT
        )

    q_BNTH = jnp.swapaxes(q_BTNH, 1, 2) * scale
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    if not jax.sharding.get_abstract_mesh().empty:
        heads = partition_spec(["batch", "heads"])
        rows = PartitionSpec() if mask.query_segments_BT is None else partition_spec(["batch"])
        # A Pallas kernel is opaque to the partitioner: each device runs it on its own shard.
        shard = jax.shard_map(
            shard, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
        )
    out_BNTH = shard(q_BNTH, k_BKSH, v_BKSH, mask.query_segments_BT)
    return jnp.swapaxes(out_BNTH, 1, 2).astype(q_BTNH.dtype)


def attend_windows(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    windows: tuple[int, ...],
    layer: jax.Array,
    **options: object,
) -> jax.Array:
    """Return `attend` with the window of `layer`, a traced number; windows repeat over layers.

    Kernels want their window at compile time, and layers share one compiled body: so the body
    holds a branch for each window that differs.
    """
    kinds = sorted(set(windows))
    branches = [
        functools.partial(
            lambda window, q, k, v: attend(q, k, v, mask._replace(window=window), **options), w
        )
        for w in kinds
    ]
    if len(kinds) == 1:
        return branches[0](q_BTNH, k_BSKH, v_BSKH)
    kind = jnp.array([kinds.index(w) for w in windows])[layer % len(windows)]
    return jax.lax.switch(kind, branches, q_BTNH, k_BSKH, v_BSKH)


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
