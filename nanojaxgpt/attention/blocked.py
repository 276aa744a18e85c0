"""Attention by blocks of queries, each over the keys that it can see, as XLA compiles it.

Short rows save each block's weights for the backward pass. Long ones, and soft-capped ones, save
the logarithm of a row's sum and make the weights again, so that memory is linear in the length.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nanojaxgpt.attention.request import Mask, Request, dense_mask, soft_cap
from nanojaxgpt.products import multiply_transposed
from nanojaxgpt.sharding import axis_size

CAUSAL_BLOCK = 128  # queries a block of `blocked_attention`, at least; 64 and 256 are slower
MOST_BLOCKS = 16  # each is compiled by itself
LONGEST_SAVED = 2048  # tokens of a row whose weights are saved; docs/attention.md has the figures
TILE = 128  # queries a block of `tiled_attention`
MOST_SPANS = 8  # numbers of keys that its blocks take; each is compiled by itself


def supports(request: Request) -> str:
    """Return "", or why the blocks can't do it."""
    if request.alibi:
        return "blocked has no ALiBi"
    if request.dropout:
        return "blocked has no attention dropout"
    if request.query_length != request.key_length:
        return "blocked needs as many queries as keys"
    return ""


def run(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    request: Request,
    scale: float,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Return attention's output [B, T, N, H]."""
    groups = request.heads // request.key_heads
    k_BSNH, v_BSNH = jnp.repeat(k_BSKH, groups, 2), jnp.repeat(v_BSKH, groups, 2)
    arrays = q_BTNH, k_BSNH, v_BSNH, mask.query_positions_BT, mask.query_segments_BT
    # By the length alone: a row has the same bits in any batch and on any mesh.
    if request.softcap or request.query_length > LONGEST_SAVED:
        return tiled_attention(*arrays, request.window, scale, request.softcap)
    return blocked_attention(*arrays, request.window, scale)


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
    out_BNTH = checkpoint_name(jnp.concatenate(outs, 2), "attention")
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
            multiply_transposed(d_scores_BNTS, q_BNTH[:, :, rows], k_BNSH.dtype)
        )
        d_v_BNSH = d_v_BNSH.at[:, :, keys].add(
            multiply_transposed(weights_BNTS, d_rows_BNTH, v_BNSH.dtype)
        )
    d_q_BNTH = jnp.concatenate(d_q, 2) * scale
    return *(jnp.swapaxes(d, 1, 2) for d in (d_q_BNTH, d_k_BNSH, d_v_BNSH)), None, None


blocked_attention.defvjp(_attend_blocks, _attend_blocks_gradient)


class Tiles(NamedTuple):
    """`count` blocks of `size` queries, from query `first` on; each takes `span` keys."""

    first: int
    size: int
    count: int
    span: int


