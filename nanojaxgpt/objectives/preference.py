"""Preferences: the chosen answer of a pair becomes likelier than the rejected one.

The two stand side by side in a row, as its segments 2k - 1 (chosen) and 2k (rejected). The loss is
a sum over pairs, its weight their number. Dimensions: B rows, T places, P pairs of a row, 2: chosen
and rejected.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nanojaxgpt.data.rows import Batch
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.objectives import Loss, Metric
from nanojaxgpt.objectives.features import log_probabilities
from nanojaxgpt.schedules import Hyper
from nanojaxgpt.trainable import merge_params

log_sigmoid = jax.nn.log_sigmoid


class Answers(NamedTuple):
    """The log-probabilities of the trained tokens of each answer."""

    policy_BP2: jax.Array
    reference_BP2: jax.Array
    count_BP2: jax.Array  # trained tokens, at least 1 where a pair is absent
    weight_BP: jax.Array  # 1: a pair; 0: none, or nothing of one of its answers is trained

    @property
    def mean_BP2(self) -> jax.Array:
        """The model's mean log-probability of a token; -1 where a pair is absent."""
        present_BP1 = self.weight_BP[..., None] > 0
        return jnp.where(present_BP1, self.policy_BP2 / self.count_BP2, -1.0)


def gap(values_BP2: jax.Array) -> jax.Array:
    """Return chosen less rejected [B, P]."""
    return values_BP2[..., 0] - values_BP2[..., 1]


def smoothed(logit_BP: jax.Array, hyper: Hyper) -> jax.Array:
    """Return the loss of pairs whose log-odds of being the right way round are `logit_BP`."""
    wrong = hyper["label_smoothing"]
    return -(1 - wrong) * log_sigmoid(logit_BP) - wrong * log_sigmoid(-logit_BP)


def log_odds(mean_BP2: jax.Array) -> jax.Array:
    """Return log(p / (1 - p)) of p = exp(mean), exact near p = 0 and p = 1."""
    mean_BP2 = jnp.minimum(mean_BP2, -1e-6)
    near_one = mean_BP2 > -0.7
    small = jnp.log(-jnp.expm1(jnp.where(near_one, mean_BP2, -0.7)))
    large = jnp.log1p(-jnp.exp(jnp.where(near_one, -0.7, mean_BP2)))
    return mean_BP2 - jnp.where(near_one, small, large)


def _dpo(answers: Answers, hyper: Hyper) -> tuple[jax.Array, jax.Array]:
    """Rafailov 2023; with label_smoothing the conservative DPO."""
    reward_BP2 = hyper["beta"] * (answers.policy_BP2 - answers.reference_BP2)
    return smoothed(gap(reward_BP2), hyper), reward_BP2


def _ipo(answers: Answers, hyper: Hyper) -> tuple[jax.Array, jax.Array]:
    """Azar 2023, with means over tokens, as its authors run it."""
    ratio_BP2 = (answers.policy_BP2 - answers.reference_BP2) / answers.count_BP2
    return (gap(ratio_BP2) - 0.5 / hyper["beta"]) ** 2, hyper["beta"] * ratio_BP2


def _orpo(answers: Answers, hyper: Hyper) -> tuple[jax.Array, jax.Array]:
    """Hong 2024: the loss of the chosen answer, and beta times that of the odds ratio."""
    mean_BP2 = answers.mean_BP2
    ratio_BP = log_sigmoid(gap(log_odds(mean_BP2)))
    return -mean_BP2[..., 0] - hyper["beta"] * ratio_BP, hyper["beta"] * mean_BP2


def _simpo(answers: Answers, hyper: Hyper) -> tuple[jax.Array, jax.Array]:
    """Meng 2024."""
    reward_BP2 = hyper["beta"] * answers.mean_BP2
    return smoothed(gap(reward_BP2) - hyper["margin"], hyper), reward_BP2


# (answers, hyper) -> the loss of each pair [B, P], and the implicit rewards [B, P, 2].
LOSSES: dict[str, Callable[[Answers, Hyper], tuple[jax.Array, jax.Array]]] = {
    "dpo": _dpo,
    "ipo": _ipo,
    "orpo": _orpo,
    "simpo": _simpo,
}


