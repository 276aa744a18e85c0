"""The objective of pretraining: the cross-entropy of each next token."""

import jax
import jax.numpy as jnp

from nanojaxgpt.data.rows import Batch
from nanojaxgpt.loss import loss_sum
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.objectives import Loss, Metric
from nanojaxgpt.objectives.features import features
from nanojaxgpt.schedules import Hyper
from nanojaxgpt.trainable import merge_params


def make_loss(model: Transformer, loss_chunks: int) -> Loss:
    """Return the loss: the sum of weighted token losses in nats, and of the weights."""

    def loss(
        params: Params, frozen: Params, batch: Batch, hyper: Hyper, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Metric]]:
        whole = merge_params(params, frozen)
        x_BTD, head = features(model, whole, batch, hyper, rng)
        total = loss_sum(
            head, x_BTD, batch.targets_BT, batch.weights_BT, hyper["z_loss"], loss_chunks
        )
        return total, jnp.sum(batch.weights_BT), {}

    return loss
