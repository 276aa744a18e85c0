"""Learning-rate schedules: functions of the 0-based step and of numbers that may be traced.

cosine and linear would reach final_fraction one step after the last, as in nanoGPT and PyTorch, so
that a fraction of 0 wastes no step. wsd reaches it in the last step, after a decay of whole steps.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Hyper = Mapping[str, Any]  # the result of step.make_hyper: numbers, never a shape


def _progress(hyper: Hyper, begin: jax.Array, step: jax.Array) -> jax.Array:
    """Return how far `step` is from `begin` to num_steps, from 0 to 1."""
    return jnp.clip((step - begin) / jnp.maximum(hyper["num_steps"] - begin, 1), 0, 1)


def _down(hyper: Hyper, progress: jax.Array) -> jax.Array:
    """Return the fraction of the learning rate on a straight line down to final_fraction."""
    return 1 - (1 - hyper["final_fraction"]) * progress


def _cosine(step: jax.Array, hyper: Hyper) -> jax.Array:
    progress = _progress(hyper, hyper["warmup_steps"], step)
    return _down(hyper, (1 - jnp.cos(jnp.pi * progress)) / 2)


def _linear(step: jax.Array, hyper: Hyper) -> jax.Array:
    return _down(hyper, _progress(hyper, hyper["warmup_steps"], step))


def _inverse_sqrt(step: jax.Array, hyper: Hyper) -> jax.Array:
    warm = hyper["warmup_steps"] + 1
    return jnp.sqrt(warm / jnp.maximum(step + 1, warm))


def _wsd(step: jax.Array, hyper: Hyper) -> jax.Array:
    return _down(hyper, _progress(hyper, hyper["decay_begin"], step + 1))


SCHEDULES: dict[str, Callable[[jax.Array, Hyper], jax.Array]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": lambda step, hyper: jnp.ones(()),
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _wsd,
}


def learning_rate(schedule: str, step: jax.Array, hyper: Hyper) -> jax.Array:
    """Return the learning rate of the 0-based `step`: linear warmup, then the schedule."""
    step = jnp.asarray(step, jnp.float32)
    warmup = jnp.minimum((step + 1) / (hyper["warmup_steps"] + 1), 1)
    return hyper["learning_rate"] * warmup * SCHEDULES[schedule](step, hyper)
