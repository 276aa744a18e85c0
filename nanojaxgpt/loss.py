"""Cross-entropy and log-probabilities of tokens, from logits or, in chunks, from features."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from nanojaxgpt.model.head import Head
from nanojaxgpt.model.parameters import PyTree
from nanojaxgpt.sharding import RULES, partition_spec


@jax.custom_vjp
def token_loss(logits_BTV: jax.Array, targets_BT: jax.Array, z_loss: jax.Array) -> jax.Array:
    """Return -log p(target) + z_loss * log(Z)^2 of each token, in nats, float32 [B, T].

    The gradient is written out (softmax minus one-hot, one pass): on CPU it is faster than
    differentiating through logsumexp and gather (see scripts/bench_train.py).
    """
    return _token_loss_forward(logits_BTV, targets_BT, z_loss)[0]


def _token_loss_forward(
    logits_BTV: jax.Array, targets_BT: jax.Array, z_loss: jax.Array
) -> tuple[jax.Array, tuple]:
    log_z_BT = jax.nn.logsumexp(logits_BTV.astype(jnp.float32), axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]
    loss_BT = log_z_BT - target_BT.astype(jnp.float32) + z_loss * log_z_BT**2
    return loss_BT, (logits_BTV, targets_BT, z_loss, log_z_BT)


def _token_loss_backward(residuals: tuple, grad_BT: jax.Array) -> tuple:
    logits_BTV, targets_BT, z_loss, log_z_BT = residuals
    p_BTV = jnp.exp(logits_BTV.astype(jnp.float32) - log_z_BT[..., None])
    p_BTV *= (1 + 2 * z_loss * log_z_BT)[..., None]
    vocab = jax.lax.broadcasted_iota(jnp.int32, logits_BTV.shape, logits_BTV.ndim - 1)
    grad_BTV = jnp.where(vocab == targets_BT[..., None], p_BTV - 1, p_BTV) * grad_BT[..., None]
    return grad_BTV.astype(logits_BTV.dtype), None, jnp.sum(grad_BT * log_z_BT**2)


token_loss.defvjp(_token_loss_forward, _token_loss_backward)


def split_sequence(array: jax.Array, chunks: int) -> jax.Array:
    """Return an array [B, T, ...] as [chunks, B, T / chunks, ...]."""
    parts = array.reshape(array.shape[0], chunks, -1, *array.shape[2:])
    return jnp.swapaxes(parts, 0, 1)


def map_chunks(
    function: Callable[..., PyTree], chunks: int, shared: PyTree, *arrays: jax.Array
) -> PyTree:
    """Return function(shared, *arrays), where each array is [B, T, ...] and each result [B, T].

    With `chunks` > 1 it is made from as many parts of the sequence, one after the other: what the
    function makes in between exists for one part at a time, in the backward pass too. `shared` is
    what all parts need, the heads among it.
    """
    if chunks == 1:
        return function(shared, *arrays)

    def run(shared: PyTree, *arrays: jax.Array) -> PyTree:
        again = jax.checkpoint(function)
        parts = tuple(split_sequence(array, chunks) for array in arrays)
        found = jax.lax.scan(lambda _, part: (None, again(shared, *part)), None, parts)[1]
        return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1), found)

    return on_own_tokens(run, chunks, shared, arrays)


def loss_sum(
    head: Callable[[jax.Array], jax.Array],
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: jax.Array | float = 0.0,
    chunks: int = 1,
) -> jax.Array:
    """Return the sum of weighted token losses of the logits `head(x_BTD)`.

    With `chunks` > 1 the sequence is cut into as many parts, and only one part's logits
    [B, T / chunks, V] exist at a time, in the backward pass too.
    """
    z_loss = jnp.float32(z_loss)
    if chunks == 1:
        return jnp.sum(token_loss(head(x_BTD), targets_BT, z_loss) * weights_BT)

    def run(shared: PyTree, *arrays: jax.Array) -> jax.Array:
        head, z_loss = shared

        @jax.checkpoint
        def add_chunk(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
            x_BCD, targets_BC, weights_BC = part
            losses_BC = token_loss(head(x_BCD), targets_BC, z_loss)
            return total + jnp.sum(losses_BC * weights_BC), None

        parts = tuple(split_sequence(array, chunks) for array in arrays)
        return jax.lax.scan(add_chunk, jnp.float32(0), parts)[0]

    return on_own_tokens(run, chunks, (head, z_loss), (x_BTD, targets_BT, weights_BT), summed=True)


def is_head(leaf: Any) -> bool:
    """Return whether a node of a tree is a head."""
    return isinstance(leaf, Head)


def on_own_tokens(
    function: Callable[..., PyTree],
    chunks: int,
    shared: PyTree,
    arrays: tuple[jax.Array, ...],
    summed: bool = False,
) -> PyTree:
    """Return function(shared, *arrays), or its sum, with each device at its own rows and tokens.

    In a loop over chunks the compiler gathers a sharded head for each, and sums the gradient of any
    head over the devices as often. Here both happen once, in the dtype of the product; the price
    is that a device holds the whole head and its gradient during the loop. The compiler decides
    where the vocabulary is split, rows or tokens don't divide, or a head is quantized.
    """
    mesh = jax.sharding.get_abstract_mesh()
    rows, tokens, vocab = (
        math.prod(mesh.shape.get(axis, 1) for axis in RULES[name])
        for name in ("batch", "sequence", "vocab")
    )
    size, length = arrays[0].shape[:2]
    heads = [leaf for leaf in jax.tree.leaves(shared, is_leaf=is_head) if is_head(leaf)]
    plain = heads and all(isinstance(head.kernel, jax.Array) for head in heads)
    divides = size % rows == 0 and length % (tokens * chunks) == 0
    inside = AxisType.Manual in mesh.axis_types  # of another shard_map
    if rows * tokens == 1 or vocab > 1 or not plain or not divides or inside:
        return function(shared, *arrays)

    def layout(leaf: Any) -> Any:
        whole = jax.tree.map(lambda _: PartitionSpec(), leaf)
        kernel = partition_spec(["vocab", "embed"])
        return dataclasses.replace(whole, kernel=kernel) if is_head(leaf) else whole

    def gather(leaf: Any) -> Any:
        if not is_head(leaf) or mesh.shape["fsdp"] == 1:
            return leaf
        kernel_VD = jax.lax.all_gather(leaf.kernel, "fsdp", axis=1, tiled=True)
        return dataclasses.replace(leaf, kernel=kernel_VD)

    def run(shared: PyTree, *arrays: jax.Array) -> PyTree:
        found = function(jax.tree.map(gather, shared, is_leaf=is_head), *arrays)
        return jax.lax.psum(found, (*RULES["batch"], *RULES["sequence"])) if summed else found

    layouts = jax.tree.map(layout, shared, is_leaf=is_head)
    by_token = partition_spec(["batch", "sequence"])
    local = jax.shard_map(
        run,
        in_specs=(layouts, *[by_token] * len(arrays)),
        out_specs=PartitionSpec() if summed else by_token,
        check_vma=False,
    )
    return local(shared, *arrays)
