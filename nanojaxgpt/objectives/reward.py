"""Reward models: a head that scores the chosen answer of a pair above the rejected one.

The score is read at an answer's last place, where the model has seen all of it but its last token.
"""

from typing import Any

import jax
import jax.numpy as jnp

from nanojaxgpt.data.rows import Batch
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.objectives import Loss, Metric
from nanojaxgpt.objectives.classify import label_logits
from nanojaxgpt.objectives.features import features
from nanojaxgpt.objectives.preference import gap, log_sigmoid, pair_sums, reward_metrics
from nanojaxgpt.schedules import Hyper
from nanojaxgpt.trainable import merge_params


def make_loss(model: Transformer) -> Loss:
    """Return the loss of Bradley and Terry: its sum over the pairs, and their number."""

    def loss(
        params: Params, frozen: Params, batch: Batch, hyper: Hyper, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Metric]]:
        whole = merge_params(params, frozen)
        segments_BT: Any = batch.segments_BT
        x_BTD, _ = features(model, whole, batch, hyper, rng)
        score_BT = label_logits(model, whole, x_BTD)[..., 0]
        next_BT = jnp.pad(segments_BT[:, 1:], ((0, 0), (0, 1)))
        score_BP2 = pair_sums(jnp.where(segments_BT != next_BT, score_BT, 0), segments_BT)
        present_BP = jnp.all(pair_sums(batch.weights_BT, segments_BT) > 0, -1)
        weight_BP = present_BP.astype(jnp.float32)
        losses_BP = -log_sigmoid(gap(score_BP2) - hyper["margin"])
        losses_BP += hyper["centering"] * jnp.sum(score_BP2, -1) ** 2
        metrics = reward_metrics(score_BP2, weight_BP)
        return jnp.sum(losses_BP * weight_BP), jnp.sum(weight_BP), metrics

    return loss
