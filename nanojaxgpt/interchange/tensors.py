"""The form of a family's table: which tensor of another format holds which parameters, and how.

Read in both directions: `to_parts` takes a tensor of the other format apart, `from_parts` makes it
of our parameters. Their matrices are [out, in]; ours are as the table of parameters has them.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import Parameter, layer_rows, model_rows


class Tensor(NamedTuple):
    """A tensor of another format, and the parameters that it holds.

    In `name` "{}" stands for the index of the layer. Of several `parts` the outputs follow one
    another, or with `per_head` alternate: those of head 0 of each part, then those of head 1.
    """

    name: str
    parts: tuple[str, ...]
    transposed: bool = False  # a matrix is [in, out] there
    per_head: bool = False
    paired: bool = False  # rotary dimensions lie in pairs (i, i + H/2) there, as GGUF's llama has
    offset: float = 0.0  # what a number there is larger by


class Place(NamedTuple):
    """A parameter of the table, or of one layer: `index` is its place in the stack, else -1."""

    row: Parameter
    index: int = -1


class Slot(NamedTuple):
    """A tensor of a model, and the places of its parts."""

    tensor: Tensor
    places: tuple[Place, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that the tensor has there."""
        rows = [place.row for place in self.places]
        if rows[0].kind == "embedding":
            return rows[0].shape
        if rows[0].kind not in ("kernel", "head"):
            return (sum(math.prod(row.shape) for row in rows),)
        inputs = math.prod(rows[0].shape[axis] for axis in rows[0].summed)
        outputs = sum(math.prod(row.shape) for row in rows) // inputs
        return (inputs, outputs) if self.tensor.transposed else (outputs, inputs)


def slots(cfg: ModelConfig, tensors: Sequence[Tensor]) -> dict[str, Slot]:
    """Return the tensors of a model by their names there, in the order of its layers.

    Tensors whose parts the model does not have are left out. Raises ValueError where the table has
    only some of a tensor's parts, or no place for a parameter.
    """
    found: dict[str, Slot] = {}
    taken: set[str] = set()

    def add(tensor: Tensor, name: str, rows: dict[str, Parameter], index: int = -1) -> None:
        places = tuple(Place(rows[part], index) for part in tensor.parts if part in rows)
        if places and len(places) < len(tensor.parts):
            raise ValueError(f"{name} holds {', '.join(tensor.parts)}, not all of which exist")
        if places:
            found[name] = Slot(tensor, places)
            taken.update(place.row.path for place in places)

    outside = model_rows(cfg)
    for tensor in tensors:
        if "{}" not in tensor.name:
            add(tensor, tensor.name, outside)
    every = set(outside)
    for layer, (stack, index) in enumerate(cfg.places):
        count = cfg.stacks[stack].count
        rows = {
            name: row._replace(stack=stack, layers=count)
            for name, row in layer_rows(cfg, cfg.layer(layer)).items()
        }
        every |= {row.path for row in rows.values()}
        for tensor in tensors:
            if "{}" in tensor.name:
                add(tensor, tensor.name.format(layer), rows, index)
    if missing := every - taken:
        raise ValueError(f"no tensor for {', '.join(sorted(missing))}")
    return found


def to_parts(slot: Slot, array: np.ndarray) -> list[np.ndarray]:
    """Return the parameters (of one layer) that a tensor of another format holds."""
    tensor, rows = slot.tensor, [place.row for place in slot.places]
    if tensor.offset:
        array = (array.astype(np.float32) - np.float32(tensor.offset)).astype(array.dtype)
    if rows[0].kind == "embedding":
        return [array]
    if tensor.transposed and array.ndim == 2:
        array = array.T
    sizes = [outputs(row) for row in rows]
    if tensor.per_head:
        heads = outer(rows[0])[0]
        array = array.reshape(heads, -1, *array.shape[1:])
        bounds = np.cumsum([size // heads for size in sizes])[:-1]
        parts = [part.reshape(size, *array.shape[2:])
                 for part, size in zip(np.split(array, bounds, 1), sizes, strict=True)]  # fmt: skip
    else:
        parts = np.split(array, np.cumsum(sizes)[:-1])
    if tensor.paired:
        parts = [
            repair(part, outer(row)[0], (-1, 2)) for part, row in zip(parts, rows, strict=True)
        ]
    return [shape_part(part, row) for part, row in zip(parts, rows, strict=True)]


def from_parts(slot: Slot, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the tensor of another format that holds these parameters (of one layer)."""
    tensor, rows = slot.tensor, [place.row for place in slot.places]
    if rows[0].kind == "embedding":
        return np.ascontiguousarray(arrays[0])
    parts = [
        array.transpose(*outer_axes(row), *row.summed).reshape(outputs(row), *inputs(row))
        for array, row in zip(arrays, rows, strict=True)
    ]
    if tensor.paired:
        parts = [
            repair(part, outer(row)[0], (2, -1)) for part, row in zip(parts, rows, strict=True)
        ]
    if tensor.per_head:
        heads = outer(rows[0])[0]
        split = [part.reshape(heads, -1, *part.shape[1:]) for part in parts]
        joined = np.concatenate(split, 1)
        array = joined.reshape(-1, *joined.shape[2:])
    else:
        array = np.concatenate(parts)
    if tensor.offset:
        array = (array.astype(np.float32) + np.float32(tensor.offset)).astype(array.dtype)
    return np.ascontiguousarray(array.T if tensor.transposed and array.ndim == 2 else array)


def outer_axes(row: Parameter) -> list[int]:
    """Return the dimensions that a product keeps."""
    return [axis for axis in range(len(row.shape)) if axis not in row.summed]


def outer(row: Parameter) -> tuple[int, ...]:
    """Return the sizes of the dimensions that a product keeps."""
    return tuple(row.shape[axis] for axis in outer_axes(row))


def outputs(row: Parameter) -> int:
    """Return how many outputs a kernel has, or numbers a vector."""
    return math.prod(outer(row))


def inputs(row: Parameter) -> tuple[int, ...]:
    """Return () for a vector, else (how many inputs a kernel sums over,)."""
    return (math.prod(row.shape[axis] for axis in row.summed),) if row.summed else ()


def shape_part(part: np.ndarray, row: Parameter) -> np.ndarray:
    """Return a matrix [out, in] or a vector as the table has it."""
    order = [*outer_axes(row), *row.summed]
    whole = part.reshape([row.shape[axis] for axis in order])
    return np.ascontiguousarray(whole.transpose(np.argsort(order)))


def repair(part: np.ndarray, heads: int, pairs: tuple[int, int]) -> np.ndarray:
    """Return a matrix or vector whose outputs [heads, head_dim], split as `pairs`, are swapped."""
    return part.reshape(heads, *pairs, *part.shape[1:]).swapaxes(1, 2).reshape(part.shape)
