"""A folder in Hugging Face's format. In: the model, opened and checked, no weight read yet.
Out: what transformers and others load.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanojaxgpt import config as configs
from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.errors import CheckpointError, ConfigError
from nanojaxgpt.interchange.families import Family, model_fields
from nanojaxgpt.interchange.hf_config import choose_family
from nanojaxgpt.interchange.hf_tokenizer import (
    named_tokens,
    open_chat_template,
    open_tokenizer,
    write_tokenizer,
)
from nanojaxgpt.interchange.pretrained import Pretrained
from nanojaxgpt.interchange.provenance import SCRATCH, Provenance, card_license, stated_ids
from nanojaxgpt.interchange.targets import new_folder
from nanojaxgpt.interchange.tensors import Slot, Tensor, slots
from nanojaxgpt.interchange.values import is_number
from nanojaxgpt.interchange.weights import (
    DTYPES,
    Stored,
    first_names,
    read_json,
    stored_tensors,
    write_json,
    write_weights,
)
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import parameters
from nanojaxgpt.sample import GREEDY_BELOW

# Constants that old versions saved beside the weights, and what a model of text doesn't need.
IGNORED = re.compile(r"\.attn\.(masked_)?bias$|\.attention\.(masked_)?bias$|rotary_emb\.inv_freq$")
OF_IMAGES = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
GENERATION = "generation_config.json"
ROWS = 4096  # that are compared at a time
SAMPLE = ("temperature", "top_k", "top_p", "min_p")


def open_folder(folder: Path) -> Pretrained:
    """Return the model of a folder, after all checks that need no weights.

    Raises ConfigError for a config that can't be expressed, CheckpointError for weights that are
    missing, damaged or of another shape, DataError for its tokenizer.
    """
    folder = Path(folder)
    given = read_json(folder / "config.json")
    try:
        family, fields = model_fields(given)
        changes = {f"model.{name}": value for name, value in fields.items()}
        section = configs.with_fields(configs.sections.Config(), changes).model
        cfg = ModelConfig(**vars(section))
        parameters(cfg)  # whose sizes must be known
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from error
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        raise ConfigError(
            f"{folder / 'config.json'} has a value of another kind than it should have: {error}"
        ) from error
    wanted, stored = match(folder, family, cfg, stored_tensors(folder))
    if {tensor.dtype for tensor in stored.values()} == {"BF16"}:
        cfg = dataclasses.replace(cfg, param_dtype="bfloat16")
    generation = read_json(folder / GENERATION, missing={})
    stated = {**(given.get("text_config") or {}), **given}
    own = stated_ids(folder / "config.json", stated, cfg.vocab_size)
    named = stated_ids(folder / GENERATION, generation, cfg.vocab_size)
    ends = end_ids(generation) or end_ids(stated)
    tokenizer = open_tokenizer(folder, ends[:1], cfg.vocab_size)
    sample = read_sampling(generation)
    if others := tuple(end for end in ends[1:] if end < tokenizer.vocab_size):
        sample["end_ids"] = others
    template = open_chat_template(folder)
    reader, special = tensor_reader(stored), named_tokens(folder, tokenizer)
    provenance = Provenance(folder.resolve().name, card_license(folder), "", special, own, named)
    return Pretrained(folder, family.model_type, cfg, wanted, reader, tokenizer, template, sample,
                      provenance)  # fmt: skip


def read_sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the config's section `sample` that a generation_config.json sets."""
    if not generation.get("do_sample"):
        return {}
    defaults = vars(configs.sections.Sample())
    given = {name: generation.get(name) for name in SAMPLE}
    return {name: type(defaults[name])(value) for name, value in given.items()
            if is_number(value)}  # fmt: skip


def end_ids(config: Mapping[str, Any]) -> list[int]:
    """Return the ids that end a text, by a config's eos_token_id: one, a list of them, or none."""
    value = config.get("eos_token_id")
    items = value if isinstance(value, list) else [value]
    return [item for item in items if type(item) is int and item >= 0]


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
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} is {tensor.dtype}; quantized weights can't be read, "
                f"only {', '.join(DTYPES.values())}"
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
    with head.open() as one, table.open() as another:
        rows, others = one.get_slice(head.name), another.get_slice(table.name)
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
    provenance: Provenance = SCRATCH,
) -> None:
    """Write a model, its weights as `dtype`; `card` is the README, `sample` as in Pretrained.

    Of the table's rows `vocab_size` are written; 0: all. The family is the first that can express
    the model, unless `model_type` names one. The folder appears when it is complete. Raises
    ConfigError where no family can, or the folder is not empty; CheckpointError where it can't be
    written, or a number leaves the range of `dtype`.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    cfg = dataclasses.replace(cfg, vocab_size=vocab_size or cfg.vocab_size)
    family, keys = choose_family(cfg, model_type)
    rows = {"embed_VD", "head_VD", "head_bias"} & set(params)
    params = {**params} | {name: params[name][: cfg.vocab_size] for name in rows}
    ends = [tokenizer.end_id, *sample.get("end_ids", ())] if tokenizer.end_id >= 0 else []
    own = dict(
        bos_token_id=tokenizer.start_id if tokenizer.start_id >= 0 else None,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=None,
    )
    keys |= dict(dtype=dtype, torch_dtype=dtype)
    keys |= provenance.config or own
    stated = {**(provenance.generation or provenance.config or own)}
    stated["eos_token_id"] = own["eos_token_id"]  # with sample.end_ids, which a run may change
    with new_folder(folder) as partial:
        write_weights(partial, slots(cfg, family.tensors), params, dtype)
        write_json(partial / "config.json", keys)
        write_json(partial / GENERATION, stated | write_sampling(sample))
        write_tokenizer(partial, tokenizer, cfg.seq_len, chat_template, provenance.tokenizer)
        (partial / "README.md").write_text(card)


def write_sampling(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of generation_config.json for fields of the config's section `sample`."""
    names = ("temperature", "top_k", "top_p", "min_p")
    keys = {name: sample[name] for name in names if sample.get(name)}
    greedy = not keys or sample.get("temperature", 1.0) < GREEDY_BELOW
    return {"do_sample": False} if greedy else {"do_sample": True} | keys
