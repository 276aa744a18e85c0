"""The optimizer, its state, and path patterns; every number may be traced."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanojaxgpt.checks import compile_pattern, parse_multiplier
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.matrices import muon, scale_by_adafactor
from nanojaxgpt.model.parameters import Table
from nanojaxgpt.schedules import Hyper

# What chooses parameters: a pattern that is found in their paths, "a/b/c", or the paths.
Chosen = str | frozenset[str]


# (what is chosen, the factor of its learning rate)
Multipliers = Sequence[tuple[Chosen, jax.Array | float]]


def path_mask(tree: Any, chosen: Chosen) -> Any:
    """Return a tree of bools: True for the leaves that are chosen; "" chooses none."""

    def found(path: tuple, _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(chosen, frozenset):
            return name in chosen
        return bool(chosen and compile_pattern(chosen).search(name))

    return jax.tree_util.tree_map_with_path(found, tree)


def check_pattern(field: str, pattern: str, table: Table) -> None:
    """Raise ConfigError, naming `field`, where a pattern is found in no path of the table."""
    if pattern and not any(map(compile_pattern(pattern).search, table)):
        raise ConfigError(f"{field}={pattern!r} matches no parameter")


def decay_weights(
    hyper: Hyper, pattern: str, multipliers: Multipliers
) -> optax.GradientTransformation:
    """Return the transformation that adds weight_decay * p where the path of p has `pattern`.

    The learning rate then multiplies both. Independent decay is over the path's own peak rate, so
    that what is left is the schedule's factor alone: p -= factor (learning_rate direction +
    weight_decay p) (Wortsman 2023); what is frozen does not decay either.
    """

    def add_decay(updates: Any, params: Any) -> Any:
        mask = path_mask(params, pattern)
        factors = scale_paths(jax.tree.map(lambda _: jnp.float32(1), params), multipliers)

        def add(update: jax.Array, p: jax.Array, decays: bool, factor: jax.Array) -> jax.Array:
            if not decays:
                return update
            independent = (hyper["independent_decay"] > 0) & (factor > 0)
            peak = jnp.where(independent, hyper["learning_rate"] * factor, 1)
            return update + (hyper["weight_decay"] / peak).astype(p.dtype) * p

        return jax.tree.map(add, updates, params, mask, factors)

    return optax.stateless(add_decay)


# Each returns the direction of a step; decay and the learning rate are the same for all.
OPTIMIZERS: dict[str, Callable[[Hyper, Table], optax.GradientTransformation]] = {
    "adamw": lambda hyper, _: optax.scale_by_adam(hyper["beta1"], hyper["beta2"], hyper["eps"]),
    "adafactor": lambda _, table: scale_by_adafactor(table),
    "lion": lambda hyper, _: optax.scale_by_lion(hyper["beta1"], hyper["beta2"]),
    "sgd": lambda hyper, _: optax.trace(hyper["beta1"]),
    "muon": lambda hyper, table: muon(hyper["beta1"], OPTIMIZERS["adamw"](hyper, table), table),
    # The averaging below stands for the momentum.
    "schedule_free": lambda hyper, _: optax.scale_by_rms(
        hyper["beta2"], hyper["eps"], eps_in_sqrt=False, bias_correction=True
    ),
}


def make_optimizer(
    name: str,
    table: Table,
    hyper: Hyper,
    rate: jax.Array | float,
    decay_pattern: str,
    multipliers: Multipliers = (),
    ema: bool = False,
) -> optax.GradientTransformation:
    """Return the optimizer at learning rate `rate`; `hyper` and `rate` may be traced.

    Its state's structure depends on `name`, `ema` and the table of the parameters alone, so it can
    be rebuilt inside every step. Gradients and parameters are float32, see `Master`. The learning
    rate of what `multipliers` choose is multiplied by the factor, and with it their decay if that
    is not independent; 0 freezes them. With `ema`, and for schedule_free, the
    parameters are an average, see `average`.
    """
    optimizer = optax.chain(
        OPTIMIZERS[name](hyper, table),
        decay_weights(hyper, decay_pattern, multipliers),
        optax.scale(-rate),
        optax.stateless(lambda updates, _: scale_paths(updates, multipliers)),
    )
    return average(name, optimizer, hyper, rate) if ema or name == "schedule_free" else optimizer


class Averaged(NamedTuple):
    """The state of an optimizer that moves parameters of its own, `fast`, and averages them."""

    inner: Any
    fast: Any
    weight: jax.Array  # of all steps in the average, float32


def average(
    name: str, inner: optax.GradientTransformation, hyper: Hyper, rate: jax.Array | float
) -> optax.GradientTransformation:
    """Return the transformation whose parameters are the average of those that `inner` moves.

    So what is evaluated, sampled and saved as the parameters is the average, and the others are
    state of the optimizer. A step weighs as the square of its learning rate for schedule_free
    (Defazio 2024); else all weigh the same, and fade by ema_decay with every step.
    """
    fades = 1.0 if name == "schedule_free" else hyper["ema_decay"]
    newest = jnp.square(rate) if name == "schedule_free" else 1.0

    def init(params: Any) -> Averaged:
        return Averaged(inner.init(params), jax.tree.map(jnp.copy, params), jnp.float32(0))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Averaged]:
        point = gradient_point(name, hyper, params, state)
        steps, inner_state = inner.update(updates, state.inner, point)
        fast = optax.apply_updates(state.fast, steps)
        weight = fades * state.weight + newest
        share = newest / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
        moved = jax.tree.map(lambda x, z: share.astype(x.dtype) * (z - x), params, fast)
        return moved, Averaged(inner_state, fast, weight)

    return optax.GradientTransformation(init, update)


def gradient_point(name: str, hyper: Hyper, params: Any, opt_state: Any) -> Any:
    """Return the parameters at which the gradient is taken: where they are an average, the fast.

    schedule_free takes it between the two, 1 - beta1 of the way from the average. The point is
    rounded to the dtype of the parameters.
    """
    weights, inner = split_master(params, opt_state)
    if not isinstance(inner, Averaged):
        return params
    point = inner.fast
    if name == "schedule_free":
        share = 1 - hyper["beta1"]
        point = jax.tree.map(lambda x, z: x + share.astype(x.dtype) * (z - x), weights, point)
    return cast_like(point, params)


class Master(NamedTuple):
    """The state of an optimizer whose parameters are stored in less than float32.

    An update below a parameter's precision would be lost, so the optimizer moves `weights`, in
    float32, and the parameters are these, rounded. `inner` is the state that it would have had.
    """

    inner: Any
    weights: Any


def cast_float32(tree: Any) -> Any:
    """Return the tree in float32; leaves that are come back as given."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def cast_like(tree: Any, like: Any) -> Any:
    """Return the tree with the dtypes of another."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def init_state(optimizer: optax.GradientTransformation, params: Any) -> Any:
    """Return the optimizer's first state, all in float32, with a master copy where it takes one."""
    weights = cast_float32(params)
    return join_master(weights, optimizer.init(weights), params)[1]


