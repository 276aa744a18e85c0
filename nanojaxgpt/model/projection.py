"""In: activations and a kernel. Out: their product; and kernels laid out for decoding.

Dimensions: T tokens, I in, O out, G blocks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import Parameter, Params, layer_rows, parameters
from nanojaxgpt.model.quantize import Int8, dequantize_base, project_int8
from nanojaxgpt.products import alone_on_cpu, multiply, multiply_transposed

COLUMNS = 256  # of a block; with 128 or 512 it is read up to a third slower
MOST_ROWS = 64  # above, XLA's own matmul is as fast


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """A kernel [I, O] cut into blocks of columns that lie together; zeros fill the last."""

    blocks_GIO: jax.Array
    width: int = dataclasses.field(metadata=dict(static=True))


def cut(kernel_IO: jax.Array, columns: int) -> Blocks:
    """Return the kernel in blocks of `columns`."""
    inputs, width = kernel_IO.shape
    padded_IO = jnp.pad(kernel_IO, ((0, 0), (0, -width % columns)))
    return Blocks(padded_IO.reshape(inputs, -1, columns).swapaxes(0, 1), width)


def project(
    x_BTI: jax.Array,
    kernel: jax.Array | Blocks | Int8,
    terms: str = "TI,IO->TO",
    dtype: Any = None,
    recomputed: bool = False,
) -> jax.Array:
    """Return x [B, T, in] times a kernel of two dimensions, [B, T, out].

    The tokens are flattened to one dimension: with two, XLA transposes copies of them for the
    kernel's gradient (1.2x of an MLP's time on CPU). Within `jax.checkpoint` (`recomputed`) the
    gradient is jax's own: a policy sees no product in a function with another.
    """
    x_TI = x_BTI.reshape(-1, x_BTI.shape[-1])
    if len(x_TI) == 1 and x_TI.dtype == jnp.bfloat16 and alone_on_cpu():
        # XLA's CPU backend takes one row of bfloat16 at an eighth of the speed of two.
        y_TO = project(jnp.concatenate([x_TI, x_TI]), kernel, terms, dtype, recomputed)[:1]
        return y_TO.reshape(*x_BTI.shape[:-1], -1)
    if isinstance(kernel, Blocks):
        y_GTO = jax.lax.map(lambda block_IO: x_TI @ block_IO, kernel.blocks_GIO)
        y_TO = jnp.swapaxes(y_GTO, 0, 1).reshape(len(x_TI), -1)[:, : kernel.width]
    elif isinstance(kernel, Int8):
        y_TO = project_int8(x_TI, kernel, terms)
    elif not recomputed and (alone_on_cpu() or dtype is not None):
        y_TO = project_matrix(x_TI, kernel, terms, dtype)
    else:
        y_TO = jnp.einsum(terms, x_TI, kernel, preferred_element_type=dtype)
    return y_TO.reshape(*x_BTI.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project_matrix(x_TI: jax.Array, kernel: jax.Array, terms: str, dtype: Any) -> jax.Array:
    """Return x [T, in] times a kernel as a matrix, both of one dtype, by the terms of `project`.

    The gradients are products of that dtype, too, summed in float32: left to jax, those of float32
    logits of a model in bfloat16 would be products of float32.
    """
    return multiply(terms, x_TI, kernel, dtype or x_TI.dtype)


def _forward(x_TI: jax.Array, kernel: jax.Array, terms: str, dtype: Any) -> tuple:
    return project_matrix(x_TI, kernel, terms, dtype), (x_TI, kernel)


def _backward(terms: str, dtype: Any, kept: tuple, dy_TO: jax.Array) -> tuple:
    x_TI, kernel = kept
    dy_TO, matrix = dy_TO.astype(x_TI.dtype), terms.removeprefix("TI,").removesuffix("->TO")
    dx_TI = multiply(f"TO,{matrix}->TI", dy_TO, kernel, x_TI.dtype)
    first, second = (x_TI, dy_TO) if matrix == "IO" else (dy_TO, x_TI)
    return dx_TI, multiply_transposed(first, second, x_TI.dtype)


project_matrix.defvjp(_forward, _backward)


def as_matrix(kernel: jax.Array, row: Parameter) -> jax.Array:
    """Return a kernel of one layer as a matrix [in, out]."""
    kernel = jnp.moveaxis(kernel, row.summed, range(len(row.summed)))
    inputs = [row.shape[axis] for axis in row.summed]
    return kernel.reshape(math.prod(inputs), -1)


def call(change: Callable, *given: Any) -> Any:
    """Return change(*given)."""
    return change(*given)


def decoding_params(
    cfg: ModelConfig, params: Params, rows: int, apply: Callable[..., Any] = call
) -> Params:
    """Return the parameters laid out for decoding `rows` rows; those that are come back as given.

    The layers become a tuple: a decoding loop reads each in place, where from a stack it would
    copy every layer at every token (2x of the time on CPU). Matrices are cast to the compute dtype,
    which each token would do again (5x in bfloat16). A few rows times a kernel are bound by
    reading the kernel, which XLA's CPU matmul does at 4 to 6 GB/s, and at 7 to 9 in blocks.
    Each array is changed by `apply(change, array, *static)`, so that a caller can keep the result.
    """
    if isinstance(params.get("layers"), tuple):
        return params
    params = dequantize_base(cfg, params)
    dtype, table = jnp.dtype(cfg.compute_dtype), parameters(cfg)

    def lay_out(path: str, leaf: jax.Array) -> Any:
        row = table[path]
        wanted = dtype.name if row.is_matrix else leaf.dtype.name
        if row.stack:
            return apply(unstack, leaf, wanted)
        return leaf if leaf.dtype == wanted else apply(cast, leaf, wanted)

    rest = {name: lay_out(name, leaf) for name, leaf in params.items() if name not in cfg.stacks}
    parts = {
        stack: {name: lay_out(f"{stack}/{name}", leaf) for name, leaf in params[stack].items()}
        for stack in cfg.stacks
    }
    layers = [{name: of[row] for name, of in parts[stack].items()} for stack, row in cfg.places]
    # Of float32 alone; and a block of a sharded kernel is no shard.
    if alone_on_cpu() and dtype == jnp.float32 and rows <= MOST_ROWS:
        head_VD = rest.pop("head_VD", rest["embed_VD"])
        rest["head_VD"] = apply(cut_head, head_VD, COLUMNS if rows > 1 else len(head_VD))
        for index, layer in enumerate(layers if rows > 1 else []):
            for name, row in layer_rows(cfg, cfg.layer(index)).items():
                if row.kind == "kernel":
                    layer[name] = cut(as_matrix(layer[name], row), COLUMNS)
    return {**rest, "layers": tuple(layers)}


def cast(array: jax.Array, dtype: str) -> jax.Array:
    """Return the array in a dtype."""
    return array.astype(dtype)


def unstack(stacked: jax.Array, dtype: str) -> tuple[jax.Array, ...]:
    """Return the layers of a stack of parameters in a dtype."""
    return tuple(layer.astype(dtype) for layer in stacked)


def cut_head(head_VD: jax.Array, columns: int) -> Blocks:
    """Return a head in blocks of `columns` ids."""
    return cut(head_VD.T, columns)
