"""Kernels of a frozen base as int8 with a scale for each output, a quarter of float32's bytes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import Parameter, Params, Table, parameters

LARGEST = 127  # -128 is not used, so that the range is symmetric


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A kernel of one layer, or of a stack of layers: `values` times the scale of their output."""

    values: jax.Array  # int8, in the shape of the kernel
    scale: jax.Array  # float32, in the shape of the kernel without what a product sums over


def quantize_base(cfg: ModelConfig, frozen: Params) -> Params:
    """Return frozen parameters with their kernels as lora.base_dtype says."""
    return _replace(cfg, frozen, _quantize)


def dequantize_base(cfg: ModelConfig, params: Params) -> Params:
    """Return parameters with the kernels that are int8 as arrays of cfg.param_dtype."""

    def dequantize(kernel: Any, row: Parameter) -> jax.Array:
        if not isinstance(kernel, Int8):
            return kernel
        scale = jnp.expand_dims(kernel.scale, _summed(row))
        return (kernel.values * scale).astype(cfg.param_dtype)

    return _replace(cfg, params, dequantize)


def _replace(cfg: ModelConfig, params: Params, change: Callable[[Any, Parameter], Any]) -> Params:
    """Return the parameters with `change` of each kernel of the layers, if any may be int8."""
    if cfg.lora.base_dtype != "int8":
        return params
    found = {name: dict(part) if name in cfg.stacks else part for name, part in params.items()}
    for row in parameters(cfg).values():
        part = found.get(row.stack, {})
        if row.kind == "kernel" and row.name in part:
            part[row.name] = change(part[row.name], row)
    return found


def _summed(row: Parameter) -> tuple[int, ...]:
    """Return the dimensions of a stack's kernel that a product sums over."""
    return tuple(axis + 1 for axis in row.summed)


def _quantize(kernel: jax.Array, row: Parameter) -> Int8:
    """Return a stack's kernel as int8, rounded to the nearest."""
    kernel, summed = kernel.astype(jnp.float32), _summed(row)
    largest = jnp.max(jnp.abs(kernel), summed, keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST, 1.0)
    values = jnp.round(kernel / scale).astype(jnp.int8)
    return Int8(values, jnp.squeeze(scale, summed))


def with_int8_rows(table: Table) -> Table:
    """Return the table with rows for the two arrays of a kernel that is int8."""
    found = dict(table)
    for path, row in table.items():
        outer = [axis for axis in range(len(row.shape)) if axis not in row.summed]
        shape, axes = (tuple(part[axis] for axis in outer) for part in (row.shape, row.axes))
        if row.kind == "kernel":
            found[f"{path}/values"] = row._replace(name=f"{row.name}/values")
            scale = row._replace(name=f"{row.name}/scale", shape=shape, axes=axes, summed=())
            found[f"{path}/scale"] = scale
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project_int8(x_TI: jax.Array, kernel: Int8, terms: str) -> jax.Array:
    """Return x [T, in] times a kernel of one layer as a matrix, by the terms of `project`.

    What the backward pass keeps is the int8 kernel: by itself jax would keep the converted one of
    every layer.
    """
    y_TO = jnp.einsum(terms, x_TI, kernel.values.astype(x_TI.dtype))
    return y_TO * kernel.scale.astype(y_TO.dtype)


def _forward(x_TI: jax.Array, kernel: Int8, terms: str) -> tuple[jax.Array, Int8]:
    return project_int8(x_TI, kernel, terms), kernel


def _backward(terms: str, kernel: Int8, dy_TO: jax.Array) -> tuple[jax.Array, Int8]:
    matrix = terms.removeprefix("TI,").removesuffix("->TO")
    dy_TO = dy_TO * kernel.scale.astype(dy_TO.dtype)
    dx_TI = jnp.einsum(f"TO,{matrix}->TI", dy_TO, kernel.values.astype(dy_TO.dtype))
    none: Any = np.zeros(kernel.values.shape, jax.dtypes.float0)  # integers have no gradient
    return dx_TI, Int8(none, jnp.zeros_like(kernel.scale))


project_int8.defvjp(_forward, _backward)