@jax.custom_vjp
def pair_sums(values_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Return the sum over each answer's places [B, P, 2].

    By a scan that begins anew with each segment, not by differences of a running sum and not by
    scattering: so no bit of it depends on the other pairs, or on the order of threads on a GPU.
    """

    def add(left: tuple, right: tuple) -> tuple:
        return jnp.where(left[1] == right[1], left[0] + right[0], right[0]), right[1]

    running_BT, _ = jax.lax.associative_scan(add, (values_BT, segments_BT), axis=1)
    length = values_BT.shape[1]
    number_S = jnp.arange(1, length // 2 * 2 + 1)
    order_BT = jnp.where(segments_BT > 0, segments_BT, length + 1)  # padding comes last
    find_last = functools.partial(jnp.searchsorted, v=number_S, side="right")
    last_BS = jnp.maximum(jax.vmap(find_last)(order_BT) - 1, 0)
    found_BS = jnp.take_along_axis(segments_BT, last_BS, 1) == number_S
    sums_BS = jnp.where(found_BS, jnp.take_along_axis(running_BT, last_BS, 1), 0)
    return sums_BS.reshape(len(sums_BS), -1, 2)


def _pair_sums_forward(values_BT: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    return pair_sums(values_BT, segments_BT), segments_BT


def _pair_sums_backward(segments_BT: jax.Array, grad_BP2: jax.Array) -> tuple[jax.Array, None]:
    grad_BS = jnp.pad(grad_BP2.reshape(len(grad_BP2), -1), ((0, 0), (1, 1)))  # 0: padding
    return jnp.take_along_axis(grad_BS, segments_BT, 1), None


pair_sums.defvjp(_pair_sums_forward, _pair_sums_backward)


def read_answers(log_BT: jax.Array, batch: Batch) -> Answers:
    """Return the answers of a batch; `log_BT` are its `log_probabilities`."""
    segments_BT: Any = batch.segments_BT
    count_BP2 = pair_sums(batch.weights_BT, segments_BT)
    reference_BP2 = jnp.zeros_like(count_BP2)
    if batch.reference_BT is not None:
        first_BT = batch.positions_BT == 0
        reference_BP2 = pair_sums(jnp.where(first_BT, batch.reference_BT, 0), segments_BT)
    present_BP = jnp.all(count_BP2 > 0, -1)
    count_BP2 = jnp.where(present_BP[..., None], count_BP2, 1)
    policy_BP2 = pair_sums(log_BT * batch.weights_BT, segments_BT)
    return Answers(policy_BP2, reference_BP2, count_BP2, present_BP.astype(jnp.float32))


def reward_metrics(reward_BP2: jax.Array, weight_BP: jax.Array) -> dict[str, Metric]:
    """Return how often the chosen answer wins, by how much, and the mean rewards."""
    weight, gap_BP = jnp.sum(weight_BP), gap(reward_BP2)
    chosen_BP, rejected_BP = reward_BP2[..., 0], reward_BP2[..., 1]
    means = {"win_rate": gap_BP > 0, "margin": gap_BP}
    means |= {"chosen_reward": chosen_BP, "rejected_reward": rejected_BP}
    return {name: (jnp.sum(mean * weight_BP), weight) for name, mean in means.items()}


def make_loss(model: Transformer, loss_chunks: int, name: str) -> Loss:
    """Return the loss `name` of LOSSES: its sum over the pairs, and their number."""
    pair_loss = LOSSES[name]

    def loss(
        params: Params, frozen: Params, batch: Batch, hyper: Hyper, rng: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, Metric]]:
        whole = merge_params(params, frozen)
        log_BT = log_probabilities(model, whole, batch, hyper, loss_chunks)
        answers = read_answers(log_BT, batch)
        losses_BP, reward_BP2 = pair_loss(answers, hyper)
        losses_BP -= hyper["nll_weight"] * answers.mean_BP2[..., 0]
        total, weight = jnp.sum(losses_BP * answers.weight_BP), jnp.sum(answers.weight_BP)
        return total, weight, reward_metrics(reward_BP2, answers.weight_BP)

    return loss
