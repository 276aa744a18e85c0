"""Cross-entropy and log-probabilities of tokens, from logits or, in chunks, from features."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from nanojaxgpt.model.parameters import PyTree


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


def map_chunks(function: Callable[..., PyTree], chunks: int, *arrays: jax.Array) -> PyTree:
    """Return function(*arrays), where each array is [B, T, ...] and each result [B, T].

    With `chunks` > 1 it is made from as many parts of the sequence, one after the other: what the
    function makes in between exists for one part at a time, in the backward pass too.
    """
    if chunks == 1:
        return function(*arrays)
    again = jax.checkpoint(function)
    parts = tuple(split_sequence(array, chunks) for array in arrays)
    found = jax.lax.scan(lambda _, part: (None, again(*part)), None, parts)[1]
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(x.shape[1], -1), found)


def loss_sum(
    logits: Callable[[jax.Array], jax.Array],
    x_BTD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    z_loss: jax.Array | float = 0.0,
    chunks: int = 1,
) -> jax.Array:
    """Return the sum of weighted token losses of `logits(x_BTD)`.

    With `chunks` > 1 the sequence is cut into as many parts, and only one part's logits
    [B, T / chunks, V] exist at a time, in the backward pass too.
    """
    z_loss = jnp.float32(z_loss)
    if chunks == 1:
        return jnp.sum(token_loss(logits(x_BTD), targets_BT, z_loss) * weights_BT)

    @jax.checkpoint
    def add_chunk(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
        x_BCD, targets_BC, weights_BC = part
        losses_BC = token_loss(logits(x_BCD), targets_BC, z_loss)
        return total + jnp.sum(losses_BC * weights_BC), None

    parts = tuple(split_sequence(array, chunks) for array in (x_BTD, targets_BT, weights_BT))
    return jax.lax.scan(add_chunk, jnp.float32(0), parts)[0]
