"""Learning-rate schedules, the optimizer, and path patterns; every number may be traced."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nanojaxgpt.errors import ConfigError

Hyper = Mapping[str, Any]  # the numbers of cfg.optim, num_steps, z_loss and seed; never a shape


def _decay(hyper: Hyper, begin: jax.Array, step: jax.Array) -> jax.Array:
    """Return how far `step` is from `begin` to the last step, from 0 to 1."""
    return jnp.clip((step - begin) / jnp.maximum(hyper["num_steps"] - begin, 1), 0, 1)


def _down(hyper: Hyper, progress: jax.Array) -> jax.Array:
    """Return the fraction of the learning rate on a straight line down to final_fraction."""
    return 1 - (1 - hyper["final_fraction"]) * progress


def _cosine(step: jax.Array, hyper: Hyper) -> jax.Array:
    progress = _decay(hyper, hyper["warmup_steps"], step)
    return _down(hyper, (1 - jnp.cos(jnp.pi * progress)) / 2)


def _linear(step: jax.Array, hyper: Hyper) -> jax.Array:
    return _down(hyper, _decay(hyper, hyper["warmup_steps"], step))


def _inverse_sqrt(step: jax.Array, hyper: Hyper) -> jax.Array:
    warm = hyper["warmup_steps"] + 1
    return jnp.sqrt(warm / jnp.maximum(step + 1, warm))


def _wsd(step: jax.Array, hyper: Hyper) -> jax.Array:
    begin = hyper["num_steps"] * (1 - hyper["decay_fraction"])
    return _down(hyper, _decay(hyper, begin, step))


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


def path_mask(tree: Any, pattern: str, field: str) -> Any:
    """Return a tree of bools: True where `pattern` is found in the leaf's path, "a/b/c".

    "" matches nothing. Raises ConfigError, naming `field`, where a pattern matches no path.
    """

    def found(path: tuple, _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return bool(pattern and re.search(pattern, name))

    mask = jax.tree_util.tree_map_with_path(found, tree)
    if pattern and not any(jax.tree.leaves(mask)):
        raise ConfigError(f"{field}={pattern!r} matches no parameter")
    return mask


def decay_weights(weight_decay: jax.Array, pattern: str) -> optax.GradientTransformation:
    """Return the transformation that adds weight_decay * p where the path of p has `pattern`."""

    def add_decay(updates: Any, params: Any) -> Any:
        mask = path_mask(params, pattern, "optim.decay_pattern")

        def add(update: jax.Array, p: jax.Array, decays: bool) -> jax.Array:
            return update + weight_decay.astype(p.dtype) * p if decays else update

        return jax.tree.map(add, updates, params, mask)

    return optax.stateless(add_decay)


def make_optimizer(
    name: str, hyper: Hyper, rate: jax.Array | float, decay_pattern: str
) -> optax.GradientTransformation:
    """Return the optimizer at learning rate `rate`; `hyper` and `rate` may be traced.

    Its state's structure depends on `name` alone, so it can be rebuilt inside every step.
    """
    if name == "adamw":
        return optax.chain(
            optax.scale_by_adam(hyper["beta1"], hyper["beta2"], hyper["eps"]),
            decay_weights(hyper["weight_decay"], decay_pattern),
            optax.scale(-rate),
        )
    raise ConfigError(f"no optimizer {name}")


def clip_factor(norm: jax.Array, clip_norm: jax.Array) -> jax.Array:
    """Return the factor that brings a gradient of this norm down to `clip_norm`; 0: no clipping."""
    return jnp.where(clip_norm > 0, jnp.minimum(1, clip_norm / (norm + 1e-6)), 1)
