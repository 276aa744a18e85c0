"""Folders of adapters as the package peft has them. Out: those of a model. In: a model's weights
with an adapter merged as they are read.

Their matrices are lora_A [rank, in] and lora_B [out, rank]. Where one tensor of theirs holds
several kernels of ours, its adapter has the ranks of all: lora_A one above the other, lora_B a
block for each.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nanojaxgpt.errors import CheckpointError, ConfigError
from nanojaxgpt.interchange.families import FAMILIES
from nanojaxgpt.interchange.hf_config import choose_family
from nanojaxgpt.interchange.pretrained import Pretrained
from nanojaxgpt.interchange.provenance import HUB, card_license
from nanojaxgpt.interchange.targets import new_folder
from nanojaxgpt.interchange.tensors import Slot, from_parts, outer, slots
from nanojaxgpt.interchange.weights import (
    DTYPES,
    Stored,
    file_tensors,
    first_names,
    read_json,
    write_json,
    write_safetensors,
)
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Keys that change no logits, or are read from the weights.
HARMLESS = {
    "arrow_config", "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_dropout", "peft_version", "qalora_group_size", "revision",
    "target_modules", "use_qalora",
}  # fmt: skip
READ = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"}
# What other keys may be, beside null, false and empty.
ONLY: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "task_type": ("CAUSAL_LM",), "bias": ("none",),
    "init_lora_weights": (True, "gaussian"), "megatron_core": ("megatron.core",),
}  # fmt: skip


class Adapted(NamedTuple):
    """A tensor of the other format with an adapter: a rank for each of its kernels that has one."""

    slot: Slot
    ranks: int

    @property
    def module(self) -> str:
        """The name of its module within a layer, such as self_attn.q_proj."""
        return self.slot.tensor.name.split("{}.")[-1].removesuffix(".weight")


def adapted_tensors(cfg: ModelConfig, tensors: tuple, params: Params) -> dict[str, Adapted]:
    """Return the tensors that hold kernels with adapters, by the names of their modules."""
    found = {}
    for name, slot in slots(cfg.bare, tensors).items():
        rows = [place.row for place in slot.places if place.row.kind == "kernel"]
        ranks = sum(row.adapter[0] in params[row.stack] for row in rows)
        if ranks:
            found[name.removesuffix(".weight")] = Adapted(slot, ranks)
    return found


def adapter_matrices(slot: Slot, params: Params, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Return lora_A [ranks, in] and lora_B [out, ranks] of a tensor, float32."""
    downs, ups = list[np.ndarray](), list[np.ndarray]()
    rows = [place.row for place in slot.places]
    ranks = rank * sum(row.adapter[0] in params[row.stack] for row in rows)
    for place in slot.places:
        row, (down, up) = place.row, place.row.adapter
        whole = np.zeros((ranks, *outer(row)), np.float32)
        if down in params[row.stack]:
            first = rank * len(downs)
            whole[first : first + rank] = params[row.stack][up][place.index]
            downs.append(np.asarray(params[row.stack][down][place.index]).reshape(-1, rank).T)
        ups.append(whole)
    places = tuple(
        place._replace(row=place.row._replace(shape=one.shape, summed=(0,)))
        for place, one in zip(slot.places, ups, strict=True)
    )
    outputs = Slot(slot.tensor._replace(transposed=False), places)
    return np.ascontiguousarray(np.concatenate(downs)), from_parts(outputs, ups)


def write_adapter(
    folder: Path,
    cfg: ModelConfig,
    params: Params,
    base: str,
    model_type: str = "",
    dtype: str = "float32",
    card: str = "",
) -> None:
    """Write the adapters of a model for peft; `base` names the folder or repository they adapt.

    `model_type` is the family of the base, by default the first that can express it. Raises
    ConfigError where none can, or the folder is not empty.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    family, _ = choose_family(cfg.bare, model_type)
    found, lora = adapted_tensors(cfg, family.tensors, params), cfg.lora
    modules = {one.module: one.ranks for one in found.values()}
    least = min(modules.values())
    more = {module: count for module, count in modules.items() if count > least}

    def alpha(count: int) -> float:
        return lora.alpha * (math.sqrt(count) if lora.rank_stabilized else count)

    keys = dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base, bias="none",
        r=least * lora.rank, lora_alpha=alpha(least), lora_dropout=lora.dropout,
        rank_pattern={module: count * lora.rank for module, count in more.items()},
        alpha_pattern={module: alpha(count) for module, count in more.items()},
        target_modules=sorted(modules), modules_to_save=None, use_dora=False,
        use_rslora=lora.rank_stabilized, inference_mode=True, init_lora_weights=True,
        fan_in_fan_out=any(one.slot.tensor.transposed for one in found.values()),
    )  # fmt: skip
    arrays = {}
    for module, one in found.items():
        pair = adapter_matrices(one.slot, params, lora.rank)
        for side, array in zip("AB", pair, strict=True):
            arrays[f"base_model.model.{module}.lora_{side}.weight"] = array
    shapes = {name: array.shape for name, array in arrays.items()}
    with new_folder(folder) as partial:
        write_json(partial / CONFIG, keys)
        write_safetensors(partial / WEIGHTS, shapes, dtype, iter(arrays.items()))
        if card:
            (partial / "README.md").write_text(card)


def check_settings(keys: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming the key, for what can't be read or isn't known."""
    for name, value in keys.items():
        if name in HARMLESS or name in READ or not value:
            continue
        if name not in ONLY:
            raise ConfigError(f"{name}={value!r} is not supported")
        if value not in ONLY[name]:
            raise ConfigError(f"{name}={value!r} is not supported, only {ONLY[name][0]!r}")


