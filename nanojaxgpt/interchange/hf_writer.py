"""In: a model. Out: a folder in Hugging Face's format, which transformers and others load."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.errors import CheckpointError, ConfigError, why
from nanojaxgpt.interchange.hf_config import choose_family
from nanojaxgpt.interchange.hf_tokenizer import write_tokenizer
from nanojaxgpt.interchange.loading import write_tensors
from nanojaxgpt.interchange.tensors import Slot, slots
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.sample import GREEDY_BELOW

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
SHARD_BYTES = 5 * 10**9


def write_folder(
    folder: Path,
    cfg: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    chat_template: str,
    sample: Mapping[str, Any],
    dtype: str,
    card: str,
    vocab_size: int = 0,
    model_type: str = "",
) -> None:
    """Write a model, its weights as `dtype`; `card` is the README, `sample` as in Pretrained.

    Of the table's rows `vocab_size` are written; 0: all. The family is the first that can express
    the model, unless `model_type` names one. The folder appears when it is complete. Raises
    ConfigError where no family can, or the folder is not empty; CheckpointError where it can't be
    written, or a number leaves the range of `dtype`.
    """
    folder = Path(folder).absolute()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    cfg = dataclasses.replace(cfg, vocab_size=vocab_size or cfg.vocab_size)
    family, keys = choose_family(cfg, model_type)
    rows = {"embed_VD", "head_VD", "head_bias"} & set(params)
    params = {**params} | {name: params[name][: cfg.vocab_size] for name in rows}
    ends = [tokenizer.end_id, *sample.get("end_ids", ())] if tokenizer.end_id >= 0 else []
    tokens = dict(
        bos_token_id=tokenizer.start_id if tokenizer.start_id >= 0 else None,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
    )
    keys |= tokens | dict(pad_token_id=None, dtype=dtype, torch_dtype=dtype)
    with new_folder(folder) as partial:
        write_weights(partial, slots(cfg, family.tensors), params, dtype)
        write_json(partial / "config.json", keys)
        write_json(partial / "generation_config.json", tokens | write_sampling(sample))
        write_tokenizer(partial, tokenizer, cfg.seq_len, chat_template)
        (partial / "README.md").write_text(card)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder that takes this name when all went well, and else is removed."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder: choose another")
    partial = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)
        yield partial
        partial.rename(folder)
    except OSError as error:
        raise CheckpointError(f"can't write {folder}: {why(error, folder.parent)}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def write_json(path: Path, keys: Mapping[str, Any]) -> None:
    """Write an object, a key a line."""
    path.write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n")


def write_sampling(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of generation_config.json for fields of the config's section `sample`."""
    names = ("temperature", "top_k", "top_p", "min_p")
    keys = {name: sample[name] for name in names if sample.get(name)}
    greedy = not keys or sample.get("temperature", 1.0) < GREEDY_BELOW
    return {"do_sample": False} if greedy else {"do_sample": True} | keys


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
