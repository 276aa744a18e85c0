"""Our model as a GGUF file of the architecture llama, which llama.cpp and others run."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from nanojaxgpt.config.rotary import Rotary
from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.errors import CheckpointError, ConfigError
from nanojaxgpt.extras import require_package
from nanojaxgpt.interchange.gguf_file import FREQUENCIES, KEYS, tensors
from nanojaxgpt.interchange.gguf_tokenizer import TEMPLATE, write_vocabulary
from nanojaxgpt.interchange.hf_config import choose_family
from nanojaxgpt.interchange.loading import write_tensors
from nanojaxgpt.interchange.provenance import SCRATCH, Provenance
from nanojaxgpt.interchange.targets import new_target
from nanojaxgpt.interchange.tensors import Slot, slots
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.rotary import frequencies

# Types of the matrices, and their numbers as general.file_type; vectors are always F32.
TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}


def write_file(
    path: Path,
    cfg: ModelConfig,
    params: Any,
    tokenizer: Tokenizer,
    chat_template: str,
    name: str,
    kind: str,
    provenance: Provenance = SCRATCH,
) -> None:
    """Write a model, its matrices as `kind` of TYPES; `name` is its title, as people read it.

    Of Q8_0 those whose rows are no whole blocks of 32 become F16. The file appears when it is
    complete. Raises ConfigError where llama or GGUF can't express the model or its tokenizer,
    CheckpointError where the file can't be written, or a number leaves the range of `kind`.
    """
    require_package("gguf", "gguf", "writing a GGUF file")
    import gguf

    if kind not in TYPES:
        raise ConfigError(f"the type {kind!r} must be one of {', '.join(TYPES)}")
    metadata, divisors = model_metadata(cfg)
    metadata |= {"general.type": "model", "general.name": name, TEMPLATE: chat_template,
                 "general.file_type": TYPES[kind], "general.quantization_version": 2}  # fmt: skip
    if provenance.license:
        metadata["general.license"] = provenance.license
    described = write_vocabulary(tokenizer, cfg.vocab_size, provenance.tokenizer)
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in described.items()}
    with new_target(path) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        try:
            write_metadata(writer, metadata)
            write_blocks(writer, slots(cfg, tensors("llama")), params, kind, divisors)
        finally:
            writer.close()


def model_metadata(cfg: ModelConfig) -> tuple[dict[str, Any], np.ndarray]:
    """Return the keys of the architecture, and what divides each frequency; empty: nothing.

    Raises ConfigError for positions that they can't express.
    """
    _, keys = choose_family(cfg, "llama")
    metadata = {name: keys[theirs] for name, theirs in KEYS.items()}
    metadata |= {"vocab_size": cfg.vocab_size, "attention.value_length": cfg.head_dim,
                 "rope.dimension_count": cfg.head_dim}  # fmt: skip
    rotary, divisors = cfg.layer(0).rotary, np.zeros(0, np.float32)
    assert rotary is not None  # the family llama has positions
    if rotary.scaling == "linear":
        metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": rotary.factor}
    elif rotary.scaling == "yarn":
        plain = Rotary(rotary.base, 1.0, "yarn", rotary.factor, rotary.original)
        waves = frequencies(plain, cfg.head_dim, 0)[1]
        if dataclasses.replace(rotary, attention=0.0) != plain or (
            rotary.attention and not math.isclose(rotary.attention, waves)
        ):
            raise ConfigError("of YaRN only factor and original can be written, not fast, slow, "
                              "truncate or attention: llama.cpp reads no more")  # fmt: skip
        metadata |= {"rope.scaling.type": "yarn", "rope.scaling.factor": rotary.factor,
                     "rope.scaling.original_context_length": int(rotary.original)}  # fmt: skip
    elif rotary.scaling == "llama3":
        plain, _ = frequencies(Rotary(base=rotary.base), cfg.head_dim, 0)
        divisors = plain / frequencies(rotary, cfg.head_dim, 0)[0]
    return {f"llama.{name}": value for name, value in metadata.items()}, divisors


def write_metadata(writer: Any, metadata: dict[str, Any]) -> None:
    """Give the keys to the writer, numbers as the types that llama.cpp expects."""
    for name, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)  # leaves out an empty one
        else:
            writer.add_array(name, value)


def write_blocks(
    writer: Any, wanted: dict[str, Slot], params: Any, kind: str, divisors: np.ndarray
) -> None:
    """Write the file; one tensor at a time is in memory. Raises CheckpointError."""
    import gguf

    def type_of(shape: tuple[int, ...]) -> Any:
        """Return the type that a tensor of this shape has."""
        if len(shape) == 1:
            return gguf.GGMLQuantizationType.F32
        found = gguf.GGMLQuantizationType[kind]
        block, _ = gguf.GGML_QUANT_SIZES[found]
        return gguf.GGMLQuantizationType.F16 if shape[-1] % block else found

    shapes = {name: slot.shape for name, slot in wanted.items()}
    if divisors.size:
        shapes = {FREQUENCIES: divisors.shape} | shapes
    for name, shape in shapes.items():
        block, size = gguf.GGML_QUANT_SIZES[type_of(shape)]
        count = math.prod(shape) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), count, type_of(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if divisors.size:
        writer.write_tensor_data(divisors)
    for name, array in write_tensors(wanted, params):
        found = type_of(array.shape)
        numbers = array.astype(np.float32)
        bound = np.finfo(np.float16 if found.name in ("F16", "Q8_0") else np.float32).max
        if not (np.abs(numbers) <= bound).all():
            raise CheckpointError(f"{name} has numbers that are not finite as {found.name}; write "
                                  "it as BF16 or F32")  # fmt: skip
        writer.write_tensor_data(gguf.quantize(numbers, found))