def split_master(params: Any, opt_state: Any) -> tuple[Any, Any]:
    """Return the float32 weights and the optimizer's state without them."""
    if isinstance(opt_state, Master):
        return opt_state.weights, opt_state.inner
    return params, opt_state


def join_master(weights: Any, inner: Any, params: Any) -> tuple[Any, Any]:
    """Return (parameters, optimizer's state) of float32 weights; `params` have the dtypes.

    The reverse of `split_master`.
    """
    stored = cast_like(weights, params)
    is_float32 = all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    return stored, inner if is_float32 else Master(inner, weights)


def is_average(opt_state: Any) -> bool:
    """Return whether the parameters are an average of those that the optimizer moves."""
    return isinstance(split_master(None, opt_state)[1], Averaged)


def scale_paths(tree: Any, multipliers: Multipliers) -> Any:
    """Return the tree with the leaves of each pattern's paths multiplied by its factor.

    0 gives zeros, whatever was there.
    """
    for pattern, factor in multipliers:
        mask = path_mask(tree, pattern)

        def scale(x: jax.Array, chosen: bool, factor: jax.Array | float = factor) -> jax.Array:
            if not chosen:
                return x
            number = jnp.asarray(factor, x.dtype)
            return jnp.where(number == 0, jnp.zeros_like(x), x * number)

        tree = jax.tree.map(scale, tree, mask)
    return tree


