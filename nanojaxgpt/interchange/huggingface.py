"""In: a folder in Hugging Face's format. Out: the model, opened and checked, no weight read yet.

Weights are safetensors, never pickles: those run code. hf_writer.py writes such folders.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from nanojaxgpt import config as configs
from nanojaxgpt.errors import CheckpointError, ConfigError
from nanojaxgpt.interchange.families import Family, model_fields
from nanojaxgpt.interchange.hf_tokenizer import open_chat_template, open_tokenizer
from nanojaxgpt.interchange.pretrained import Pretrained
from nanojaxgpt.interchange.tensors import Slot, Tensor, slots
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.regular import check_regular, read_regular

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = ("F32", "F16", "BF16")
# Constants that old versions saved beside the weights, and what a model of text doesn't need.
IGNORED = re.compile(r"\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$|rotary_emb\.inv_freq$")
OF_IMAGES = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
SHOWN = 4  # names in a message
ROWS = 4096  # that are compared at a time
SAMPLE = ("temperature", "top_k", "top_p", "min_p")


class Stored(NamedTuple):
    """A tensor in a safetensors file."""

    path: Path
    shape: tuple[int, ...]
    dtype: str  # as the file says it, BF16
    name: str
    handle: Any

    def read(self) -> np.ndarray:
        """Return the numbers. Raises CheckpointError where the file changed since it was opened."""
        try:
            return self.handle.get_tensor(self.name)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f"{self.path}: can't read {self.name}: {error}") from error


def open_folder(folder: Path) -> Pretrained:
    """Return the model of a folder, after all checks that need no weights.

    Raises ConfigError for a config that can't be expressed, CheckpointError for weights that are
    missing, damaged or of another shape, DataError for its tokenizer.
    """
    folder = Path(folder)
    given = read_json(folder / "config.json")
    try:
        family, fields = model_fields(given)
        section = configs.build({f"model.{name}": value for name, value in fields.items()}).model
        cfg = ModelConfig(**vars(section))
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error
    wanted, stored = match(folder, family, cfg, stored_tensors(folder))
    if {tensor.dtype for tensor in stored.values()} == {"BF16"}:
        cfg = dataclasses.replace(cfg, param_dtype="bfloat16")
    generation = read_json(folder / "generation_config.json", missing={})
    ends = end_ids(generation) or end_ids(given) or end_ids(given.get("text_config") or {})
    tokenizer = open_tokenizer(folder, ends[:1], cfg.vocab_size)
    sample = read_sampling(generation)
    if others := tuple(end for end in ends[1:] if end < tokenizer.vocab_size):
        sample["end_ids"] = others
    template = open_chat_template(folder)
    reader = tensor_reader(stored)
    return Pretrained(folder, family.model_type, cfg, wanted, reader, tokenizer, template, sample)


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


def read_sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the config's section `sample` that a generation_config.json sets."""
    if not generation.get("do_sample"):
        return {}
    defaults = vars(configs.sections.Sample())
    given = {name: generation.get(name) for name in SAMPLE}
    return {name: type(defaults[name])(value) for name, value in given.items()
            if type(value) in (int, float)}  # fmt: skip


def end_ids(config: Mapping[str, Any]) -> list[int]:
    """Return the ids that end a text, by a config's eos_token_id: one, a list of them, or none."""
    value = config.get("eos_token_id")
    items = value if isinstance(value, list) else [value]
    return [item for item in items if type(item) is int and item >= 0]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return the tensors of the folder's safetensors files by name. Raises CheckpointError."""
    if (folder / SINGLE).exists():
        return file_tensors(folder / SINGLE)
    if not (folder / INDEX).exists():
        pickles = sorted(path.name for form in PICKLES for path in folder.glob(form))
        hint = (
            f"; its {pickles[0]} is a pickle, which could run any code: convert it with "
            "transformers, AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER)"
        )
        raise CheckpointError(f"{folder} has no {SINGLE} and no {INDEX}{hint if pickles else ''}")
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
            name: Stored(path, tuple(part.get_shape()), str(part.get_dtype()), name, handle)
            for name, part in parts.items()
        }
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or cut off: {error}") from error


def match(
    folder: Path, family: Family, cfg: ModelConfig, files: Mapping[str, Stored]
) -> tuple[dict[str, Slot], dict[str, Stored]]:
    """Return the tensors of the model, and where each is stored. Raises CheckpointError."""
    named = namer(family, files)
    wanted = slots(cfg, family.tensors)
    if missing := [named(name) for name in wanted if named(name) not in files]:
        raise CheckpointError(f"{folder}: the weights lack {first_names(missing)}")
    stored = {name: files[named(name)] for name in wanted}
    left = set(files) - {tensor.name for tensor in stored.values()}
    left = {name for name in left if not IGNORED.search(name) and not OF_IMAGES.search(name)}
    head, table = (table_name(family.tensors, part) for part in ("head_VD", "embed_VD"))
    if cfg.tied_head and named(head) in left:
        left.remove(named(head))
        check_tied(files[named(head)], stored[table])
    if left:
        raise CheckpointError(
            f"{folder}: the model has no place for {first_names(sorted(left))}; config.json is of "
            "another model, or the tensors belong to an adapter"
        )
    for name, slot in wanted.items():
        tensor = stored[name]
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} is {tensor.dtype}; quantized weights can't be read, "
                f"only {', '.join(DTYPES)}"
            )
        if tensor.shape != slot.shape:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} has the shape {list(tensor.shape)}, but by "
                f"config.json it is {list(slot.shape)}"
            )
    return wanted, stored


def namer(family: Family, files: Mapping[str, Any]) -> Callable[[str], str]:
    """Return the function from a name of the table to the one in the files.

    A model saved without its head lacks the prefix; one that also sees images has one more.
    """
    table = table_name(family.tensors, "embed_VD")

    def bare(name: str) -> str:
        return name.removeprefix(family.prefix)

    ways: list[Callable[[str], str]] = [
        lambda name: name,
        lambda name: f"language_model.{name}",
        lambda name: (
            f"model.language_model.{bare(name)}" if name.startswith(family.prefix) else name
        ),
        bare,
    ]
    return next((way for way in ways if way(table) in files), ways[0])


def table_name(tensors: tuple[Tensor, ...], part: str) -> str:
    """Return the name of the tensor that holds one parameter."""
    return next(tensor.name for tensor in tensors if tensor.parts == (part,))


def check_tied(head: Stored, table: Stored) -> None:
    """Raise CheckpointError where a head that is to be the embedding table is another one."""
    same = (head.shape, head.dtype) == (table.shape, table.dtype)
    rows, others = (tensor.handle.get_slice(tensor.name) for tensor in (head, table))
    for first in range(0, head.shape[0] if same else 0, ROWS):
        last = min(first + ROWS, head.shape[0])
        part, other = rows[first:last], others[first:last]
        same = same and part.tobytes() == other.tobytes()
    if not same:
        raise CheckpointError(
            f"{head.path}: {head.name} differs from {table.name}, but config.json says that they "
            "are one (tie_word_embeddings); correct it there"
        )


def tensor_reader(stored: Mapping[str, Stored]) -> Callable[[str], np.ndarray]:
    """Return the function that reads a tensor by its name in the table."""
    return lambda name: stored[name].read()


def first_names(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
