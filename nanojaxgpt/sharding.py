"""The mesh, the one table from logical axes to mesh axes, and arrays laid out by it."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nanojaxgpt.errors import ConfigError

AXES = ("data", "fsdp", "tensor")

# Batches are split over data and fsdp, weights over fsdp (gathered at use) and tensor (never).
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "sequence": (),
    "features": (),  # the embed dimension of activations
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "positions": (),
    "norm": (),
}


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of these sizes over `devices` (default: all); -1 means the rest.

    Raises ConfigError where the sizes don't multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // int(np.prod([s for s in sizes if s > 0])))
    if np.prod(sizes) != len(devices):
        asked = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(f"mesh {asked} needs {np.prod(sizes)} devices, here are {len(devices)}")
    kinds = (AxisType.Auto,) * len(AXES)
    return Mesh(arrange(sizes, devices), AXES, axis_types=kinds)


def arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Return the devices as an array of these sizes, whose neighbours are neighbours in the torus.

    Several slices lie along the first axis that divides by their number: only that one crosses
    the slower network between them. Raises ConfigError where none does.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # Without the split an 8 x 8 mesh has no place on a 4 x 4 x 4 torus.
    split = dict(allow_split_physical_axes=True)
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, **split)
    first = next((i for i, size in enumerate(sizes) if size % slices == 0), None)
    if first is None:
        raise ConfigError(f"no mesh axis of {list(sizes)} divides by the {slices} slices")
    across = [slices if i == first else 1 for i in range(len(sizes))]
    inside = [size // parts for size, parts in zip(sizes, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, **split)


def platform() -> str:
    """Return where the traced program will run: cpu, gpu or tpu.

    That is what the devices of `jax.set_mesh` are, which need not be here; else what is here.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def partition_spec(names: Sequence[str | None]) -> PartitionSpec:
    """Return the mesh axes of these logical axes. Raises KeyError on a name without a rule."""
    axes = [RULES[name] if name else () for name in names]
    used = [axis for group in axes for axis in group]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(names)} use a mesh axis twice: {axes}")
    return PartitionSpec(*(group[0] if len(group) == 1 else group or None for group in axes))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Return `x` laid out by its logical axes on the mesh of `jax.set_mesh`; without one, `x`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names))


def tree_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Return the NamedSharding of every leaf of a tree whose weights carry logical axes.

    Leaves without axes (steps, counters) are replicated. Raises ConfigError where a dimension
    does not divide.
    """

    def leaf_sharding(path: tuple, leaf: Any) -> NamedSharding:
        boxes = isinstance(leaf, nn.LogicallyPartitioned)
        spec = partition_spec(leaf.names) if boxes else PartitionSpec()
        shape = leaf.value.shape if boxes else leaf.shape
        for size, axis in zip(shape, spec, strict=False):
            parts = mesh.shape[axis] if axis else 1
            if size % parts:
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise ConfigError(
                    f"{name}: a dimension of {size} does not divide over mesh.{axis}={parts}; "
                    f"the mesh axis or the model must change (a vocabulary can be padded by "
                    f"model.vocab_size, to {-(-size // parts) * parts} here)"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(
        leaf_sharding, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )


def unbox(tree: Any) -> Any:
    """Return the tree with plain arrays where the logical axes stood."""
    return jax.tree.map(
        lambda x: x.value if isinstance(x, nn.LogicallyPartitioned) else x,
        tree,
        is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the layout of a batch: rows over data and fsdp."""
    return NamedSharding(mesh, partition_spec(["batch"]))


def check_batch_size(field: str, batch_size: int, parts: int, mesh: Mesh) -> None:
    """Raise ConfigError where `batch_size / parts` rows don't divide over the mesh."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (parts * shards):
        split = f"{parts} micro-batches x " if parts > 1 else ""
        fits = -(-batch_size // (parts * shards)) * parts * shards
        raise ConfigError(
            f"{field}={batch_size} does not divide by {split}{shards} devices of the mesh axes "
            f"data and fsdp; the next that does is {fits}"
        )


def global_batch(rows: Callable[[int, int], Any], batch_size: int, seq_len: int, mesh: Mesh) -> Any:
    """Return the batch as global arrays [B, T]; each device asks only for its own rows.

    `rows(first, last)` gives a tree of numpy arrays with the rows [first, last).
    """
    sharding, fetched = batch_sharding(mesh), {}
    devices, shards = [], []
    for device, index in sharding.addressable_devices_indices_map((batch_size, seq_len)).items():
        first, last, _ = index[0].indices(batch_size)
        if (first, last) not in fetched:
            fetched[first, last] = rows(first, last)
        devices.append(device)
        shards.append(fetched[first, last])

    def leaf(*parts: np.ndarray) -> jax.Array:
        placed = [jax.device_put(part, d) for part, d in zip(parts, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(
            (batch_size, *parts[0].shape[1:]), sharding, placed
        )

    return jax.tree.map(leaf, *shards)
