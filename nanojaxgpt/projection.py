"""In: activations and a kernel. Out: their product; and kernels laid out for decoding.

Dimensions: T tokens, I in, O out, G blocks.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

COLUMNS = 256  # of a block; with 128 or 512 it is read up to a third slower
MOST_ROWS = 64  # above, XLA's own matmul is as fast

# A layer's kernels, and how many of their first dimensions are summed over; 0: stored [out, in].
INPUTS = {"q_DNH": 1, "k_DKH": 1, "v_DKH": 1, "o_NHD": 2, "gate_DF": 1, "up_DF": 1, "down_DF": 0}


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


def decoding_params(params: Any, rows: int) -> Any:
    """Return the parameters laid out for decoding `rows` rows; those that are come back as given.

    The layers become a tuple: a decoding loop reads each in place, where from a stack it would
    copy every layer at every token (2x of the time on CPU). A few rows times a kernel are bound by
    reading the kernel, which XLA's CPU matmul does at 4 to 6 GB/s, and at 7 to 9 in blocks.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params
    count = len(jax.tree.leaves(layers)[0])
    layers = [jax.tree.map(lambda w, i=i: w[i], dict(layers)) for i in range(count)]
    params = {**params, "layers": layers}
    is_float32 = params["embed_VD"].dtype == jnp.float32
    if jax.default_backend() == "cpu" and is_float32 and rows <= MOST_ROWS:
        head_VD = params.pop("head_VD", params["embed_VD"])
        params["head_VD"] = cut(head_VD.T, COLUMNS if rows > 1 else len(head_VD))
        for layer in layers if rows > 1 else []:
            for name in INPUTS.keys() & layer.keys():
                kernel, summed = layer[name], INPUTS[name]
                inputs = math.prod(kernel.shape[:summed])
                layer[name] = cut(kernel.reshape(inputs, -1) if summed else kernel.T, COLUMNS)
    return {**params, "layers": tuple(layers)}
