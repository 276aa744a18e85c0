"""The optimizer, its state, and path patterns; every number may be traced."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from nanojaxgpt.checks import compile_pattern, parse_multiplier
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.matrices import muon, scale_by_adafactor
from nanojaxgpt.model.parameters import Params, PyTree, Table
from nanojaxgpt.schedules import Hyper

# A choice of parameters: a pattern to search for in their paths, "a/b/c", or the paths.
Chosen = str | frozenset[str]


# (choice of parameters, factor of their learning rate)
Multipliers = Sequence[tuple[Chosen, jax.Array | float]]


def path_mask(tree: PyTree, chosen: Chosen) -> PyTree:
    """Return a tree of bools: True for the chosen leaves; "" chooses none."""

    def found(path: tuple, _: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(chosen, frozenset):
            return name in chosen
        return bool(chosen and compile_pattern(chosen).search(name))

    return jax.tree_util.tree_map_with_path(found, tree)


def check_pattern(field: str, pattern: str, table: Table) -> None:
    """Raise ConfigError, naming `field`, if a pattern matches no path of the table."""
    if pattern and not any(map(compile_pattern(pattern).search, table)):
        raise ConfigError(f"{field}={pattern!r} matches no parameter")


def decay_weights(
    hyper: Hyper, pattern: str, multipliers: Multipliers
) -> optax.GradientTransformation:
    """Return the transformation that adds weight_decay * p where the path of p matches `pattern`.

    The learning rate then multiplies both. Independent decay is divided by the path's own peak
    rate, so that only the schedule's factor remains: p -= factor (learning_rate direction +
    weight_decay p) (Wortsman 2023). Parameters with a factor of 0 do not decay either.
    """

    def add_decay(updates: PyTree, params: PyTree) -> PyTree:
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


# Each returns the direction of a step; decay and the learning rate are common to all.
OPTIMIZERS: dict[str, Callable[[Hyper, Table], optax.GradientTransformation]] = {
    "adamw": lambda hyper, _: optax.scale_by_adam(hyper["beta1"], hyper["beta2"], hyper["eps"]),
    "adafactor": lambda _, table: scale_by_adafactor(table),
    "lion": lambda hyper, _: optax.scale_by_lion(hyper["beta1"], hyper["beta2"]),
    "sgd": lambda hyper, _: optax.trace(hyper["beta1"]),
    "muon": lambda hyper, table: muon(hyper["beta1"], OPTIMIZERS["adamw"](hyper, table), table),
    # The averaging below takes the place of momentum.
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

    Its state's structure depends only on `name`, `ema` and the table of parameters, so it can be
    rebuilt inside every step. Gradients and parameters are float32, see `Master`. `multipliers`
    scale the learning rate of the parameters they choose, and with it their decay unless that is
    independent; a factor of 0 freezes them. With `ema`, and for schedule_free, the parameters are
    an average, see `average`.
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

    inner: PyTree
    fast: PyTree
    weight: jax.Array  # total of the steps in the average, float32


def average(
    name: str, inner: optax.GradientTransformation, hyper: Hyper, rate: jax.Array | float
) -> optax.GradientTransformation:
    """Return the transformation whose parameters are the average of those that `inner` moves.

    The average is evaluated, sampled and saved as the parameters; the parameters that `inner`
    moves are optimizer state. For schedule_free the weight of a step is the square of its learning
    rate (Defazio 2024); otherwise all steps weigh the same, and decay by ema_decay at every step.
    """
    fades = 1.0 if name == "schedule_free" else hyper["ema_decay"]
    newest = jnp.square(rate) if name == "schedule_free" else 1.0

    def init(params: PyTree) -> Averaged:
        return Averaged(inner.init(params), jax.tree.map(jnp.copy, params), jnp.float32(0))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, Averaged]:
        point = gradient_point(name, hyper, params, state)
        steps, inner_state = inner.update(updates, state.inner, point)
        fast = optax.apply_updates(state.fast, steps)
        weight = fades * state.weight + newest
        share = newest / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny)
        moved = jax.tree.map(lambda x, z: share.astype(x.dtype) * (z - x), params, fast)
        return moved, Averaged(inner_state, fast, weight)

    return optax.GradientTransformation(init, update)


def gradient_point(name: str, hyper: Hyper, params: Params, opt_state: PyTree) -> Params:
    """Return the parameters at which the gradient is taken.

    If the parameters are an average, these are the fast ones; for schedule_free a point between
    the two, 1 - beta1 of the way from the average. It is rounded to the dtype of the parameters.
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

    An update below a parameter's precision would be lost. So the optimizer moves a float32 copy,
    `weights`, and the parameters are its rounded values; `inner` is the optimizer's own state.
    """

    inner: PyTree
    weights: Params


def cast_float32(tree: PyTree) -> PyTree:
    """Return the tree in float32; float32 leaves are returned unchanged."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Return the tree with the dtypes of another."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def init_state(optimizer: optax.GradientTransformation, params: Params) -> PyTree:
    """Return the optimizer's initial state, all float32, with a master copy where needed."""
    weights = cast_float32(params)
    return join_master(weights, optimizer.init(weights), params)[1]


