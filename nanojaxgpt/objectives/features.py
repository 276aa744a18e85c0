"""The forward passes that objectives share: features with their head, and log-probabilities."""

from typing import Any

import jax
import jax.numpy as jnp

from nanojaxgpt.data.rows import Batch
from nanojaxgpt.loss import map_chunks, token_loss
from nanojaxgpt.model.config import MULTIPLIERS, Multipliers
from nanojaxgpt.model.head import Head
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.schedules import Hyper


def features(
    model: Transformer,
    params: Params,
    batch: Batch,
    hyper: Hyper,
    rng: jax.Array | None = None,
) -> Any:
    """Return (x_BTD, head), see model.head.Head.

    Without an rng there is no dropout, whatever the config says.
    """
    found, _ = model.apply(
        {"params": params},
        batch.tokens_BT, batch.positions_BT, batch.segments_BT,
        deterministic=rng is None or model.cfg.deterministic, logits=False,
        rngs={} if rng is None else {"dropout": rng},
        multipliers=Multipliers(*(hyper[name] for name in MULTIPLIERS)),
    )  # fmt: skip
    return found


def log_probabilities(
    model: Transformer,
    params: Params,
    batch: Batch,
    hyper: Hyper,
    chunks: int,
    temperature: float = 1.0,
) -> jax.Array:
    """Return the log-probability of each target at a temperature, float32 [B, T].

    There is no dropout, and the logits exist in chunks, see loss.map_chunks.
    """
    x_BTD, head = features(model, params, batch, hyper)

    def losses(head: Head, x_BCD: jax.Array, targets_BC: jax.Array) -> jax.Array:
        logits_BCV = head(x_BCD)
        if temperature != 1:
            logits_BCV /= temperature
        return token_loss(logits_BCV, targets_BC, jnp.float32(0))

    return -map_chunks(losses, chunks, head, x_BTD, batch.targets_BT)
