"""The mesh, the one table from logical axes to mesh axes, and arrays laid out by it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nanojaxgpt.cpu import multiplies_bfloat16
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.model.parameters import PyTree, Table, row_of

# From the slowest links to the fastest: slices are joined by the data-centre network.
AXES = ("slice", "data", "fsdp", "sequence", "tensor")

# Rows are split over slice, data and fsdp, tokens over sequence; weights over fsdp (gathered at
# use) and tensor (never gathered), whole in every slice.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("slice", "data", "fsdp"),
    "sequence": ("sequence",),
    "keys": (),  # the sequence of keys and values: each query's device has them all
    "features": (),  # the embed dimension of activations
    "layers": (),
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "labels": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "positions": (),
    "norm": (),
    "rank": (),
}

# The config field that gives a dimension its size.
FIELDS = {
    "embed": "model.embed_dim", "vocab": "model.vocab_size", "heads": "model.num_heads",
    "kv_heads": "model.num_kv_heads or num_heads", "mlp": "model.mlp_dim",
    "positions": "model.seq_len",
}  # fmt: skip


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of these sizes over `devices` (default: all); -1 means the rest.

    Axes that are not named have size 1. Devices that know their slice (TPU) are ordered so that
    only the axis `slice` leaves one. Raises ConfigError where the sizes don't multiply to the
    number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = list((dict.fromkeys(AXES, 1) | dict(sizes)).values())
    if -1 in shape:
        shape[shape.index(-1)] = max(1, len(devices) // math.prod(s for s in shape if s > 0))
    asked = " x ".join(f"{axis}={n}" for axis, n in zip(AXES, shape, strict=True) if n != 1)
    if math.prod(shape) != len(devices):
        raise ConfigError(
            f"mesh {asked or 'data=1'} needs {math.prod(shape)} devices, not {len(devices)}"
        )
    return Mesh(arrange(shape, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Return the devices as an array of this shape, neighbours in it near each other.

    Raises ConfigError where the first size, of `slice`, is not the number of slices.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    # Without the split an 8 x 8 mesh has no place on a 4 x 4 x 4 torus.
    split = dict(allow_split_physical_axes=True)
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, **split)
    if shape[0] != slices:
        raise ConfigError(f"the devices are in {slices} slices: set mesh.slice={slices}")
    outer = (slices, *[1] * len(shape[1:]))
    return mesh_utils.create_hybrid_device_mesh((1, *shape[1:]), outer, devices, **split)


def platform() -> str:
    """Return where the traced program will run: cpu, gpu or tpu.

    That of the devices of `jax.set_mesh`, which may be absent, else of this machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def compute_dtype(asked: str, platform: str) -> str:
    """Return model.compute_dtype; "auto" is bfloat16 where matmuls are faster in it.

    So they are on GPUs, TPUs and CPUs with instructions for it, which others lack.
    """
    faster = platform != "cpu" or multiplies_bfloat16()
    return asked if asked != "auto" else "bfloat16" if faster else "float32"


def partition_spec(names: Sequence[str | None]) -> PartitionSpec:
    """Return the mesh axes of these logical axes. Raises KeyError on a name without a rule."""
    axes = [RULES[name] if name else () for name in names]
    used = [axis for group in axes for axis in group]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(names)} use a mesh axis twice: {axes}")
    return PartitionSpec(*(group[0] if len(group) == 1 else group or None for group in axes))


def axis_size(axis: str) -> int:
    """Return the size of an axis on the mesh of `jax.set_mesh`; without such an axis, 1."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Return `x` laid out by its logical axes on the mesh of `jax.set_mesh`; without one, `x`.

    A dimension that its mesh axes don't divide, as the one row of a prompt, is left whole. Within
    `jax.shard_map` each device has its own `x`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return x
    spec = []
    for size, axes in zip(x.shape, partition_spec(names), strict=False):
        group = (axes,) if isinstance(axes, str) else axes or ()
        spec.append(None if size % math.prod(mesh.shape[axis] for axis in group) else axes)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def tree_shardings(tree: PyTree, table: Table, mesh: Mesh) -> PyTree:
    """Return the NamedSharding of every leaf of a tree of parameters, or of an optimizer's state.

    A leaf whose path ends with that of a parameter is laid out like it; all others (steps,
    counters, Adafactor's rows and columns) are replicated. Raises ConfigError where a dimension is
    not divisible.
    """

    def leaf_sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        row = row_of(name, table)
        names = row.logical_axes if row and len(row.logical_axes) == len(leaf.shape) else ()
        spec = partition_spec(names)
        for size, axis, logical in zip(leaf.shape, spec, names, strict=False):
            parts = mesh.shape[axis] if axis else 1
            if size % parts:
                padded = f"; pad the vocabulary to {-(-size // parts) * parts}"
                raise ConfigError(
                    f"{FIELDS.get(str(logical), logical)}={size} (of {name}) is not divisible by "
                    f"mesh.{axis}={parts}{padded if logical == 'vocab' else '; change one of them'}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def check_batch(field: str, batch_size: int, parts: int, seq_len: int, mesh: Mesh) -> None:
    """Raise ConfigError where `batch_size / parts` rows of `seq_len` don't divide over the mesh."""
    axes = RULES["batch"]
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if batch_size % (parts * shards):
        split = f"{parts} micro-batches x " if parts > 1 else ""
        fits = -(-batch_size // (parts * shards)) * parts * shards
        raise ConfigError(
            f"{field}={batch_size} is not divisible by {split}{shards} devices of the mesh axes "
            f"{', '.join(axes)}; the next that is: {fits}"
        )
    if seq_len % mesh.shape["sequence"]:
        count = mesh.shape["sequence"]
        raise ConfigError(
            f"model.seq_len={seq_len} is not divisible by mesh.sequence={count}; "
            f"the next that is: {-(-seq_len // count) * count}"
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the layout of a batch: rows over slice, data and fsdp, tokens over sequence."""
    return NamedSharding(mesh, partition_spec(["batch", "sequence"]))


def global_batch(
    rows: Callable[[int, int], PyTree], batch_size: int, seq_len: int, mesh: Mesh
) -> PyTree:
    """Return the batch as global arrays [B, T]; each device asks only for its own rows.

    `rows(first, last)` gives a tree of numpy arrays [B, T] with the rows [first, last).
    """
    sharding, fetched = batch_sharding(mesh), {}
    devices, shards = [], []
    shape = (batch_size, seq_len)
    indices: Any = sharding.addressable_devices_indices_map(shape)
    for device, (row, column) in indices.items():
        first, last, _ = row.indices(batch_size)
        if (first, last) not in fetched:
            fetched[first, last] = rows(first, last)
        devices.append(device)
        shards.append(jax.tree.map(lambda x_BT, c=column: x_BT[:, c], fetched[first, last]))

    def leaf(*parts: np.ndarray) -> jax.Array:
        placed = [jax.device_put(part, d) for part, d in zip(parts, devices, strict=True)]
        return jax.make_array_from_single_device_arrays(shape, sharding, placed)

    return jax.tree.map(leaf, *shards)
