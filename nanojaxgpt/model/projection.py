"""In: activations and a kernel. Out: their product; and kernels laid out for decoding.

Dimensions: T tokens, I in, O out, G blocks.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import Parameter, Params, layer_rows

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
    x_BTI: jax.Array, kernel: jax.Array | Blocks, terms: str = "TI,IO->TO", dtype: Any = None
) -> jax.Array:
    """Return x [B, T, in] times a kernel of two dimensions, [B, T, out].

    The tokens are flattened to one dimension: with two, XLA transposes copies of them for the
    kernel's gradient (1.2x of an MLP's time on CPU).
    """
    x_TI = x_BTI.reshape(-1, x_BTI.shape[-1])
    if isinstance(kernel, Blocks):
        y_GTO = jax.lax.map(lambda block_IO: x_TI @ block_IO, kernel.blocks_GIO)
        y_TO = jnp.swapaxes(y_GTO, 0, 1).reshape(len(x_TI), -1)[:, : kernel.width]
    else:
        y_TO = jnp.einsum(terms, x_TI, kernel, preferred_element_type=dtype)
    return y_TO.reshape(*x_BTI.shape[:-1], -1)


def as_matrix(kernel: jax.Array, row: Parameter) -> jax.Array:
    """Return a kernel of one layer as a matrix [in, out]."""
    kernel = jnp.moveaxis(kernel, row.summed, range(len(row.summed)))
    inputs = [row.shape[axis] for axis in row.summed]
    return kernel.reshape(math.prod(inputs), -1)


def decoding_params(cfg: ModelConfig, params: Params, rows: int) -> Params:
    """Return the parameters laid out for decoding `rows` rows; those that are come back as given.

    The layers become a tuple: a decoding loop reads each in place, where from a stack it would
    copy every layer at every token (2x of the time on CPU). A few rows times a kernel are bound by
    reading the kernel, which XLA's CPU matmul does at 4 to 6 GB/s, and at 7 to 9 in blocks.
    """
    if isinstance(params.get("layers"), tuple):
        return params
    rest = {name: leaf for name, leaf in params.items() if name not in cfg.stacks}
    layers = [
        jax.tree.map(lambda w, row=row: w[row], dict(params[stack])) for stack, row in cfg.places
    ]
    is_float32 = params["embed_VD"].dtype == jnp.float32
    alone = jax.sharding.get_abstract_mesh().size <= 1  # a block of a sharded kernel is no shard
    if jax.default_backend() == "cpu" and is_float32 and rows <= MOST_ROWS and alone:
        head_VD = rest.pop("head_VD", params["embed_VD"])
        rest["head_VD"] = cut(head_VD.T, COLUMNS if rows > 1 else len(head_VD))
        for index, layer in enumerate(layers if rows > 1 else []):
            for name, row in layer_rows(cfg, cfg.layer(index)).items():
                if row.kind == "kernel":
                    layer[name] = cut(as_matrix(layer[name], row), COLUMNS)
    return {**rest, "layers": tuple(layers)}
