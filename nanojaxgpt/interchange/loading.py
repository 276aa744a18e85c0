"""Weights of another format, tensor by tensor, straight into the shards of a mesh."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nanojaxgpt.checkpoint import abstract_params
from nanojaxgpt.console import with_bar
from nanojaxgpt.errors import CheckpointError
from nanojaxgpt.interchange.pretrained import Pretrained
from nanojaxgpt.interchange.tensors import from_parts, to_parts
from nanojaxgpt.model.config import ModelConfig


def read_params(source: Pretrained, cfg: ModelConfig, mesh: Mesh) -> Any:
    """Return the parameters of an opened model on `mesh`, as cfg.param_dtype.

    Where `cfg` has a shorter context, learned positions are cut; where it has a larger vocabulary,
    rows of zeros are added. Tensors are read one at a time: beside the shards no more than the
    largest of them is in memory. Raises CheckpointError where a number is not finite.
    """
    abstract = abstract_params(cfg, mesh)
    params: dict[str, Any] = {}
    for name in with_bar(source.slots, "reading weights", len(source.slots)):
        slot = source.slots[name]
        array = source.read(name)
        if not np.isfinite(array.astype(np.float32, copy=False)).all():
            raise CheckpointError(f"{source.origin}: the tensor {name} has numbers that are not "
                                  "finite; the file is damaged")  # fmt: skip
        for place, part in zip(slot.places, to_parts(slot, array), strict=True):
            stack, leaf = place.row.stack, place.row.name
            target = abstract[stack][leaf] if stack else abstract[leaf]
            if not stack:
                whole = fit_rows(part, target.shape).astype(target.dtype)
                params[leaf] = jax.device_put(whole, target.sharding)
                continue
            held = params.setdefault(stack, {})
            if leaf not in held:
                held[leaf] = _empty(target)
            held[leaf] = _put(held[leaf], part.astype(target.dtype), place.index)
    return params


def fit_rows(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return the array with as many rows as `shape` says: the first ones, or zeros added."""
    missing = max(0, shape[0] - len(array))
    return np.pad(array[: shape[0]], [(0, missing)] + [(0, 0)] * (array.ndim - 1))


def _empty(target: jax.ShapeDtypeStruct) -> jax.Array:
    """Return zeros, made in the shards."""
    make = functools.partial(jnp.zeros, target.shape, target.dtype)
    return jax.jit(make, out_shardings=target.sharding)()


def _put(stacked: jax.Array, layer: np.ndarray, index: int) -> jax.Array:
    """Return the stacked parameters with one layer written in place."""
    sharding: Any = stacked.sharding
    spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
    placed = jax.device_put(layer, jax.sharding.NamedSharding(sharding.mesh, spec))
    return _write(stacked, placed, np.int32(index))


@functools.partial(jax.jit, donate_argnums=0)
def _write(stacked: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, layer, index, 0)


def write_tensors(slots: Any, params: Any) -> Iterable[tuple[str, np.ndarray]]:
    """Yield the tensors of another format by their names there, one at a time, from parameters."""
    for name, slot in slots.items():
        arrays = []
        for place in slot.places:
            row = place.row
            leaf = params[row.stack][row.name] if row.stack else params[row.name]
            arrays.append(np.asarray(leaf[place.index] if row.stack else leaf))
        yield name, from_parts(slot, arrays)
