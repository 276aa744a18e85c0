"""GGUF files: their metadata as the keys of config.json, their tensors, their tokenizer.

A family's facts stand in families.py; here is what llama.cpp's converter calls them, and what it
changes: the rows of llama's queries and keys, and Gemma's norms, of which it stores 1 + weight.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanojaxgpt import config as configs
from nanojaxgpt.config.rotary import Rotary
from nanojaxgpt.config.sections import Config
from nanojaxgpt.errors import CheckpointError, ConfigError, DataError
from nanojaxgpt.extras import require_package
from nanojaxgpt.interchange.families import model_fields, norm, weights
from nanojaxgpt.interchange.gguf_tokenizer import build_tokenizer
from nanojaxgpt.interchange.pretrained import Pretrained
from nanojaxgpt.interchange.tensors import Tensor, slots
from nanojaxgpt.model.config import JobConfig
from nanojaxgpt.model.rotary import frequencies

ROPE_FACTORS = "rope_freqs.weight"  # llama3's scaling, as the divisor of each frequency
SHOWN = 4  # names in a message

BLOCK = "blk.{}."
OUTSIDE = (
    *weights("token_embd", "embed_VD"), *norm("output_norm", "final_norm", biased=True),
    *weights("output", "head_VD"),
)  # fmt: skip
NORMS = (
    *norm(f"{BLOCK}attn_norm", "attention_norm", biased=True),
    *norm(f"{BLOCK}ffn_norm", "mlp_norm", biased=True),
)
VALUES = (
    *weights(f"{BLOCK}attn_v", "v_DKH", biased=True),
    *weights(f"{BLOCK}attn_output", "o_NHD", biased=True),
    *norm(f"{BLOCK}attn_q_norm", "q_norm"), *norm(f"{BLOCK}attn_k_norm", "k_norm"),
)  # fmt: skip
QUERIES = (
    *weights(f"{BLOCK}attn_q", "q_DNH", biased=True),
    *weights(f"{BLOCK}attn_k", "k_DKH", biased=True),
)
MLP = (
    *weights(f"{BLOCK}ffn_gate", "gate_DF", biased=True),
    *weights(f"{BLOCK}ffn_up", "up_DF", biased=True),
    *weights(f"{BLOCK}ffn_down", "down_DF", biased=True),
)
PLAIN = OUTSIDE + NORMS + QUERIES + VALUES + MLP
LLAMA = tuple(tensor._replace(paired=True) if tensor in QUERIES else tensor for tensor in PLAIN)
GEMMA = tuple(
    tensor._replace(offset=1.0) if "norm" in tensor.name else tensor
    for tensor in (
        *PLAIN, *norm(f"{BLOCK}post_attention_norm", "attention_output_norm"),
        *norm(f"{BLOCK}post_ffw_norm", "mlp_output_norm"),
    )
)  # fmt: skip
GPT2 = (
    *OUTSIDE, *NORMS, *VALUES, *MLP, *weights("position_embd", "position_TD"),
    *weights(f"{BLOCK}attn_qkv", "q_DNH", "k_DKH", "v_DKH", biased=True),
)  # fmt: skip

# What llama.cpp calls the keys of config.json, after the name of the architecture.
KEYS = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta",
}  # fmt: skip
GPT2_KEYS = {
    "block_count": "n_layer", "context_length": "n_positions", "embedding_length": "n_embd",
    "feed_forward_length": "n_inner", "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
}  # fmt: skip
GEMMA_KEYS = KEYS | {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# What repeats other keys, or says nothing of what is computed.
HARMLESS = {
    "vocab_size", "attention.value_length", "rope.dimension_count", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    "attention.causal",
}  # fmt: skip


class Architecture(NamedTuple):
    """How GGUF names one family."""

    model_type: str
    tensors: tuple[Tensor, ...]
    keys: Mapping[str, str] = KEYS
    fixed: Mapping[str, Any] = {}  # keys of config.json that it leaves out
    scale_layers: int = 0  # Gemma's model of so many layers scales scores by its width a head


ARCHITECTURES = {
    "llama": Architecture("llama", LLAMA),
    "qwen2": Architecture("qwen2", PLAIN),
    "qwen3": Architecture("qwen3", PLAIN),
    "gemma2": Architecture("gemma2", GEMMA, GEMMA_KEYS, {}, 46),
    "gemma3": Architecture("gemma3_text", GEMMA, GEMMA_KEYS, {}, 62),
    "gpt2": Architecture("gpt2", GPT2, GPT2_KEYS),
}


def open_file(path: Path) -> Pretrained:
    """Return the model of a GGUF file; its weights are read as float32.

    Raises ConfigError for what can't be expressed, CheckpointError for a damaged file or tensors
    that are missing, unknown or of another shape, DataError for its tokenizer.
    """
    require_package("gguf", "gguf", str(path))
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
    except (OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        raise CheckpointError(f"{path} is damaged or cut off, or not GGUF: {error}") from error
    try:
        how, keys = config_keys(fields, stored)
        family, found = model_fields(keys)
        values = {f"model.{name}": value for name, value in found.items()}
        cfg = configs.build(dict(configs.fields(Config())) | values, JobConfig).model
        wanted = slots(cfg, how.tensors)
        check_tensors(wanted, stored)
        tokenizer, sample = build_tokenizer(fields, cfg.vocab_size)
    except (ConfigError, DataError, CheckpointError) as error:
        raise type(error)(f"{path}: {error}") from error
    template = str(fields.get("tokenizer.chat_template") or "")
    read = dequantizing_reader(path, stored, gguf.dequantize)
    return Pretrained(path, family.model_type, cfg, wanted, read, tokenizer, template, sample)


def config_keys(
    fields: Mapping[str, Any], stored: Mapping[str, Any]
) -> tuple[Architecture, dict[str, Any]]:
    """Return the architecture, and the metadata as the keys of config.json. Raises ConfigError."""
    name = fields.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ConfigError(f"the architecture {name!r} is not supported; supported are "
                          f"{', '.join(ARCHITECTURES)}")  # fmt: skip
    if "token_embd.weight" not in stored:
        raise CheckpointError("it has no tensor token_embd.weight")
    how = ARCHITECTURES[name]
    given = {key.removeprefix(f"{name}."): value for key, value in fields.items()
             if key.startswith(f"{name}.")}  # fmt: skip
    if unknown := [key for key in given if key not in how.keys and key not in HARMLESS]:
        raise ConfigError(f"the key {name}.{unknown[0]} ({given[unknown[0]]!r}) is not known, and "
                          "may change what the model computes")  # fmt: skip
    keys = {"model_type": how.model_type, **how.fixed}
    keys |= {theirs: plain(given[key]) for key, theirs in how.keys.items() if key in given}
    keys["vocab_size"] = int(stored["token_embd.weight"].shape[1])
    keys["tie_word_embeddings"] = "output.weight" not in stored
    if "hidden_size" in keys and "num_attention_heads" in keys:
        width = keys["hidden_size"] // keys["num_attention_heads"]
        keys.setdefault("head_dim", width)
        if how.scale_layers:
            wide = keys.get("num_hidden_layers") == how.scale_layers
            keys["query_pre_attn_scalar"] = width if wide else keys["head_dim"]
    return how, keys | rope_keys(name, given, keys, stored)


def plain(value: Any) -> Any:
    """Return a number of Python's: a float32 as the shortest text that gives it."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def rope_keys(
    name: str, given: Mapping[str, Any], keys: Mapping[str, Any], stored: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the scaling of the rotary positions. Raises ConfigError for an unknown one."""
    turned = given.get("rope.dimension_count", keys.get("head_dim"))
    if turned != keys.get("head_dim"):
        raise ConfigError(f"{name}.rope.dimension_count={turned} is not the size of a head")
    if ROPE_FACTORS in stored:
        return {"rope_scaling": llama3_keys(np.asarray(stored[ROPE_FACTORS].data), keys)}
    kind = given.get("rope.scaling.type", "none")
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise ConfigError(f"{name}.rope.scaling.type={kind!r} is not supported: linear, yarn are")
    found = {"rope_type": kind, "factor": plain(given.get("rope.scaling.factor", 1.0))}
    if kind == "yarn":
        found["original_max_position_embeddings"] = given.get(
            "rope.scaling.original_context_length", keys["max_position_embeddings"]
        )
    return {"rope_scaling": found}


def llama3_keys(factors: np.ndarray, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return llama3's scaling whose frequencies these factors give. Raises ConfigError."""
    head_dim, base = keys["head_dim"], keys.get("rope_theta", 10000.0)
    plain_angles, _ = frequencies(Rotary(base=base), head_dim, 1)
    for factor in (8.0, 32.0):
        rotary = Rotary(base=base, scaling="llama3", factor=factor, original=8192)
        angles, _ = frequencies(rotary, head_dim, 1)
        if np.allclose(plain_angles / factors, angles, rtol=1e-5, atol=0):
            return dict(rope_type="llama3", factor=factor, low_freq_factor=1.0,
                        high_freq_factor=4.0, original_max_position_embeddings=8192)  # fmt: skip
    raise ConfigError(f"the factors in {ROPE_FACTORS} are not those of Llama 3.1 or 3.2")


def check_tensors(wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raise CheckpointError where tensors are missing, unknown or of another shape."""
    for names, said in (
        ([name for name in wanted if name not in stored], "it lacks"),
        (
            [n for n in stored if n not in wanted and n != ROPE_FACTORS],
            "the model has no place for",
        ),
    ):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise CheckpointError(f"{said} {', '.join(names[:SHOWN])}{more}")
    for name, slot in wanted.items():
        shape = tuple(int(size) for size in reversed(stored[name].shape))
        if shape != slot.shape:
            raise CheckpointError(f"{name} has the shape {list(shape)}, but by the metadata it is "
                                  f"{list(slot.shape)}")  # fmt: skip


def dequantizing_reader(
    path: Path, stored: Mapping[str, Any], dequantize: Callable[..., np.ndarray]
) -> Callable[[str], np.ndarray]:
    """Return read(name) -> the tensor as float32, in the shape that numpy gives it."""

    def read(name: str) -> np.ndarray:
        tensor = stored[name]
        try:
            array = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(f"{path}: {name} is {tensor.tensor_type.name}, which the package "
                                  "gguf can't read") from error  # fmt: skip
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return np.asarray(array, np.float32).reshape(shape)

    return read
