"""Held-out loss and bits per byte of parameters over batches; sums of tokens, exact."""

import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from nanojaxgpt.data.rows import Batch
from nanojaxgpt.loss import loss_sum
from nanojaxgpt.model.config import Multipliers
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.sharding import constrain


def make_eval_step(
    model: Transformer, token_bytes: np.ndarray, loss_chunks: int = 1
) -> Callable[..., jax.Array]:
    """Return eval_step(params, batch, multipliers) -> [sum of losses in nats, tokens, bytes].

    It gives float32 [3]. `token_bytes` [V] is how many bytes of text each token stands for.
    """
    bytes_V = jnp.zeros(model.cfg.vocab_size, jnp.float32).at[: len(token_bytes)].set(token_bytes)

    @jax.jit
    def eval_step(params: Params, batch: Batch, multipliers: Multipliers) -> jax.Array:
        (x_BTD, head), _ = model.apply(
            {"params": params}, batch.tokens_BT, batch.positions_BT, batch.segments_BT,
            logits=False, multipliers=multipliers,
        )  # fmt: skip
        weights_BT = batch.weights_BT
        loss = loss_sum(head, x_BTD, batch.targets_BT, weights_BT, chunks=loss_chunks)
        text = jnp.sum(bytes_V[batch.targets_BT] * weights_BT)
        return constrain(jnp.stack([loss, jnp.sum(weights_BT), text]), None)

    return eval_step


def evaluate_batches(
    eval_step: Callable[[Params, Batch], jax.Array], params: Params, batches: Iterable[Batch]
) -> dict[str, float]:
    """Return loss (nats per token), perplexity, bits_per_byte and tokens over all batches."""
    sums = np.zeros(3)
    waiting: list[jax.Array] = []
    for batch in batches:  # the device works on this batch while the one before is read
        waiting.append(eval_step(params, batch))
        if len(waiting) > 1:
            sums += np.asarray(waiting.pop(0), np.float64)
    for last in waiting:
        sums += np.asarray(last, np.float64)
    loss, tokens, text = sums.tolist()
    mean = loss / tokens if tokens else math.nan
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700)),
        "bits_per_byte": loss / math.log(2) / text if text else math.nan,
        "tokens": int(tokens),
    }


@functools.partial(jax.jit, static_argnums=0)
def exact_match(model: Transformer, params: Params, batch: Batch) -> jax.Array:
    """Return for each row whether all its scored tokens are the likeliest, bool [B].

    Greedy decoding of the answer finds the same: it goes on from right tokens, or has failed.
    """
    logits_BTV, _ = model.apply(
        {"params": params}, batch.tokens_BT, batch.positions_BT, batch.segments_BT
    )
    right_BT = jnp.argmax(logits_BTV, -1) == batch.targets_BT
    return jnp.all(right_BT | (batch.weights_BT == 0), axis=-1)
