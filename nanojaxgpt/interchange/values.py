"""What the keys of a config.json may hold: any other value is refused, with the key and the kind.

null is allowed where transformers allows it, and then means that the value follows from others, or
that something is off.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nanojaxgpt.checks import show
from nanojaxgpt.errors import ConfigError

MOST = 2**31 - 1  # as of the config's fields
LEAST_NUMBER, MOST_NUMBER = 1e-30, 1e30


class Kind(NamedTuple):
    """A kind of value, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]

    def or_null(self) -> "Kind":
        """Return the kind that null is of, too."""
        return Kind(f"{self.words}, or null", lambda value: value is None or self.fits(value))


def is_integer(value: Any, low: int) -> bool:
    """Return whether a value is an integer, and neither a boolean nor out of range."""
    return type(value) is int and low <= value <= MOST


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number, and not a boolean."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


COUNT = Kind(f"an integer from 1 to {MOST:,}", lambda value: is_integer(value, 1))
INDEX = Kind(f"an integer from 0 to {MOST:,}", lambda value: is_integer(value, 0))
POSITIVE = Kind(
    "a number above 0", lambda value: is_number(value) and LEAST_NUMBER <= value <= MOST_NUMBER
)
NUMBER = Kind("a number", is_number)
NUMBERS = Kind(
    "a list of numbers", lambda value: isinstance(value, list) and all(map(is_number, value))
)
SHARE = Kind("a number above 0, at most 1", lambda value: is_number(value) and 0 < value <= 1)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
TEXT = Kind("a string", lambda value: isinstance(value, str))
TEXTS = Kind(
    "a list of strings", lambda value: isinstance(value, list) and all(map(TEXT.fits, value))
)
FLAGS = Kind(
    "a list of 0 and 1",
    lambda value: isinstance(value, list) and all(type(x) in (int, bool) and 0 <= x <= 1
                                                  for x in value),
)  # fmt: skip
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
TOKEN = Kind(
    "the id of a token, a list of ids, or null",
    lambda value: (
        value is None
        or all(is_integer(one, -1) for one in (value if isinstance(value, list) else [value]))
    ),
)
OF_FIELDS = {int: COUNT, float: POSITIVE, bool: SWITCH, str: TEXT}
# Keys of windows, positions and biases, which are no field of ours as they are.
KINDS: Mapping[str, Kind] = {
    "sliding_window": COUNT.or_null(), "sliding_window_pattern": COUNT.or_null(),
    "_sliding_window_pattern": COUNT.or_null(), "use_sliding_window": SWITCH,
    "max_window_layers": INDEX, "layer_types": TEXTS.or_null(),
    "no_rope_layers": FLAGS.or_null(), "no_rope_layer_interval": COUNT,
    "attention_bias": SWITCH, "mlp_bias": SWITCH, "rope_theta": POSITIVE,
    "rotary_emb_base": POSITIVE, "rope_local_base_freq": POSITIVE, "rotary_pct": SHARE,
    "partial_rotary_factor": SHARE.or_null(), "rope_scaling": OBJECT.or_null(),
    "rope_parameters": OBJECT.or_null(), "original_max_position_embeddings": COUNT,
}  # fmt: skip


def check_value(name: str, value: Any, kind: Kind) -> None:
    """Raise ConfigError, naming the key, where a value is of another kind."""
    if not kind.fits(value):
        raise ConfigError(f"{name}={show(value)} must be {kind.words}")
