"""Distillation: the model learns the probabilities that a teacher gives to each next token.

The teacher's parameters are the branch TEACHER of the frozen ones.
"""

import jax
import jax.numpy as jnp

from nanojaxgpt.data.rows import Batch
from nanojaxgpt.loss import map_chunks
from nanojaxgpt.model.head import Head
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.objectives import Loss, Metric
from nanojaxgpt.objectives.features import features
from nanojaxgpt.schedules import Hyper
from nanojaxgpt.trainable import TEACHER, merge_params


def kl(p_V: jax.Array, q_V: jax.Array) -> jax.Array:
    """Return KL(p, q) in nats over the last axis, of log-probabilities."""
    return jnp.sum(jnp.exp(p_V) * (p_V - q_V), -1)


def divergence(student_V: jax.Array, teacher_V: jax.Array, beta: jax.Array) -> jax.Array:
    """Return the generalized Jensen-Shannon divergence over the last axis, of log-probabilities.

    That is beta KL(T, M) + (1 - beta) KL(S, M) with M = (1 - beta) S + beta T (Agarwal 2024); by
    their convention a beta of 0 is KL(T, S), of 1 KL(S, T), and not the limits, which are 0.
    """
    inside = (beta > 0) & (beta < 1)
    part = jnp.where(inside, beta, 0.5)
    mixed_V = jnp.logaddexp(jnp.log1p(-part) + student_V, jnp.log(part) + teacher_V)
    between = part * kl(teacher_V, mixed_V) + (1 - part) * kl(student_V, mixed_V)
    ends = jnp.where(beta > 0, kl(student_V, teacher_V), kl(teacher_V, student_V))
    return jnp.where(inside, between, ends)


def make_loss(model: Transformer, teacher: Transformer, loss_chunks: int) -> Loss:
    """Return the loss: the sum of weighted divergences in nats, and of the weights.

    Of vocabularies that are padded to different sizes, both models' first tokens are compared. The
    metric is `agreement`, how often both find the same token likeliest.
    """
    size = min(model.cfg.vocab_size, teacher.cfg.vocab_size)

    def loss(
        params: Params, frozen: Params, batch: Batch, hyper: Hyper, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Metric]]:
        whole = dict(merge_params(params, frozen))
        wise = whole.pop(TEACHER)
        x_BTD, head = features(model, whole, batch, hyper, rng)
        rows = batch.tokens_BT, batch.positions_BT, batch.segments_BT
        (wise_BTD, wise_head), _ = teacher.apply({"params": wise}, *rows, logits=False)

        def compare(
            shared: tuple[Head, Head, Hyper], x_BCD: jax.Array, wise_BCD: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            head, wise_head, hyper = shared
            both = head(x_BCD)[..., :size], wise_head(wise_BCD)[..., :size]
            student_V, teacher_V = (
                jax.nn.log_softmax(logits_V / hyper["temperature"]) for logits_V in both
            )
            agree = jnp.argmax(student_V, -1) == jnp.argmax(teacher_V, -1)
            return divergence(student_V, teacher_V, hyper["jsd_beta"]), agree

        losses_BT, agree_BT = map_chunks(
            compare, loss_chunks, (head, wise_head, hyper), x_BTD, wise_BTD
        )
        weights_BT, weight = batch.weights_BT, jnp.sum(batch.weights_BT)
        metrics = {"agreement": (jnp.sum(agree_BT * weights_BT), weight)}
        return jnp.sum(losses_BT * weights_BT), weight, metrics

    return loss