def frozen_gradients(grads: Any, multipliers: Multipliers) -> Any:
    """Return the gradients, zero for what is frozen, so that clipping does not count them."""
    alive = [(pattern, jnp.where(factor == 0, 0.0, 1.0)) for pattern, factor in multipliers]
    return scale_paths(grads, alive)


def rate_multipliers(
    entries: Sequence[str], optimizer: str, width: float, table: Table
) -> list[tuple[Chosen, float]]:
    """Return (chosen, factor) of "PATTERN=FACTOR" entries and of muP.

    `width` is the model's over that at which muP is the standard parametrization (1: off). The
    input and the output of the kernels both grow with it: their updates shrink as 1 / width where
    each number's size is normalized (Adam, Lion: Yang 2022, table 8), and as its root for Muon,
    whose spectral norm of 0.2 sqrt(width) should not grow. Raises ConfigError for an entry that
    can't be read.
    """
    try:
        found: list[tuple[Chosen, float]] = [parse_multiplier(entry) for entry in entries]
    except ValueError as error:
        raise ConfigError(f"optim.rate_multipliers: {error}") from None
    power = {"adamw": 1, "adafactor": 1, "lion": 1, "schedule_free": 1, "muon": 0.5, "sgd": 0}
    if width != 1:
        kernels = frozenset(path for path, row in table.items() if row.kind == "kernel")
        found.append((kernels, width ** -power[optimizer]))
    return found


def clip_factor(norm: jax.Array, clip_norm: jax.Array) -> jax.Array:
    """Return the factor that brings a gradient of this norm down to `clip_norm`; 0: no clipping."""
    return jnp.where(clip_norm > 0, jnp.minimum(1, clip_norm / (norm + 1e-6)), 1)


NORM_WINDOW, NORMS_NEEDED = 128, 16  # how far back the mean reaches, and when it is trusted


class Recent(NamedTuple):
    """The recent gradients' norms, of updates that were made, and how many were left out in a row.

    Scalars: the mean and its weight, both float32, and an int32.
    """

    norm: jax.Array
    weight: jax.Array
    skipped: jax.Array

    def remember(self, norm: jax.Array, made: jax.Array) -> "Recent":
        """Return what is recent after an update with this norm, made or left out."""
        weight = self.weight * (1 - 1 / NORM_WINDOW) + 1
        mean = self.norm + (norm - self.norm) / weight
        after = Recent(mean, weight, jnp.zeros_like(self.skipped))
        return jax.tree.map(
            lambda new, old: jnp.where(made, new, old),
            after,
            self._replace(skipped=self.skipped + 1),
        )

    def norm_limit(self, spike_factor: jax.Array) -> jax.Array:
        """Return the norm above which an update is left out; infinite while there are too few.

        OLMo-core and Levanter so leave out what is six deviations over the mean of 128 steps; a
        factor of the mean needs no second figure, and has a meaning before the run is known.
        """
        active = (spike_factor > 0) & (self.weight > NORMS_NEEDED)
        return jnp.where(active, spike_factor * self.norm, jnp.inf)


def init_recent() -> Recent:
    """Return what is recent before the first step."""
    return Recent(jnp.float32(0), jnp.float32(0), jnp.int32(0))