def split_master(params: Params, opt_state: PyTree) -> tuple[Params, PyTree]:
    """Return the float32 weights and the optimizer's state without them."""
    if isinstance(opt_state, Master):
        return opt_state.weights, opt_state.inner
    return params, opt_state


def join_master(weights: Params, inner: PyTree, params: Params) -> tuple[Params, PyTree]:
    """Return (parameters, optimizer state) from float32 weights, with the dtypes of `params`.

    The reverse of `split_master`.
    """
    stored = cast_like(weights, params)
    is_float32 = all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    return stored, inner if is_float32 else Master(inner, weights)


def is_average(opt_state: PyTree) -> bool:
    """Return whether the parameters are an average of those that the optimizer moves."""
    return isinstance(split_master({}, opt_state)[1], Averaged)


def scale_paths(tree: PyTree, multipliers: Multipliers) -> PyTree:
    """Return the tree with the leaves of each pattern's paths multiplied by its factor.

    A factor of 0 gives zeros, also where a value is not finite.
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


def frozen_gradients(grads: PyTree, multipliers: Multipliers) -> PyTree:
    """Return the gradients with zeros where the factor is 0, so that clipping ignores them."""
    alive = [(pattern, jnp.where(factor == 0, 0.0, 1.0)) for pattern, factor in multipliers]
    return scale_paths(grads, alive)


def rate_multipliers(
    entries: Sequence[str], optimizer: str, width: float, table: Table
) -> list[tuple[Chosen, float]]:
    """Return the (chosen, factor) pairs of "PATTERN=FACTOR" entries and of muP.

    `width` is relative to the width at which muP is the standard parametrization (1: off). Inputs
    and outputs of the kernels grow with it. Updates whose numbers are normalized one by one shrink
    as 1 / width (Adam, Lion: Yang 2022, table 8); Muon's as its root, so that their spectral norm
    of 0.2 sqrt(width) does not grow. Raises ConfigError for an entry that can't be parsed.
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
    """Return the factor that scales a gradient of this norm to `clip_norm` or less; 0: off."""
    return jnp.where(clip_norm > 0, jnp.minimum(1, clip_norm / (norm + 1e-6)), 1)


NORM_WINDOW, NORMS_NEEDED = 128, 16  # norms that the mean covers, and the number it needs


class Recent(NamedTuple):
    """The running mean norm of applied updates, and the number of updates skipped in a row.

    Scalars: the mean and its total weight, both float32, and an int32.
    """

    norm: jax.Array
    weight: jax.Array
    skipped: jax.Array

    def remember(self, norm: jax.Array, applied: jax.Array) -> "Recent":
        """Return the statistics after an update with this norm, applied or skipped."""
        weight = self.weight * (1 - 1 / NORM_WINDOW) + 1
        mean = self.norm + (norm - self.norm) / weight
        after = Recent(mean, weight, jnp.zeros_like(self.skipped))
        return jax.tree.map(
            lambda new, old: jnp.where(applied, new, old),
            after,
            self._replace(skipped=self.skipped + 1),
        )

    def norm_limit(self, spike_factor: jax.Array) -> jax.Array:
        """Return the norm above which an update is skipped; infinite while there are too few norms.

        OLMo-core and Levanter skip at six standard deviations above the mean of 128 steps. A
        multiple of the mean needs no second statistic, and can be chosen before the run is known.
        """
        active = (spike_factor > 0) & (self.weight > NORMS_NEEDED)
        return jnp.where(active, spike_factor * self.norm, jnp.inf)


def init_recent() -> Recent:
    """Return the initial gradient-norm statistics."""
    return Recent(jnp.float32(0), jnp.float32(0), jnp.int32(0))
