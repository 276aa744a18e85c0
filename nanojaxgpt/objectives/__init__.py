"""Objectives: what training minimizes, one file each, all with the contract `Loss`."""

from collections.abc import Callable

import jax

from nanojaxgpt.model.parameters import Params, PyTree
from nanojaxgpt.schedules import Hyper

# A sum and its weight: their quotients are means, and sums add up exactly over micro-batches.
Metric = tuple[jax.Array, jax.Array]

# loss(params, frozen, batch, hyper, rng) -> (sum, weight, {metric: (sum, weight)}). `params` are
# the parameters that train, `frozen` the others (see trainable.py), `batch` any tree of arrays with
# rows first, `hyper` the step's numbers. The gradient is that of sum / weight.
Loss = Callable[
    [Params, Params, PyTree, Hyper, jax.Array], tuple[jax.Array, jax.Array, dict[str, Metric]]
]
