"""In: our model. Out: the family that can express it, and its config.json.

What a family can't say is found by reading what was written: a field that comes back different.
"""

import math
from collections.abc import Mapping
from typing import Any

from nanojaxgpt.errors import ConfigError
from nanojaxgpt.interchange.families import FAMILIES, Family, model_fields
from nanojaxgpt.interchange.rope import FULL, SLIDING, write_rope
from nanojaxgpt.interchange.tensors import slots
from nanojaxgpt.interchange.windows import write_windows
from nanojaxgpt.model.config import ModelConfig


def essence(cfg: ModelConfig) -> dict[str, Any]:
    """Return what decides the logits, by field; what has no effect as it is, is left out.

    `layers` stands for the fields that layers.windows, rotary and mlp_dims repeat.
    """
    names = ["num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "mlp", "mlp_dim",
             "seq_len", "vocab_size", "positions", "norm", "norm_placement", "norm_eps",
             "norm_scale", "norm_offset", "final_norm", "parallel_block", "bias", "head_bias",
             "qk_norm", "smeared_keys", "attention_softcap", "logit_softcap", "tied_head",
             "embed_multiplier", "residual_multiplier"]  # fmt: skip
    names += ["norm_bias"] * (cfg.norm == "layernorm") + ["bias_in"] * cfg.bias
    names += ["parallel_norms"] * cfg.parallel_block + ["qk_norm_over"] * cfg.qk_norm
    found = {name: getattr(cfg, name) for name in names}
    found["attention_scale"] = cfg.attention_scale * cfg.attention_multiplier
    found["logit_multiplier"] = cfg.logit_multiplier / cfg.width
    layers = [cfg.layer(index) for index in range(cfg.num_layers)]
    found["windows"] = tuple(layer.window for layer in layers)
    found["rotary"] = tuple(layer.rotary for layer in layers)
    found["mlp_dims"] = tuple(layer.mlp_dim for layer in layers)
    return found


def differences_of(own: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the fields of which the other has another value, or none."""

    def same(a: Any, b: Any) -> bool:
        return (
            math.isclose(a, b, rel_tol=1e-9) if isinstance(a, float) and b is not None else a == b
        )

    return [name for name, value in own.items() if not same(value, other.get(name))]


def write_config(family: Family, cfg: ModelConfig) -> dict[str, Any]:
    """Return the keys of a config.json for the model, as far as the family can say them."""
    own = essence(cfg)
    keys: dict[str, Any] = {"model_type": family.model_type,
                            "architectures": [family.architecture]}  # fmt: skip
    for name, key in family.keys.items():
        value = own[key.field]
        keys[name] = key.write(value) if value or isinstance(value, bool) else None
    attention, *mlp = family.bias or ("",)
    if attention:
        keys[attention] = cfg.bias
        keys |= dict.fromkeys(mlp, cfg.bias and cfg.bias_in == "all")
    keys |= write_windows(own["windows"], family.windows)
    if family.nope:
        keys["no_rope_layers"] = [int(rotary is not None) for rotary in own["rotary"]]
    if family.rope:
        kinds = {SLIDING if window else FULL: rotary for window, rotary
                 in zip(own["windows"], own["rotary"], strict=True) if rotary}  # fmt: skip
        if kinds:
            keys |= write_rope(kinds, cfg.seq_len, family.rope)
    return keys


def lost_fields(family: Family, cfg: ModelConfig, keys: Mapping[str, Any]) -> list[str]:
    """Return the fields of the model that come back different from its config.json."""
    try:
        back = ModelConfig(**model_fields(keys)[1])
        lost = differences_of(essence(cfg), essence(back))
        if not lost:
            slots(cfg, family.tensors)
        return lost
    except (ConfigError, ValueError) as error:
        return [str(error)]


def choose_family(cfg: ModelConfig, model_type: str = "") -> tuple[Family, dict[str, Any]]:
    """Return the first family that can express the model, or the one asked for; its config.json.

    Raises ConfigError with the fields that it lacks.
    """
    if model_type and model_type not in FAMILIES:
        raise ConfigError(f"{model_type!r} must be one of {', '.join(FAMILIES)}")
    lacking: dict[str, list[str]] = {}
    for family in [FAMILIES[model_type]] if model_type else FAMILIES.values():
        keys = write_config(family, cfg)
        lacking[family.model_type] = lost_fields(family, cfg, keys)
        if not lacking[family.model_type]:
            return family, keys
    nearest = min(lacking, key=lambda one: (not hasattr(cfg, lacking[one][0]), len(lacking[one])))
    reasons = [f"model.{name}={getattr(cfg, name)!r}" if hasattr(cfg, name) else name
               for name in lacking[nearest]]  # fmt: skip
    asked = f"{model_type} can't" if model_type else "no model family of Hugging Face can"
    near = "" if model_type else f"; the nearest is {nearest}, which can't"
    raise ConfigError(f"{asked} express this model{near}: {', '.join(reasons)}")
