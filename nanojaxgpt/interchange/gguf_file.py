"""A GGUF file, as llama.cpp runs it: opened and checked, no weight read yet.

Its metadata become the keys of a config.json, so that what makes a family stands in families.py
alone. Every key of the architecture must be known, and every tensor used.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nanojaxgpt import config as configs
from nanojaxgpt.config.rotary import Rotary
from nanojaxgpt.errors import CheckpointError, ConfigError
from nanojaxgpt.interchange.families import FAMILIES, model_fields
from nanojaxgpt.interchange.gguf_header import GgufHeader, read_header
from nanojaxgpt.interchange.gguf_tokenizer import open_vocabulary, read_template, special_ids
from nanojaxgpt.interchange.pretrained import Pretrained
from nanojaxgpt.interchange.provenance import Provenance, plain_text
from nanojaxgpt.interchange.rope import FULL, ORIGINAL, SLIDING
from nanojaxgpt.interchange.tensors import Slot, Tensor, slots
from nanojaxgpt.interchange.weights import first_names
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.rotary import frequencies

# Architectures, and their families.
ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
    "gemma3": "gemma3_text", "gpt2": "gpt2",
}  # fmt: skip
# Parameters (without the dimensions in their names) and how tensors that hold them are called.
NAMES = {
    "embed_VD": "token_embd", "position_TD": "position_embd", "final_norm": "output_norm",
    "head_VD": "output", "attention_norm": "blk.{}.attn_norm", "mlp_norm": "blk.{}.ffn_norm",
    "attention_output_norm": "blk.{}.post_attention_norm",
    "mlp_output_norm": "blk.{}.post_ffw_norm", "q_norm": "blk.{}.attn_q_norm",
    "k_norm": "blk.{}.attn_k_norm", "q_DNH": "blk.{}.attn_q", "k_DKH": "blk.{}.attn_k",
    "v_DKH": "blk.{}.attn_v", "o_NHD": "blk.{}.attn_output", "gate_DF": "blk.{}.ffn_gate",
    "up_DF": "blk.{}.ffn_up", "down_DF": "blk.{}.ffn_down",
}  # fmt: skip
QKV = ("q_DNH", "k_DKH", "v_DKH")
# The keys of metadata, after that of the architecture, and those of config.json.
KEYS = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads", "attention.key_length": "head_dim",
    "attention.head_count_kv": "num_key_value_heads", "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}  # fmt: skip
GEMMA2_KEYS = KEYS | {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.sliding_window": "sliding_window",
}
GEMMA3_KEYS = GEMMA2_KEYS | {"rope.freq_base_swa": "rope_local_base_freq"}
GPT2_KEYS = {
    "block_count": "n_layer", "context_length": "n_positions", "embedding_length": "n_embd",
    "feed_forward_length": "n_inner", "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}  # fmt: skip
ALL_KEYS = {"gemma2": GEMMA2_KEYS, "gemma3": GEMMA3_KEYS, "gpt2": GPT2_KEYS}
OPTIONAL = {"attention.key_length", "attention.head_count_kv", "rope.freq_base",
            "rope.freq_base_swa", "attn_logit_softcapping", "final_logit_softcapping"}  # fmt: skip
# Keys that change no logits, those that only one value of theirs leaves as they are, and those
# that functions below read.
HARMLESS = {"vocab_size", "rope.scaling.finetuned", "tensor_data_layout"}
ONLY = {
    "expert_count": 0, "expert_used_count": 0, "attention.causal": True, "pooling_type": 0,
    "use_parallel_residual": False, "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0, "rope.scaling.yarn_ext_factor": 1.0,
}  # fmt: skip
SCALING = {  # of YaRN
    "rope.scaling.factor": "factor", "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.original_context_length": ORIGINAL,
}  # fmt: skip
PATTERN = "attention.sliding_window_pattern"
READ = {"attention.value_length", "rope.dimension_count", "rope.scaling.type",
        PATTERN, *SCALING}  # fmt: skip
# Sizes of which the file does not say that their scores are scaled by the width over the heads.
SCALED_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}
FREQUENCIES = "rope_freqs.weight"  # Llama 3's: what divides each frequency
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, ORIGINAL: 8192}


def open_file(path: Path) -> Pretrained:
    """Return the model of a file, after all checks that need no weights.

    Raises ConfigError for an architecture, or a key of it, that can't be expressed,
    CheckpointError for a damaged file or tensors of other names, shapes or types than the model
    has, DataError for its tokenizer.
    """
    header = read_header(Path(path))
    try:
        architecture = find_architecture(header.metadata)
        family, fields = model_fields(config_keys(header, architecture))
        changes = {f"model.{name}": value for name, value in fields.items()}
        cfg = ModelConfig(**vars(configs.with_fields(configs.sections.Config(), changes).model))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    wanted = match_tensors(header, slots(cfg, tensors(architecture)))
    tokenizer, sample = open_vocabulary(path, header.metadata, cfg.vocab_size)
    special = special_ids(path, header.metadata, cfg.vocab_size)
    ids = {f"{key}_id": special.get(key) for key in ("bos_token", "eos_token", "pad_token")}
    license = plain_text(header.metadata.get("general.license"))
    provenance = Provenance(path.name, license, "", special, ids, ids)
    return Pretrained(header.path, family.model_type, cfg, wanted, header.read, tokenizer,
                      read_template(path, header.metadata), sample, provenance)  # fmt: skip


def find_architecture(metadata: Mapping[str, Any]) -> str:
    """Return the architecture. Raises ConfigError for one that is not supported."""
    architecture = str(metadata.get("general.architecture"))
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"the architecture {architecture!r} is not supported, only "
                          f"{', '.join(ARCHITECTURES)}")  # fmt: skip
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ConfigError(f"it holds no model, but has general.type={kind!r}")
    if (count := metadata.get("split.count", 1)) not in (0, 1):
        raise ConfigError(f"it is one of {count} parts of a model: join them with llama.cpp's "
                          "llama-gguf-split --merge FIRST OUTPUT")  # fmt: skip
    return architecture


@functools.cache
def tensors(architecture: str) -> tuple[Tensor, ...]:
    """Return the table of tensors of an architecture."""
    found: list[Tensor] = []
    offset = 1.0 if architecture.startswith("gemma") else 0.0  # norms are stored as 1 + weight
    for part, name in NAMES.items():
        parts, paired = (part,), architecture == "llama" and part in ("q_DNH", "k_DKH")
        if architecture == "gpt2" and part in QKV:
            parts, name = QKV, "blk.{}.attn_qkv"
        if Tensor(f"{name}.weight", parts) in found:
            continue
        if part.endswith("norm"):
            found.append(Tensor(f"{name}.weight", (f"{part}_scale",), offset=offset))
            found.append(Tensor(f"{name}.bias", (f"{part}_bias",)))
        else:
            biases = tuple(f"{each.split('_')[0]}_bias" for each in parts)
            found.append(Tensor(f"{name}.weight", parts, paired=paired))
            found.append(Tensor(f"{name}.bias", biases, paired=paired))
    return tuple(found)


def config_keys(header: GgufHeader, architecture: str) -> dict[str, Any]:
    """Return the config.json that the metadata stand for. Raises ConfigError."""
    known = ALL_KEYS.get(architecture, KEYS)
    given = own_keys(header.metadata, architecture, known)
    if missing := [name for name in known if name not in given and name not in OPTIONAL]:
        raise ConfigError(f"it has no {architecture}.{missing[0]}")
    layers = given["block_count"]
    if type(layers) is not int or not 0 < layers <= len(header.tensors):
        raise ConfigError(f"{architecture}.block_count={layers!r}, but there are "
                          f"{len(header.tensors)} tensors")  # fmt: skip
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ConfigError("it has no token_embd.weight")
    family = FAMILIES[ARCHITECTURES[architecture]]
    keys: dict[str, Any] = {
        "model_type": family.model_type, "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }  # fmt: skip
    keys |= {theirs: given[name] for name, theirs in known.items() if name in given}
    for key, part in zip(family.bias, ("attn_output", "ffn_down"), strict=False):
        keys[key] = f"blk.0.{part}.bias" in header.tensors
    if architecture == "gpt2":
        return keys
    width, heads = keys["hidden_size"], keys["num_attention_heads"]
    head_dim = keys.setdefault("head_dim", width // heads if heads else 0)
    keys.setdefault("num_key_value_heads", heads)  # llama.cpp's defaults, not transformers'
    keys.setdefault("rope_theta", 10000.0)
    for name in ("attention.value_length", "rope.dimension_count"):
        if name in given and given[name] != head_dim:
            raise ConfigError(f"{architecture}.{name}={given[name]} is not supported, only the "
                              f"size of a head, {head_dim}")  # fmt: skip
    scalings = rope_scaling(given, architecture), llama3_scaling(header, keys)
    if all(scalings):
        raise ConfigError(f"it has both {architecture}.rope.scaling.type and {FREQUENCIES}")
    if any(scalings):
        keys["rope_scaling"] = scalings[0] | scalings[1]
    if architecture.startswith("gemma"):
        wide = (architecture, keys["num_hidden_layers"]) in SCALED_BY_WIDTH
        keys["query_pre_attn_scalar"] = width // heads if wide else head_dim
        keys |= window_pattern(given.get(PATTERN, 0))
    return keys


def own_keys(
    metadata: Mapping[str, Any], architecture: str, known: Mapping[str, str]
) -> dict[str, Any]:
    """Return the keys of the architecture itself. Raises ConfigError for one that is not known."""
    given: dict[str, Any] = {}
    for full, value in metadata.items():
        name = full.removeprefix(f"{architecture}.")
        if name == full or name in HARMLESS:
            continue
        if name in ONLY and value != ONLY[name]:
            raise ConfigError(f"{full}={value!r} is not supported, only {ONLY[name]!r}")
        if name not in ONLY and name not in known and name not in READ:
            raise ConfigError(
                f"the key {full} ({value!r}) is not known, and may change what the model computes"
            )
        if isinstance(value, list) and name != PATTERN:
            if len(set(value)) != 1:
                raise ConfigError(f"{full} differs from layer to layer, which is not supported")
            value = value[0]
        if isinstance(value, str) and name != "rope.scaling.type":
            raise ConfigError(f"{full}={value!r} is not a number")
        given[name] = value
    return given


def window_pattern(value: Any) -> dict[str, Any]:
    """Return the keys of a pattern of windows: 0, a period, or whether each layer has one."""
    if isinstance(value, list):
        return {"layer_types": [SLIDING if slides else FULL for slides in value]}
    return {"sliding_window_pattern": value} if value else {}


def rope_scaling(given: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    """Return the `rope_scaling` of a config.json; empty: none. Raises ConfigError."""
    factor = given.get("rope.scaling.factor", 0.0)
    kind = given.get("rope.scaling.type", "linear" if factor else "none")
    if kind == "yarn":
        words = {theirs: given[name] for name, theirs in SCALING.items() if name in given}
        return {"rope_type": "yarn"} | words
    if kind not in ("none", "linear"):
        raise ConfigError(f"{architecture}.rope.scaling.type={kind!r} is not supported, only none, "
                          "linear, yarn")  # fmt: skip
    scaled = kind == "linear" and factor not in (0, 1)
    return {"rope_type": "linear", "factor": factor} if scaled else {}


def llama3_scaling(header: GgufHeader, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `rope_scaling` that the divisors in the file follow from; empty: there are none.

    The file has no parameters of it, so they are taken to be those that Meta published. Raises
    ConfigError where other divisors follow from these.
    """
    if keys["model_type"] != "llama" or FREQUENCIES not in header.tensors:
        return {}
    divisors, head_dim = header.read(FREQUENCIES), keys["head_dim"]
    plain = Rotary(base=keys["rope_theta"])
    scaled = dataclasses.replace(plain, scaling="llama3", factor=float(divisors.max()),
                                 original=float(LLAMA3[ORIGINAL]))  # fmt: skip
    expected, found = (frequencies(rotary, head_dim, 0)[0] for rotary in (plain, scaled))
    expected = expected / found
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-5, atol=0):
        raise ConfigError(f"the divisors in {FREQUENCIES} are not those of Llama 3, so the "
                          "positions can't be expressed")  # fmt: skip
    return {"rope_type": "llama3", "factor": scaled.factor} | LLAMA3


def match_tensors(header: GgufHeader, wanted: dict[str, Slot]) -> dict[str, Slot]:
    """Return the tensors of the model, found in the file. Raises CheckpointError."""
    import gguf

    if missing := [name for name in wanted if name not in header.tensors]:
        raise CheckpointError(f"{header.path} lacks the tensors {first_names(missing)}")
    checked = {FREQUENCIES} if header.metadata["general.architecture"] == "llama" else set()
    if left := sorted(set(header.tensors) - set(wanted) - checked):
        raise CheckpointError(f"{header.path}: the model has no place for {first_names(left)}")
    for name, slot in wanted.items():
        tensor = header.tensors[name]
        if tensor.shape != slot.shape:
            raise CheckpointError(
                f"{header.path}: {name} has the shape {list(tensor.shape)}, but by the metadata it "
                f"is {list(slot.shape)}"
            )
    for kind in {tensor.kind: tensor for tensor in header.tensors.values()}:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError:
            names = [tensor.name for tensor in header.tensors.values() if tensor.kind == kind]
            raise CheckpointError(f"{header.path}: {first_names(names)}: numbers of the type "
                                  f"{kind.name} can't be read") from None  # fmt: skip
    return wanted