def _tiles(length: int, window: int) -> list[Tiles]:
    """Return all blocks of a row; those with as many keys follow each other in one loop."""
    # With its queries spread, every device has a part of them and works on it all the time.
    size = length if axis_size("sequence") > 1 else min(TILE, length)
    blocks, rest = divmod(length, size)
    reach = size - 1 + window if window else length
    step = -(-blocks // MOST_SPANS) * size
    stops = [min((block * size // step + 1) * step, length) for block in range(blocks)]
    found, first = [], 0
    for span, same in itertools.groupby(min(stop, reach) for stop in stops):
        found.append(Tiles(first, size, len(list(same)), span))
        first += found[-1].count * size
    if rest:
        found.append(Tiles(first, rest, 1, min(length, reach)))
    return found


def _loop(step: Callable, carry: Any, count: int) -> tuple[Any, Any]:
    """Return `jax.lax.scan` of step(carry, index); a single step is no loop for the compiler."""
    if count > 1:
        return jax.lax.scan(step, carry, jnp.arange(count))
    carry, out = step(carry, 0)
    return carry, jax.tree.map(lambda x: x[None], out)


def _cut(x: jax.Array, start: jax.Array | int, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def _joined(blocks: list[jax.Array]) -> jax.Array:
    """Return [B, N, T, H] from blocks [count, B, N, size, H]."""
    parts = [jnp.moveaxis(x, 0, 2) for x in blocks]
    return jnp.concatenate([x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in parts], 2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def tiled_attention(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    window: int,
    scale: float,
    softcap: float,
) -> jax.Array:
    """Return attention with the scores of one block of queries in memory at a time."""
    inputs = q_BTNH, k_BSNH, v_BSNH, positions_BT, segments_BT
    return _attend_tiles(*inputs, window, scale, softcap)[0]


class _Block(NamedTuple):
    """What a block of queries needs, and what it makes first."""

    start: jax.Array | int  # of its queries
    low: jax.Array | int  # of its keys
    k_BNSH: jax.Array
    v_BNSH: jax.Array
    seen_B1TS: jax.Array
    scores_BNTS: jax.Array  # soft-capped, not masked


def _block(
    tiles: Tiles,
    index: jax.Array | int,
    arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None],
    window: int,
    softcap: float,
) -> _Block:
    """Return block `index` of `tiles`; `arrays` are q (scaled), k, v, positions and segments."""
    q_BNTH, k_BNSH, v_BNSH, positions_BT, segments_BT = arrays
    size, span = tiles.size, tiles.span
    start = tiles.first + index * size
    low = jnp.maximum(start + size - span, 0)  # the first block's window begins before the row
    k_BNSH, v_BNSH = _cut(k_BNSH, low, span, 2), _cut(v_BNSH, low, span, 2)
    mask = Mask(_cut(positions_BT, start, size, 1), _cut(positions_BT, low, span, 1), window=window)
    if segments_BT is not None:
        mask = mask._replace(
            query_segments_BT=_cut(segments_BT, start, size, 1),
            key_segments_BS=_cut(segments_BT, low, span, 1),
        )
    scores_BNTS = jnp.einsum(
        "BNTH,BNSH->BNTS", _cut(q_BNTH, start, size, 2), k_BNSH,
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    capped_BNTS = soft_cap(scores_BNTS, softcap)
    return _Block(start, low, k_BNSH, v_BNSH, dense_mask(mask), capped_BNTS)


def _attend_tiles(
    q_BTNH: jax.Array,
    k_BSNH: jax.Array,
    v_BSNH: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None,
    window: int,
    scale: float,
    softcap: float,
) -> tuple[jax.Array, Any]:
    """Return `tiled_attention` and what its gradient needs."""
    q_BNTH = jnp.swapaxes(q_BTNH * scale, 1, 2)
    k_BNSH, v_BNSH = jnp.swapaxes(k_BSNH, 1, 2), jnp.swapaxes(v_BSNH, 1, 2)
    arrays = q_BNTH, k_BNSH, v_BNSH, positions_BT, segments_BT
    outs, logs = [], []
    for tiles in _tiles(q_BTNH.shape[1], window):

        def step(_: None, index: Any, tiles: Tiles = tiles) -> tuple[None, Any]:
            block = _block(tiles, index, arrays, window, softcap)
            scores_BNTS = jnp.where(block.seen_B1TS, block.scores_BNTS, -1e30)
            log_BNT1 = jax.nn.logsumexp(scores_BNTS, -1, keepdims=True)
            weights_BNTS = jnp.exp(scores_BNTS - log_BNT1).astype(q_BTNH.dtype)
            return None, (jnp.einsum("BNTS,BNSH->BNTH", weights_BNTS, block.v_BNSH), log_BNT1)

        _, (out, log) = _loop(step, None, tiles.count)
        outs.append(out)
        logs.append(log)
    # Both have the name, as in splash: with q, k and v saved, the forward pass is not run again.
    out_BNTH = checkpoint_name(_joined(outs), "attention")
    log_BNT1 = checkpoint_name(_joined(logs), "attention")
    return jnp.swapaxes(out_BNTH, 1, 2), (arrays, out_BNTH, log_BNT1)


def _attend_tiles_gradient(
    window: int, scale: float, softcap: float, saved: Any, d_out_BTNH: jax.Array
) -> Any:
    """Return the gradients of q, k and v, and None for what has none."""
    arrays, out_BNTH, log_BNT1 = saved
    q_BNTH, k_BNSH, v_BNSH, *_ = arrays
    d_out_BNTH = jnp.swapaxes(d_out_BTNH, 1, 2)
    mean_BNT1 = jnp.sum((d_out_BNTH * out_BNTH).astype(jnp.float32), -1, keepdims=True)
    d_q = []
    sums = jnp.zeros(k_BNSH.shape, jnp.float32), jnp.zeros(v_BNSH.shape, jnp.float32)
    for tiles in _tiles(q_BNTH.shape[2], window):

        def step(sums: Any, index: Any, tiles: Tiles = tiles) -> tuple[Any, jax.Array]:
            block = _block(tiles, index, arrays, window, softcap)
            q, d_out, mean, log = (
                _cut(x, block.start, tiles.size, 2)
                for x in (q_BNTH, d_out_BNTH, mean_BNT1, log_BNT1)
            )
            weights_BNTS = jnp.where(block.seen_B1TS, jnp.exp(block.scores_BNTS - log), 0)
            d_weights_BNTS = jnp.einsum(
                "BNTH,BNSH->BNTS", d_out, block.v_BNSH, preferred_element_type=jnp.float32
            )
            d_scores_BNTS = weights_BNTS * (d_weights_BNTS - mean)
            if softcap:  # the derivative of tanh, from its value
                d_scores_BNTS *= 1 - jnp.square(block.scores_BNTS / softcap)
            d_scores_BNTS = d_scores_BNTS.astype(q.dtype)
            parts = [(d_scores_BNTS, q), (weights_BNTS.astype(q.dtype), d_out)]
            new = [
                jax.lax.dynamic_update_slice_in_dim(
                    total,
                    _cut(total, block.low, tiles.span, 2)
                    + multiply_transposed(*part, jnp.float32),
                    block.low, 2,
                )
                for total, part in zip(sums, parts, strict=True)
            ]  # fmt: skip
            return tuple(new), jnp.einsum("BNTS,BNSH->BNTH", d_scores_BNTS, block.k_BNSH)

        sums, d_rows = _loop(step, sums, tiles.count)
        d_q.append(d_rows)
    d_k_BNSH, d_v_BNSH = (x.astype(k_BNSH.dtype) for x in sums)
    d_q_BNTH = _joined(d_q) * scale
    return *(jnp.swapaxes(d, 1, 2) for d in (d_q_BNTH, d_k_BNSH, d_v_BNSH)), None, None


tiled_attention.defvjp(_attend_tiles, _attend_tiles_gradient)
