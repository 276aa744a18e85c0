"""Attention windows in a config.json: which layers have `sliding_window`, both ways.

The ways (of families.py): "" none, `all`, `pattern` (all but every n-th), `upper` (from
max_window_layers on), `nope` (those without positions).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nanojaxgpt.errors import ConfigError
from nanojaxgpt.interchange.rope import FULL, SLIDING

# The keys that each way reads.
WINDOW_KEYS = {
    "": set(),
    "all": {"sliding_window"},
    "pattern": {"sliding_window", "layer_types", "sliding_window_pattern",
                "_sliding_window_pattern"},
    "upper": {"sliding_window", "layer_types", "use_sliding_window", "max_window_layers"},
    "nope": {"sliding_window", "layer_types", "use_sliding_window", "max_window_layers"},
}  # fmt: skip


def read_kinds(
    config: Mapping[str, Any], way: str, period: int, turned: Sequence[bool], sliding: bool
) -> list[str]:
    """Return the kind of each layer; `turned` says which have rotary positions.

    Raises ConfigError where layer_types is not one of two kinds for each layer.
    """
    layers = range(len(turned))
    types = config.get("layer_types") if "layer_types" in WINDOW_KEYS[way] else None
    if types is not None:
        if len(types) != len(layers) or not set(types) <= {SLIDING, FULL}:
            raise ConfigError(
                f"layer_types must name {SLIDING} or {FULL} for each of {len(layers)} layers"
            )
        return list(types)
    if way == "all":
        return [SLIDING] * len(layers)
    if way == "pattern":
        period = config.get("sliding_window_pattern") or period
        return [SLIDING if (index + 1) % period else FULL for index in layers]
    if way == "upper":
        first = config.get("max_window_layers", 28)
        return [SLIDING if sliding and index >= first else FULL for index in layers]
    if way == "nope":
        return [SLIDING if sliding and not turns else FULL for turns in turned]
    return [FULL] * len(layers)


def read_window(config: Mapping[str, Any], way: str, default: int) -> int:
    """Return the window of sliding layers in tokens; 0: none."""
    if not way or ("use_sliding_window" in WINDOW_KEYS[way]
                   and not config.get("use_sliding_window", False)):  # fmt: skip
        return 0
    return config.get("sliding_window", default) or 0


def write_windows(windows: Sequence[int], way: str) -> dict[str, Any]:
    """Return the keys for the window of each layer, 0: none, as far as this way can say it."""
    window = max(windows) or None
    kinds = [SLIDING if own else FULL for own in windows]
    if not way:
        return {}
    if way == "all":
        return {"sliding_window": window}
    keys = {"sliding_window": window, "layer_types": kinds}
    if way == "pattern":
        period = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
        if kinds == read_kinds({}, way, period, [True] * len(kinds), True):
            keys["sliding_window_pattern"] = period
        return keys
    first = kinds.index(SLIDING) if SLIDING in kinds else len(kinds)
    return keys | {"use_sliding_window": window is not None, "max_window_layers": first}
