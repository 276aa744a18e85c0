"""Held-out loss and bits per byte of parameters over batches; sums of tokens, exact."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojaxgpt.data.rows import Batch
from nanojaxgpt.loss import loss_sum
from nanojaxgpt.model.config import MULTIPLIERS, Multipliers
from nanojaxgpt.model.parameters import Params, PyTree
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.objectives import Loss, Metric
from nanojaxgpt.objectives.classify import macro_f1
from nanojaxgpt.schedules import Hyper
from nanojaxgpt.sharding import constrain


def make_eval_step(
    model: Transformer, token_bytes: np.ndarray, loss_chunks: int = 1
) -> Callable[..., jax.Array]:
    """Return eval_step(params, batch, hyper) -> [sum of losses in nats, tokens, bytes].

    It gives float32 [3]. `token_bytes` [V] is how many bytes of text each token stands for.
    """
    bytes_V = jnp.zeros(model.cfg.vocab_size, jnp.float32).at[: len(token_bytes)].set(token_bytes)

    @jax.jit
    def eval_step(params: Params, batch: Batch, hyper: Hyper) -> jax.Array:
        multipliers = Multipliers(*(hyper[name] for name in MULTIPLIERS))
        (x_BTD, head), _ = model.apply(
            {"params": params}, batch.tokens_BT, batch.positions_BT, batch.segments_BT,
            logits=False, multipliers=multipliers,
        )  # fmt: skip
        weights_BT = batch.weights_BT
        loss = loss_sum(head, x_BTD, batch.targets_BT, weights_BT, chunks=loss_chunks)
        text = jnp.sum(bytes_V[batch.targets_BT] * weights_BT)
        return constrain(jnp.stack([loss, jnp.sum(weights_BT), text]), None)

    return eval_step


def make_objective_step(loss: Loss) -> Callable[..., dict[str, Metric]]:
    """Return eval_step(params, batch, hyper) -> the sums of the loss and its metrics, by name.

    `loss` is that of a model without dropout.
    """

    @jax.jit
    def eval_step(params: Params, batch: Batch, hyper: Hyper) -> dict[str, Metric]:
        total, weight, metrics = loss(params, {}, batch, hyper, jax.random.key(0))
        sums = {"loss": (total, weight), **metrics}
        return jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), sums)

    return eval_step


def sum_batches(
    eval_step: Callable[[Params, Batch], PyTree], params: Params, batches: Iterable[Batch]
) -> PyTree:
    """Return the sums in float64 of what eval_step gives of all batches; None without any."""

    def found() -> Iterator[PyTree]:
        waiting = None
        for batch in batches:  # the device works on this batch while the one before is read
            ahead = eval_step(params, batch)
            if waiting is not None:
                yield waiting
            waiting = ahead
        if waiting is not None:
            yield waiting

    total = None
    for part in found():
        part = jax.tree.map(lambda x: np.asarray(x, np.float64), part)
        total = part if total is None else jax.tree.map(np.add, total, part)
    return total


def language_numbers(sums: PyTree) -> dict[str, Any]:
    """Return loss (nats per token), perplexity, bits_per_byte and tokens of summed batches."""
    loss, tokens, text = np.zeros(3).tolist() if sums is None else sums.tolist()
    mean = loss / tokens if tokens else math.nan
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700)),
        "bits_per_byte": loss / math.log(2) / text if text else math.nan,
        "tokens": int(tokens),
    }


def objective_numbers(sums: PyTree) -> dict[str, Any]:
    """Return the loss and every metric of summed batches, and `tokens`, what they are means of.

    A confusion matrix stays one of counts, as lists, and gives macro_f1.
    """
    sums = sums or {"loss": (0.0, 0.0)}
    found = {
        name: float(s / w) if w else math.nan for name, (s, w) in sums.items() if not np.ndim(s)
    }
    found["tokens"] = round(float(sums["loss"][1]))
    if "confusion" in sums:
        found["macro_f1"] = macro_f1(sums["confusion"][0])
        found["confusion"] = np.round(sums["confusion"][0]).astype(int).tolist()
    return found


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
