"""A GGUF file as a container: its metadata, and where each tensor lies. No weight is read yet.

Parsed here and not by gguf.GGUFReader, which takes 5 s for a vocabulary of 49,152 (this: 0.2 s)
and returns parts of tensors from a file that was cut off.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanojaxgpt.errors import CheckpointError
from nanojaxgpt.extras import require_package
from nanojaxgpt.regular import check_regular

VERSIONS = (2, 3)
# The types of metadata by their numbers; 8 is a string, 9 an array.
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4
GROUP_BYTES = 1 << 16  # gguf dequantizes 16 rows at a time, which is slow where they are short


class GgufTensor(NamedTuple):
    """A tensor in a GGUF file; `shape` is as numpy has it, the outputs of a matrix first."""

    name: str
    shape: tuple[int, ...]
    kind: Any  # a gguf.GGMLQuantizationType
    start: int  # of its bytes in the file
    size: int  # in bytes


class GgufHeader(NamedTuple):
    """What a GGUF file says of itself; `data` are its bytes, on disk until they are read."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    data: Any

    def read(self, name: str) -> np.ndarray:
        """Return the numbers of a tensor, dequantized to float32."""
        import gguf

        found = self.tensors[name]
        items = np.frombuffer(self.data, np.uint8, found.size, found.start)
        rows = math.prod(found.shape[:-1])
        items = items.reshape(rows, -1)
        # Every row is a whole number of blocks, and so are several of them.
        joined = max(1, GROUP_BYTES // max(1, items.shape[1]))
        while rows % joined:
            joined -= 1
        numbers = gguf.dequantize(items.reshape(rows // joined, -1), found.kind)
        return numbers.astype(np.float32, copy=False).reshape(found.shape)


class Cursor:
    """Reads a file from its beginning. Raises ValueError where it ends too early."""

    def __init__(self, data: Any) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        if size > len(self.data) - self.at:
            raise ValueError(f"it ends at byte {len(self.data):,}, but goes on by what it says")
        self.at += size
        return self.data[self.at - size : self.at]

    def numbers(self, form: str, count: int = 1) -> tuple[Any, ...]:
        """Return the next numbers, of a form of the module `struct`."""
        return struct.unpack(f"<{count}{form}", self.take(struct.calcsize(form) * count))

    def text(self) -> str:
        """Return the next string."""
        return self.take(self.numbers("Q")[0]).decode()

    def value(self, kind: int) -> Any:
        """Return the next value of a type of metadata."""
        if kind == STRING:
            return self.text()
        if kind in FORMS:
            return self.shorten(kind, self.numbers(FORMS[kind]))[0]
        if kind != ARRAY:
            raise ValueError(f"its metadata have an unknown type, {kind}")
        kind, count = *self.numbers("I"), *self.numbers("Q")
        if kind in FORMS:
            return self.shorten(kind, self.numbers(FORMS[kind], count))
        if kind != STRING:
            raise ValueError(f"its metadata have arrays of an unknown type, {kind}")
        return [self.text() for _ in range(count)]

    def shorten(self, kind: int, numbers: tuple[Any, ...]) -> list[Any]:
        """Return float32 numbers as the shortest decimals that are the same, as 1e-05."""
        return [float(str(np.float32(n))) for n in numbers] if FORMS[kind] == "f" else [*numbers]


def read_header(path: Path) -> GgufHeader:
    """Return the header of a file, every tensor of which is there in full.

    Raises CheckpointError for a file that can't be read, ConfigError where gguf is missing.
    """
    require_package("gguf", "gguf", f"{path} is a GGUF file")
    try:
        check_regular(path)
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path} is not a GGUF file")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    try:
        return GgufHeader(path, *parse_header(Cursor(data)), data)
    except (ValueError, struct.error, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is damaged or cut off: {error}") from error


def parse_header(cursor: Cursor) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    """Return the metadata, and the tensors by their names. Raises ValueError."""
    cursor.take(4)
    version, tensor_count, key_count = *cursor.numbers("I"), *cursor.numbers("Q", 2)
    if version not in VERSIONS:
        raise ValueError(f"it has version {version} of the format, not one of {VERSIONS}")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        name = cursor.text()
        if name in metadata:
            raise ValueError(f"it has the key {name} twice")
        metadata[name] = cursor.value(*cursor.numbers("I"))
    found = [parse_tensor(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment={alignment!r}")
    first = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for tensor in found:
        end = first + tensor.start + tensor.size
        if tensor.name in tensors:
            raise ValueError(f"it has the tensor {tensor.name} twice")
        if end > len(cursor.data):
            raise ValueError(f"the tensor {tensor.name} ends at byte {end:,}, but the file at "
                             f"{len(cursor.data):,}")  # fmt: skip
        tensors[tensor.name] = tensor._replace(start=first + tensor.start)
    return metadata, tensors


def parse_tensor(cursor: Cursor) -> GgufTensor:
    """Return the next tensor of the list, its start counted from the first one's."""
    import gguf

    name, (count,) = cursor.text(), cursor.numbers("I")
    if not 0 < count <= MOST_DIMENSIONS:
        raise ValueError(f"the tensor {name} has {count} dimensions")
    shape = cursor.numbers("Q", count)[::-1]
    number, start = *cursor.numbers("I"), *cursor.numbers("Q")
    try:
        kind = gguf.GGMLQuantizationType(number)
        block, size = gguf.GGML_QUANT_SIZES[kind]
    except (KeyError, ValueError):
        raise ValueError(
            f"the tensor {name} has an unknown type, {number}; a newer version of the package gguf "
            "may know it"
        ) from None
    if not all(shape) or shape[-1] % block:
        raise ValueError(f"the tensor {name} has the shape {list(shape)}, but comes in blocks of "
                         f"{block}")  # fmt: skip
    return GgufTensor(name, shape, kind, start, math.prod(shape) // block * size)
