"""Causal attention with windows, packed documents and a KV cache; one kernel per backend."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from nanojaxgpt.sharding import axis_size, constrain, partition_spec, platform

CAUSAL_BLOCK = 128  # queries a block of `blocked_attention`, at least; 64 and 256 are slower
MOST_BLOCKS = 16  # each is compiled by itself


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


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float = 0.0,
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
    k_BSKH = constrain(k_BSKH, "batch", "keys", "kv_heads", "head_dim")
    v_BSKH = constrain(v_BSKH, "batch", "keys", "kv_heads", "head_dim")
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
    if kernel == "xla" and not alibi:
        groups = q_BTNH.shape[2] // k_BSKH.shape[2]
        k_BSNH, v_BSNH = jnp.repeat(k_BSKH, groups, 2), jnp.repeat(v_BSKH, groups, 2)
        return blocked_attention(
            q_BTNH, k_BSNH, v_BSNH, mask.query_positions_BT, mask.query_segments_BT,
            mask.window, scale,
        )  # fmt: skip
    library: Any = kernel  # xla or cudnn by now
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, bias, dense_mask(mask), scale=scale, implementation=library
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def blocked_attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    window: int,
    scale: float,
) -> jax.Array:
    """Return attention by blocks of queries, each over the keys that its mask can show it.

    With 2 blocks that is 0.75 of the full square, with a window less. The gradient takes a row's
    mean of dP from sum(dO * O), over H numbers instead of S (Dao 2022): with that and one
    transposition for all blocks it takes 0.5 to 0.8 of the time of `jax.nn`'s on CPU.
    """
    return _attend_blocks(q_BTNH, k_BSNH, v_BSNH, positions_BT, segments_BT, window, scale)[0]


def _blocks(
    length: int, window: int, positions_BT: jax.Array, segments_BT: jax.Array | None
) -> Iterator[tuple[slice, slice, jax.Array]]:
    """Yield each block's queries and keys, and what they see [B, 1, T, S]."""
    size = max(CAUSAL_BLOCK, -(-length // MOST_BLOCKS))
    if axis_size("sequence") > 1:
        size = length  # every device has a part of the queries, and works on it all the time
    for start in range(0, length, size):
        rows = slice(start, min(start + size, length))
        keys = slice(max(0, start + 1 - window) if window else 0, rows.stop)
        mask = Mask(positions_BT[:, rows], positions_BT[:, keys], window=window)
        if segments_BT is not None:
            mask = mask._replace(
                query_segments_BT=segments_BT[:, rows], key_segments_BS=segments_BT[:, keys]
            )
        yield rows, keys, dense_mask(mask)


def _attend_blocks(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    window: int,
    scale: float,
) -> tuple[jax.Array, Any]:
    """Return `blocked_attention` and what its gradient needs."""
    q_BNTH = jnp.swapaxes(q_BTNH * scale, 1, 2)
    k_BNSH, v_BNSH = jnp.swapaxes(k_BSNH, 1, 2), jnp.swapaxes(v_BSNH, 1, 2)
    outs, weights = [], []
    for rows, keys, seen in _blocks(q_BTNH.shape[1], window, positions_BT, segments_BT):
        scores_BNTS = jnp.einsum(
            "BNTH,BNSH->BNTS", q_BNTH[:, :, rows], k_BNSH[:, :, keys],
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        weights_BNTS = jax.nn.softmax(jnp.where(seen, scores_BNTS, -1e30)).astype(q_BTNH.dtype)
        outs.append(jnp.einsum("BNTS,BNSH->BNTH", weights_BNTS, v_BNSH[:, :, keys]))
        weights.append(weights_BNTS)
    out_BNTH = jnp.concatenate(outs, 2)
    saved = q_BNTH, k_BNSH, v_BNSH, out_BNTH, weights, positions_BT, segments_BT
    return jnp.swapaxes(out_BNTH, 1, 2), saved


def _attend_blocks_gradient(window: int, scale: float, saved: Any, d_out_BTNH: jax.Array) -> Any:
    """Return the gradients of q, k and v, and None for what has none."""
    q_BNTH, k_BNSH, v_BNSH, out_BNTH, weights, positions_BT, segments_BT = saved
    d_out_BNTH = jnp.swapaxes(d_out_BTNH, 1, 2)
    mean_BNT1 = jnp.sum((d_out_BNTH * out_BNTH).astype(jnp.float32), -1, keepdims=True)
    d_q, d_k_BNSH, d_v_BNSH = [], jnp.zeros_like(k_BNSH), jnp.zeros_like(v_BNSH)
    blocks = _blocks(q_BNTH.shape[2], window, positions_BT, segments_BT)
    for (rows, keys, _), weights_BNTS in zip(blocks, weights, strict=True):
        d_rows_BNTH = d_out_BNTH[:, :, rows]
        d_weights_BNTS = jnp.einsum(
            "BNTH,BNSH->BNTS", d_rows_BNTH, v_BNSH[:, :, keys],
            preferred_element_type=jnp.float32,
        )  # fmt: skip
        d_scores_BNTS = weights_BNTS * (d_weights_BNTS - mean_BNT1[:, :, rows])
        d_scores_BNTS = d_scores_BNTS.astype(q_BNTH.dtype)
        d_q.append(jnp.einsum("BNTS,BNSH->BNTH", d_scores_BNTS, k_BNSH[:, :, keys]))
        d_k_BNSH = d_k_BNSH.at[:, :, keys].add(
            jnp.einsum("BNTS,BNTH->BNSH", d_scores_BNTS, q_BNTH[:, :, rows])
        )
        d_v_BNSH = d_v_BNSH.at[:, :, keys].add(
            jnp.einsum("BNTS,BNTH->BNSH", weights_BNTS, d_rows_BNTH)
        )
    d_q_BNTH = jnp.concatenate(d_q, 2) * scale
    return *(jnp.swapaxes(d, 1, 2) for d in (d_q_BNTH, d_k_BNSH, d_v_BNSH)), None, None


blocked_attention.defvjp(_attend_blocks, _attend_blocks_gradient)


def choose_kernel(q_BTNH: jax.Array, alibi: bool, dropout: float, asked: str) -> str:
    """Return the kernel to use: plain, xla, cudnn or splash."""
    fused = not alibi and not dropout
    fits = {
        "cudnn": fused and q_BTNH.dtype == jnp.bfloat16,
        "splash": fused and q_BTNH.shape[1] % (128 * axis_size("sequence")) == 0,
    }
    if q_BTNH.shape[1] == 1 or asked == "auto":  # a single token only initializes parameters
        fast = {"gpu": "cudnn", "tpu": "splash"}.get(platform(), "xla")
        asked = fast if fits.get(fast, True) else "xla"
    if not fits.get(asked, True):
        raise ValueError(
            f"model.attention={asked!r} does not support this model: cudnn needs bfloat16, splash "
            "a length divisible by 128, and neither has ALiBi or attention dropout; use 'auto'"
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
    if dropout and rng is not None:
        kept_BNTS = jax.random.bernoulli(rng, 1 - dropout, weights_BNTS.shape)
        weights_BNTS = jnp.where(kept_BNTS, weights_BNTS / (1 - dropout), 0)
    weights_BKGTS = weights_BNTS.reshape(scores_BKGTS.shape).astype(v_BKSH.dtype)
    out_BTKGH = jnp.einsum("BKGTS,BKSH->BTKGH", weights_BKGTS, v_BKSH)
    return out_BTKGH.reshape(q_BTNH.shape)


def attend_cache(
    q_BTNH: jax.Array,
    cache: Cache,
    mask: Mask,
    *,
    scale: float,
    softcap: float = 0.0,
    alibi: bool = False,
) -> jax.Array:
    """Return attention's output [B, T, N, H] over the slots of a cache."""
    bias = alibi_bias(mask, q_BTNH.shape[2]) if alibi else None
    return plain_attention(q_BTNH, cache.k_BKSH, cache.v_BKSH, mask, scale, bias)


def splash_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask: Mask, scale: float
) -> jax.Array:
    """Return attention by JAX's splash kernel for TPU (interpreted, slowly, elsewhere)."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = q_BTNH.shape[1], q_BTNH.shape[2] // axis_size("tensor")
    seen = splash.CausalMask((length, length))
    if mask.window:
        seen = splash.LocalMask((length, length), (mask.window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([seen] * heads),
        head_shards=1,
        q_seq_shards=axis_size("sequence"),
        interpret=platform() != "tpu",
    )
    q_BNTH = jnp.swapaxes(q_BTNH, 1, 2) * scale
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    arrays = [kernel, q_BNTH, k_BKSH, v_BKSH]
    if mask.query_segments_BT is not None and mask.key_segments_BS is not None:
        arrays += [mask.query_segments_BT, mask.key_segments_BS]

    def shard(
        kernel: Callable, q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, *segments: Any
    ) -> jax.Array:
        def row(q_NTH: jax.Array, k_KSH: jax.Array, v_KSH: jax.Array, *segments: Any) -> jax.Array:
            return kernel(q_NTH, k_KSH, v_KSH, splash.SegmentIds(*segments) if segments else None)

        return jax.vmap(row)(q_BNTH, k_BKSH, v_BKSH, *segments)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # A Pallas kernel is opaque to the partitioner: each device runs it on its own shard.
        queries = partition_spec(["batch", "heads", "sequence"])
        keys = partition_spec(["batch", "kv_heads", "keys"])
        tokens = PartitionSpec(None, *partition_spec(["sequence"]))
        specs = [kernel.manual_sharding_spec(NamedSharding(mesh, tokens)), queries, keys, keys]
        specs += [partition_spec(["batch", "sequence"]), partition_spec(["batch", "keys"])]
        shard = jax.shard_map(
            shard, in_specs=tuple(specs[: len(arrays)]), out_specs=queries, check_vma=False
        )
    return jnp.swapaxes(shard(*arrays), 1, 2).astype(q_BTNH.dtype)


def attend_windows(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    windows: tuple[int, ...],
    layer: jax.Array | int,
    **options: Any,
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
