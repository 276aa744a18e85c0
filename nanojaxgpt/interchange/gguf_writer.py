"""A model of llama's shape as a GGUF file, for llama.cpp and what is built on it."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from nanojaxgpt import rundir
from nanojaxgpt.console import with_bar
from nanojaxgpt.data.tokenizers import JsonTokenizer, Tokenizer
from nanojaxgpt.errors import CheckpointError, ConfigError
from nanojaxgpt.extras import require_package
from nanojaxgpt.interchange.gguf_file import KEYS, LLAMA, ROPE_FACTORS
from nanojaxgpt.interchange.gguf_tokenizer import CONTROL, NORMAL, STEPS, USER
from nanojaxgpt.interchange.hf_config import choose_family
from nanojaxgpt.interchange.hf_tokenizer import tokenizer_json
from nanojaxgpt.interchange.loading import write_tensors
from nanojaxgpt.interchange.tensors import slots
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.rotary import frequencies

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # general.file_type


def write_file(
    path: Path, cfg: ModelConfig, params: Params, tokenizer: Tokenizer, chat_template: str,
    name: str, dtype: str,
) -> None:  # fmt: skip
    """Write a model, its matrices as `dtype`; the file appears when it is complete.

    Of the table's rows cfg.vocab_size are written. Raises ConfigError where llama's architecture,
    or llama.cpp's tokenizers, can't express the model, CheckpointError where it can't be written.
    """
    if dtype not in TYPES:
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(TYPES)}")
    require_package("gguf", "gguf", "format=gguf")
    import gguf

    _, keys = choose_family(cfg, "llama")
    kind = gguf.GGMLQuantizationType[TYPES[dtype]]
    with rundir.writing(path.parent, CheckpointError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            partial = Path(folder) / path.name
            writer = gguf.GGUFWriter(partial, "llama", use_temp_file=True)
            writer.add_name(name)
            writer.add_file_type(FILE_TYPES[TYPES[dtype]])
            add_shape(writer, cfg, keys)
            add_tokenizer(writer, tokenizer, chat_template)
            rows = {"embed_VD", "head_VD"} & set(params)
            cut = {**params} | {row: params[row][: cfg.vocab_size] for row in rows}
            named = slots(cfg, LLAMA)
            for tensor, array in with_bar(write_tensors(named, cut), "writing weights", len(named)):
                array = array.astype(np.float32)
                if array.ndim < 2 or kind == gguf.GGMLQuantizationType.F32:
                    writer.add_tensor(tensor, array)
                else:
                    writer.add_tensor(tensor, gguf.quantize(array, kind), raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            partial.rename(path)


def add_shape(writer: Any, cfg: ModelConfig, keys: dict[str, Any]) -> None:
    """Write the keys of config.json by GGUF's names, and the scaling of the positions."""
    for theirs, name in KEYS.items():
        value = cfg.head_dim if name == "head_dim" else keys.get(name)
        if value is None:
            value = cfg.num_kv_heads if name == "num_key_value_heads" else 10000.0
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"llama.{theirs}", value)
    writer.add_uint32("llama.attention.value_length", cfg.head_dim)
    writer.add_uint32("llama.rope.dimension_count", cfg.head_dim)
    writer.add_uint32("llama.vocab_size", cfg.vocab_size)
    rotary = cfg.layers[0].rotary
    if rotary is None or rotary.scaling == "default":
        return
    if rotary.scaling == "llama3":
        angles, _ = frequencies(rotary, cfg.head_dim, cfg.seq_len)
        plain, _ = frequencies(type(rotary)(base=rotary.base), cfg.head_dim, cfg.seq_len)
        writer.add_tensor(ROPE_FACTORS, np.asarray(plain / angles, np.float32))
    elif rotary.scaling in ("linear", "yarn"):
        writer.add_string("llama.rope.scaling.type", rotary.scaling)
        writer.add_float32("llama.rope.scaling.factor", rotary.factor)
        if rotary.original:
            original = round(rotary.original)
            writer.add_uint32("llama.rope.scaling.original_context_length", original)
    else:
        raise ConfigError(f"GGUF can't express model.rotary with scaling={rotary.scaling}")


def add_tokenizer(writer: Any, tokenizer: Tokenizer, chat_template: str) -> None:
    """Write a byte-level BPE. Raises ConfigError for another kind of tokenizer."""
    content = json.loads(tokenizer_json(tokenizer)) if isinstance(tokenizer, JsonTokenizer) else {}
    model, steps = content.get("model", {}), content.get("pre_tokenizer") or {}
    parts = steps.get("pretokenizers", [steps])
    known = [pre for pre, wanted in STEPS.items() if essence_of(wanted) == essence_of(parts)]
    if model.get("type") != "BPE" or not known:
        raise ConfigError(f"GGUF needs a byte-level BPE whose text is cut as for "
                          f"{', '.join(STEPS)}; "
                          f"this tokenizer is of the kind {tokenizer.kind}")  # fmt: skip
    added = {one["id"]: one for one in content["added_tokens"]}
    tokens = {number: token for token, number in model["vocab"].items()}
    tokens |= {number: one["content"] for number, one in added.items()}
    count = tokenizer.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(known[0])
    writer.add_token_list([tokens.get(number, f"[unused{number}]") for number in range(count)])
    kinds = [(CONTROL if added[number]["special"] else USER) if number in added else NORMAL
             for number in range(count)]  # fmt: skip
    writer.add_token_types(kinds)
    merges = model["merges"]
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    writer.add_add_bos_token(tokenizer.start_id >= 0)
    for number, add in ((tokenizer.end_id, writer.add_eos_token_id),
                        (tokenizer.start_id, writer.add_bos_token_id)):  # fmt: skip
        if number >= 0:
            add(number)
    if chat_template:
        writer.add_chat_template(chat_template)


def essence_of(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer without what only concerns offsets."""
    return [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]
