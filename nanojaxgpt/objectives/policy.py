"""The objective of reinforcement learning from rewards: GRPO and its variants on sampled groups.

A group holds the completions of one prompt, and the advantage of a completion is its reward
against the group's: (reward - mean) / (deviation + 1e-4), Shao et al. 2024 (arXiv:2402.03300).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nanojaxgpt.config.sections import Objective
from nanojaxgpt.data.rows import Array, Batch
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.objectives import Loss, Metric
from nanojaxgpt.objectives.features import log_probabilities
from nanojaxgpt.schedules import Hyper
from nanojaxgpt.trainable import merge_params

SMALL = 1e-4  # beside the deviation of a group's rewards


class Rollout(NamedTuple):
    """Prompts with sampled completions, a row each, and what the loss compares.

    `batch` has weight 1 on the completions' targets. Log-probabilities are those of the targets,
    at the temperature of the sampling.
    """

    batch: Batch
    advantages_BT: Array  # float32, the same at all places of a row
    old_BT: jax.Array | None = None  # by the policy that sampled; None: by the one that trains
    reference_BT: jax.Array | None = None  # by the policy that the KL term holds to


def advantages(rewards_B: np.ndarray, group_size: int, scaled: bool) -> np.ndarray:
    """Return the advantages [B] of rewards whose groups follow each other.

    Without `scaled` they are not divided by the deviation (Liu et al. 2025, arXiv:2503.20783).
    """
    rewards_PG = rewards_B.astype(np.float64).reshape(-1, group_size)
    found_PG = rewards_PG - rewards_PG.mean(1, keepdims=True)
    if scaled:
        found_PG /= rewards_PG.std(1, ddof=1, keepdims=True) + SMALL
    return found_PG.ravel().astype(np.float32)


def make_loss(model: Transformer, loss_chunks: int, objective: Objective) -> Loss:
    """Return the loss: -min(ratio A, clip(ratio) A) of completion tokens, and their KL term.

    `aggregation` weighs the tokens: dapo all alike (Yu et al. 2025, arXiv:2503.14476), grpo each
    completion alike, dr_grpo all alike but over the longest completion that was allowed. `ratio`
    is of a token, or of the whole completion as its geometric mean per token (GSPO, Zheng et al.
    2025, arXiv:2507.18071). Dropout is off, as in the sampler.
    """
    temperature = objective.sample_temperature

    def loss(
        params: Params, frozen: Params, rollout: Rollout, hyper: Hyper, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Metric]]:
        whole = merge_params(params, frozen)
        new_BT = log_probabilities(model, whole, rollout.batch, hyper, loss_chunks, temperature)
        return policy_loss(new_BT, rollout, hyper, objective)

    return loss


def policy_loss(
    new_BT: jax.Array, rollout: Rollout, hyper: Hyper, objective: Objective
) -> tuple[jax.Array, jax.Array, dict[str, Metric]]:
    """Return the loss of log-probabilities [B, T], as the contract `Loss` has it."""
    weights_BT = rollout.batch.weights_BT
    lengths_B1 = jnp.sum(weights_BT, 1, keepdims=True)
    old_BT = jax.lax.stop_gradient(new_BT) if rollout.old_BT is None else rollout.old_BT
    # Places without weight may hold anything: they must not reach exp.
    difference_BT = jnp.where(weights_BT > 0, new_BT - old_BT, 0)
    if objective.ratio == "sequence":
        mean_B1 = jnp.sum(difference_BT, 1, keepdims=True) / jnp.maximum(lengths_B1, 1)
        difference_BT = jnp.where(weights_BT > 0, mean_B1, 0)
    ratio_BT = jnp.exp(difference_BT)
    clipped_BT = jnp.clip(ratio_BT, 1 - hyper["clip_low"], 1 + hyper["clip_high"])
    gain_BT = jnp.minimum(ratio_BT * rollout.advantages_BT, clipped_BT * rollout.advantages_BT)
    losses_BT, tokens = -gain_BT, jnp.sum(weights_BT)
    outside_BT = (ratio_BT != clipped_BT) & (gain_BT == clipped_BT * rollout.advantages_BT)
    # Of samples, minus their log-probability is an estimate of the entropy.
    entropy = -jnp.sum(jnp.where(weights_BT > 0, new_BT, 0) * weights_BT)
    metrics = {"clipped": (jnp.sum(outside_BT * weights_BT), tokens), "entropy": (entropy, tokens)}
    if rollout.reference_BT is not None:
        apart_BT = jnp.where(weights_BT > 0, rollout.reference_BT - new_BT, 0)
        kl_BT = jnp.exp(apart_BT) - apart_BT - 1  # the estimator k3 (Schulman 2020)
        losses_BT += hyper["kl"] * kl_BT
        metrics["kl"] = jnp.sum(kl_BT * weights_BT), tokens
    completions = jnp.sum(lengths_B1 > 0).astype(jnp.float32)
    if objective.aggregation == "grpo":
        weights_BT = weights_BT / jnp.maximum(lengths_B1, 1)
    weight = {
        "dapo": tokens, "grpo": completions, "dr_grpo": completions * objective.max_tokens
    }[objective.aggregation]  # fmt: skip
    return jnp.sum(losses_BT * weights_BT), weight, metrics
