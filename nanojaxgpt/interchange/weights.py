"""Weights as safetensors files, one or shards with an index, in and out; never pickles."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from nanojaxgpt.errors import CheckpointError, ConfigError
from nanojaxgpt.interchange.loading import write_tensors
from nanojaxgpt.interchange.tensors import Slot
from nanojaxgpt.regular import check_regular, read_regular

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARD_BYTES = 5 * 10**9
SHOWN = 4  # names in a message


class Stored(NamedTuple):
    """A tensor in a safetensors file.

    The file is opened anew for each: what was read of it would else count as memory in use.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: str  # as the file says it, BF16
    name: str

    def open(self) -> Any:
        """Return the file, mapped, as a context."""
        return safetensors.safe_open(self.path, "numpy")  # pyright: ignore

    def read(self) -> np.ndarray:
        """Return the numbers. Raises CheckpointError where the file changed since it was opened."""
        try:
            with self.open() as file:
                return file.get_tensor(self.name)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{self.path}: can't read {self.name}: {error}") from error


def read_json(path: Path, missing: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the object in a JSON file, or `missing`. Raises CheckpointError, ConfigError."""
    try:
        found = json.loads(read_regular(path))
    except FileNotFoundError as error:
        if missing is not None:
            return dict(missing)
        raise CheckpointError(f"{path.parent} has no {path.name}: it isn't a model") from error
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(found).__name__}")
    return found


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return the tensors of the folder's safetensors files by name. Raises CheckpointError."""
    if (folder / SINGLE).exists():
        return file_tensors(folder / SINGLE)
    if not (folder / INDEX).exists():
        pickles = sorted(path.name for form in PICKLES for path in folder.glob(form))
        hint = "".join(
            f"; its {name} is a pickle, which could run any code: convert it with transformers, "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER)"
            for name in pickles[:1]
        )
        raise CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}{hint}")
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{folder / INDEX} has no weight_map")
    found: dict[str, Stored] = {}
    shards = sorted(set(map(str, places.values())))
    for shard in shards:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX} names {shard!r}, which is not a safetensors "
                                  "file in this folder")  # fmt: skip
    for shard in shards:
        held = file_tensors(folder / shard)
        named = {name for name, place in places.items() if place == shard}
        if missing := sorted(named - set(held)):
            raise CheckpointError(f"{folder / shard} lacks {first_names(missing)}, which "
                                  f"{INDEX} names")  # fmt: skip
        if more := sorted(set(held) - named):
            raise CheckpointError(f"{folder / shard} has {first_names(more)}, which {INDEX} "
                                  "doesn't name")  # fmt: skip
        found |= held
    return found


def file_tensors(path: Path) -> dict[str, Stored]:
    """Return the tensors of one safetensors file, by its header. Raises CheckpointError."""
    try:
        check_regular(path)
        handle: Any = safetensors.safe_open(path, "numpy")  # pyright: ignore
        parts = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        return {
            name: Stored(path, tuple(part.get_shape()), str(part.get_dtype()), name)
            for name, part in parts.items()
        }
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or cut off: {error}") from error


def first_names(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def write_json(path: Path, keys: Mapping[str, Any]) -> None:
    """Write an object, a key a line."""
    path.write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n")


def write_weights(folder: Path, wanted: Mapping[str, Slot], params: Any, dtype: str) -> None:
    """Write the tensors to one file, or to shards with an index; one at a time is in memory."""
    size = jnp.dtype(dtype).itemsize
    sizes = {name: size * int(np.prod(slot.shape)) for name, slot in wanted.items()}
    shards: list[list[str]] = [[]]
    for name in sizes:
        if shards[-1] and sum(sizes[held] for held in [*shards[-1], name]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    count = len(shards)
    files = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    files = ["model.safetensors"] if count == 1 else files
    arrays = iter(write_tensors(wanted, params))
    for file, names in zip(files, shards, strict=True):
        shapes = {name: wanted[name].shape for name in names}
        write_safetensors(folder / file, shapes, dtype, arrays)
    if count > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        metadata = dict(total_size=sum(sizes.values()))
        write_json(folder / "model.safetensors.index.json",
                   dict(metadata=metadata, weight_map=places))  # fmt: skip


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    arrays: Iterator[tuple[str, np.ndarray]],
) -> None:
    """Write one safetensors file; its tensors are the next of `arrays`.

    The format: the length of the header, the header, then the numbers, all little-endian.
    """
    kind, offset = jnp.dtype(dtype), 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        end = offset + kind.itemsize * int(np.prod(shape))
        header[name] = dict(dtype=DTYPES[dtype], shape=list(shape), data_offsets=[offset, end])
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, shape in shapes.items():
            name, array = next(arrays)
            with np.errstate(over="ignore"):
                cast = np.ascontiguousarray(array.astype(kind))
            if (name, cast.shape) != (expected, shape):
                raise ValueError(f"{name} {cast.shape} where {expected} {shape} was to be written")
            if not np.isfinite(cast.astype(np.float32, copy=False)).all():
                raise CheckpointError(f"{name} has numbers that are not finite as {dtype}; write "
                                      "it as bfloat16 or float32")  # fmt: skip
            file.write(cast.tobytes())
