"""Optimizers that treat a layer's kernels as matrices: Muon and Adafactor."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from nanojaxgpt.model.parameters import Parameter, Params, PyTree, Table, row_of


def leaf_row(path: tuple, table: Table) -> Parameter | None:
    """Return the row of a leaf; None where the table has none."""
    return row_of(jax.tree_util.keystr(path, simple=True, separator="/"), table)


def muon_dimensions(params: PyTree, table: Table) -> PyTree:
    """Return the axes of each leaf that are the rows and columns of a matrix for Muon.

    The kernels of the layers are matrices, one for each layer; tables, norms, biases and the head
    are not (Jordan 2024), and get None.
    """

    def dimensions(path: tuple, _: jax.Array) -> MuonDimensionNumbers | None:
        row = leaf_row(path, table)
        if row is None or row.kind != "kernel":
            return None
        first = len(row.logical_axes) - len(row.axes)  # after that of the layers
        inputs = tuple(first + axis for axis in row.summed)
        outputs = [first + axis for axis in range(len(row.axes)) if axis not in row.summed]
        return MuonDimensionNumbers(inputs, tuple(outputs))

    return jax.tree_util.tree_map_with_path(dimensions, params)


def is_dimensions(x: object) -> bool:
    """Return whether this is a leaf of the tree that `muon_dimensions` returns."""
    return x is None or isinstance(x, MuonDimensionNumbers)


def muon(
    momentum: jax.Array | float, rest: optax.GradientTransformation, table: Table
) -> optax.GradientTransformation:
    """Return Muon for the kernels and another optimizer, Adam, for the rest.

    An update has a root mean square of 0.2, about Adam's, so that both take one learning rate
    and one decay (Liu 2025, "Muon is scalable for LLM training").
    """

    def labels(params: PyTree) -> PyTree:
        found = muon_dimensions(params, table)
        return jax.tree.map(lambda d: "muon" if d else "adam", found, is_leaf=is_dimensions)

    def resize(updates: PyTree, _: PyTree) -> PyTree:
        def leaf(update: jax.Array, dimensions: Any) -> jax.Array:
            sides = [math.prod(update.shape[axis] for axis in axes) for axes in dimensions]
            return update * (0.2 * math.sqrt(max(sides)))

        return jax.tree.map(leaf, updates, muon_dimensions(updates, table))

    dimensions = functools.partial(muon_dimensions, table=table)
    orthogonal = scale_by_muon(beta=momentum, weight_dimension_numbers=dimensions)
    kernels = optax.chain(orthogonal, optax.stateless(resize))
    return optax.partition({"muon": kernels, "adam": rest}, labels)


class Factored(NamedTuple):
    """Adafactor's state: the running mean square of each row and column of a matrix's gradient.

    For other leaves, `rows` is the running mean of the squares, and `columns` has no leaf.
    """

    count: jax.Array
    rows: PyTree
    columns: PyTree


def adafactor_axes(params: Params, table: Table) -> PyTree:
    """Return the axes of rows and columns of each leaf: Muon's, and those of the tables."""

    def axes(path: tuple, dimensions: MuonDimensionNumbers | None) -> MuonDimensionNumbers | None:
        row = leaf_row(path, table)
        if row and row.is_matrix and dimensions is None:
            return MuonDimensionNumbers((0,), (1,))
        return dimensions

    found = muon_dimensions(params, table)
    return jax.tree_util.tree_map_with_path(axes, found, is_leaf=is_dimensions)


def scale_by_adafactor(table: Table) -> optax.GradientTransformation:
    """Return Adafactor (Shazeer 2018) without momentum, relative steps or parameter scaling.

    The update of each layer's kernel, and of each layer's vector, is clipped to a root mean square
    of 1. Learning rate, decay and schedule are those of all optimizers.
    """

    def init(params: PyTree) -> Factored:
        def zeros(leaf: jax.Array, without: tuple[int, ...]) -> jax.Array:
            kept = [size for axis, size in enumerate(leaf.shape) if axis not in without]
            return jnp.zeros(kept, jnp.float32)

        def rows(axes: Any, leaf: jax.Array) -> jax.Array:
            return zeros(leaf, axes.output_axis if axes else ())

        def columns(axes: Any, leaf: jax.Array) -> Any:
            return zeros(leaf, axes.reduction_axis) if axes else optax.MaskedNode()

        both = adafactor_axes(params, table), params
        return Factored(
            jnp.int32(0),
            jax.tree.map(rows, *both, is_leaf=is_dimensions),
            jax.tree.map(columns, *both, is_leaf=is_dimensions),
        )

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, Factored]:
        count = state.count + 1
        fade = 1 - count.astype(jnp.float32) ** -0.8

        def leaf(path: tuple, grad: jax.Array, axes: Any, rows: Any, columns: Any) -> tuple:
            square = jnp.square(grad) + 1e-30
            if axes is None:
                rows = fade * rows + (1 - fade) * square
                moved = grad * jax.lax.rsqrt(rows)
            else:
                inputs, outputs = axes
                rows = fade * rows + (1 - fade) * jnp.mean(square, outputs)
                columns = fade * columns + (1 - fade) * jnp.mean(square, inputs)
                by_row = jnp.expand_dims(rows, outputs)
                by_row /= jnp.mean(by_row, inputs, keepdims=True)
                by_column = jnp.expand_dims(columns, inputs)
                moved = grad * jax.lax.rsqrt(by_row) * jax.lax.rsqrt(by_column)
            row = leaf_row(path, table)
            own = range(1 if row and row.stack else 0, grad.ndim)  # one layer's axes
            size = jnp.sqrt(jnp.mean(jnp.square(moved), tuple(own), keepdims=True))
            return moved / jnp.maximum(1, size), rows, columns

        paths, tree = jax.tree_util.tree_flatten_with_path(updates)
        others = adafactor_axes(updates, table), state.rows, state.columns
        found = [
            leaf(path, grad, *rest)
            for (path, grad), *rest in zip(paths, *map(tree.flatten_up_to, others), strict=True)
        ]
        moved, rows, columns = (tree.unflatten(part) for part in zip(*found, strict=True))
        return moved, Factored(count, rows, columns)

    return optax.GradientTransformation(init, update)