def open_adapter(folder: Path, find_model: Callable[[str], Path | Pretrained]) -> Pretrained:
    """Return the base of an adapter, whose weights are read with the adapter merged.

    `find_model` opens the base by its name. Raises ConfigError for what the adapter says and can't
    be expressed, CheckpointError where it doesn't fit the base.
    """
    keys = read_json(folder / CONFIG)
    try:
        check_settings(keys)
        name = keys.get("base_model_name_or_path")
        if keys.get("peft_type") != "LORA" or not isinstance(name, str) or not name:
            raise ConfigError("it needs peft_type=LORA and base_model_name_or_path")
    except ConfigError as error:
        raise ConfigError(f"{folder / CONFIG}: {error}") from error
    place = next((path for path in (Path(name), folder / name) if path.exists()), None)
    base = find_model(str(place) if place else f"{HUB}{name}")
    if isinstance(base, Path) or base.family not in FAMILIES or base.origin.suffix == ".gguf":
        raise ConfigError(f"{folder / CONFIG}: the base {name} must be a folder of Hugging Face's "
                          "format; write one with nanojaxgpt export")  # fmt: skip
    deltas = match_adapter(folder, keys, base)

    def read(name: str) -> np.ndarray:
        array = base.read(name)
        if name not in deltas:
            return array
        down, up, scale = deltas[name]
        delta = np.float32(scale) * (read_float32(up) @ read_float32(down))
        delta = delta.T if base.slots[name].tensor.transposed else delta
        return array.astype(np.float32) + delta

    known = base.provenance
    provenance = known._replace(
        name=folder.resolve().name, license=card_license(folder) or known.license,
        base=known.name if place else f"{HUB}{name}",
    )  # fmt: skip
    return base._replace(origin=folder, read=read, provenance=provenance)


def read_float32(stored: Stored) -> np.ndarray:
    """Return the numbers of a tensor as float32."""
    return stored.read().astype(np.float32)


def match_adapter(
    folder: Path, keys: Mapping[str, Any], base: Pretrained
) -> dict[str, tuple[Stored, Stored, float]]:
    """Return lora_A, lora_B and the scale of each tensor of the base that has an adapter.

    Raises ConfigError for tensors that aren't those of LoRA, CheckpointError for another base's.
    """
    files = file_tensors(folder / WEIGHTS)
    pairs: dict[str, dict[str, Stored]] = {}
    for name, stored in files.items():
        found = KEY.fullmatch(name)
        if not found:
            raise ConfigError(f"{folder / WEIGHTS}: {name} is not supported: only lora_A and "
                              "lora_B of linear layers are")  # fmt: skip
        if stored.dtype not in DTYPES.values():
            raise CheckpointError(f"{folder / WEIGHTS}: {name} is {stored.dtype}")
        pairs.setdefault(found["module"], {})[found["side"]] = stored
    known = {name.removesuffix(".weight"): slot for name, slot in base.slots.items()
             if slot.places[0].row.kind == "kernel"}  # fmt: skip
    if wrong := sorted(set(pairs) - set(known)):
        raise CheckpointError(
            f"{folder} adapts {first_names(wrong)}, which {base.origin} ({base.family}) doesn't "
            "have as a linear layer: it belongs to another base, or can't be expressed"
        )
    if not pairs:
        raise CheckpointError(f"{folder / WEIGHTS} has no adapters")
    deltas = {}
    for module, pair in pairs.items():
        rank, scale = rank_and_scale(module, keys)
        slot = known[module]
        out, into = slot.shape[::-1] if slot.tensor.transposed else slot.shape
        for side, shape in (("A", (rank, into)), ("B", (out, rank))):
            stored = pair.get(side)
            if stored is None or stored.shape != shape:
                there = "missing" if stored is None else list(stored.shape)
                raise CheckpointError(
                    f"{folder}: lora_{side} of {module} is {there}, but by {CONFIG} and the base "
                    f"{base.origin} it is {list(shape)}"
                )
        deltas[f"{module}.weight"] = pair["A"], pair["B"], scale
    return deltas


def rank_and_scale(module: str, keys: Mapping[str, Any]) -> tuple[int, float]:
    """Return the rank of a module's adapter, and what its output is multiplied by."""

    def choose(patterns: str, default: str) -> Any:
        for pattern, value in (keys.get(patterns) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        return keys.get(default, 8)

    rank, alpha = choose("rank_pattern", "r"), choose("alpha_pattern", "lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise ConfigError(f"{CONFIG}: {module} has r={rank!r} and lora_alpha={alpha!r}")
    return rank, alpha / (math.sqrt(rank) if keys.get("use_rslora") else rank)
