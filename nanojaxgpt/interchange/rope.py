"""Rotary positions in a config.json, older keys and newer ones, both ways.

transformers 5 keeps all in `rope_parameters`, for some families one set for each kind of layer;
before, `rope_theta`, `rope_scaling` and keys of a family's own held the same.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from nanojaxgpt.config.rotary import SCALINGS, Rotary, rotary_problem
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.interchange.values import NUMBER, NUMBERS, SWITCH, TEXT, check_value

SLIDING, FULL = "sliding_attention", "full_attention"
# Our words for the parameters of a scaling; "original" is also a key beside the parameters.
WORDS = {
    "factor": "factor", "original_max_position_embeddings": "original", "low_freq_factor": "low",
    "high_freq_factor": "high", "beta_fast": "fast", "beta_slow": "slow", "truncate": "truncate",
    "attention_factor": "attention", "short_factor": "short", "long_factor": "long",
}  # fmt: skip
ORIGINAL = "original_max_position_embeddings"
NEEDED = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
          "longrope": ("short_factor", "long_factor")}  # fmt: skip
ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
MSCALE = {"mscale", "mscale_all_dim"}  # of YaRN: they give its attention_factor
KEYS = {"rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", ORIGINAL}


class RopeKeys(NamedTuple):
    """What a family makes of the keys: its defaults, and names of its own."""

    base: float = 10000.0
    fraction: float = 1.0
    partial: bool = False  # its heads may turn in part
    theta: str = "rope_theta"  # the older key of the base
    share: str = "partial_rotary_factor"  # the older key of the fraction
    kinds: bool = False  # each kind of layer has parameters of its own
    local_theta: str = ""  # the older key of the base of sliding layers
    local_base: float = 0.0  # its default; 0: that of the others
    aliases: Mapping[str, str] = {}  # other names of scalings

    @property
    def keys(self) -> set[str]:
        """The keys of config.json that it reads."""
        return KEYS | {self.theta, self.share, self.local_theta} - {""}


def read_rope(config: Mapping[str, Any], how: RopeKeys) -> dict[str, Rotary]:
    """Return the positions of each kind of layer. Raises ConfigError for what is not known."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    nested = new is not None and bool({SLIDING, FULL} & set(new))
    if new and nested != how.kinds:
        wanted = "one set for each kind of layer" if how.kinds else "one set for all layers"
        raise ConfigError(f"rope_parameters of this model type must have {wanted}")
    if not how.kinds:
        found = [read_one(config, given, how, how.theta, how.base) for given in (new, old) if given]
        found = found or [read_one(config, {}, how, how.theta, how.base)]
        if found[0] != found[-1]:
            raise ConfigError("rope_scaling and rope_parameters contradict each other")
        return {SLIDING: found[0], FULL: found[0]}
    parts = new or {}
    full = {**(parts.get(FULL) or {}), **(old or {})}
    local_theta = how.local_theta or how.theta
    return {
        FULL: read_one(config, full, how, how.theta, how.base),
        SLIDING: read_one(config, parts.get(SLIDING) or {}, how, local_theta,
                          how.local_base or how.base),
    }  # fmt: skip


def read_one(
    config: Mapping[str, Any], given: Mapping[str, Any], how: RopeKeys, theta: str, base: float
) -> Rotary:
    """Return the positions that one set of parameters describes."""
    stated = given.get("rope_type") or given.get("type") or "default"
    check_value("rope_type", stated, TEXT)
    kind = how.aliases.get(stated, stated)
    if kind not in SCALINGS:
        raise ConfigError(
            f"rope_type={stated!r} is not supported, only {', '.join(SCALINGS)}: positions would "
            "be wrong"
        )
    known = {theirs for theirs, ours in WORDS.items() if ours in SCALINGS[kind]} | ALWAYS
    known |= MSCALE if kind == "yarn" else {ORIGINAL}
    for name in given:
        if name not in known and given[name] is not None:
            raise ConfigError(f"{name} means nothing with rope_type={stated!r}")
    if missing := [name for name in NEEDED.get(kind, ()) if given.get(name) is None]:
        raise ConfigError(f"rope_type={stated!r} needs {missing[0]}")
    words: dict[str, Any] = {"scaling": kind}
    bases = [given.get("rope_theta")] + [
        config.get(name) for name in {theta, *(() if how.kinds else ("rope_theta",))}
    ]
    shares = [given.get("partial_rotary_factor")] + [
        config.get(name) for name in {how.share, "partial_rotary_factor"}
    ]
    words["base"] = agreed("rope_theta", bases, base)
    words["fraction"] = agreed("partial_rotary_factor", shares, how.fraction)
    if words["fraction"] != 1 and not how.partial:
        raise ConfigError("partial_rotary_factor must be 1 for this model type")
    for theirs, ours in WORDS.items():
        if ours in SCALINGS[kind] and given.get(theirs) is not None:
            words[ours] = read_word(theirs, given[theirs])
    if "original" in SCALINGS[kind]:
        stated_original = None if how.kinds else config.get(ORIGINAL)
        limit = config["max_position_embeddings"]
        words["original"] = float(stated_original or words.get("original") or limit)
        words.setdefault("factor", max(1.0, limit / words["original"]))
    if kind == "yarn" and not words.get("attention"):
        words["attention"] = yarn_attention(words["factor"], given)
    found = Rotary(**words)
    if how.kinds and not found.truncate:  # transformers looks for it beside the sets
        raise ConfigError("truncate of one kind of layer is not read by transformers: leave it out")
    if problem := rotary_problem(found, words):
        raise ConfigError(f"the rotary positions: {problem}")
    return found


def read_word(name: str, value: Any) -> Any:
    """Return a parameter as a number, or a list of numbers as a tuple. Raises ConfigError."""
    kind = NUMBERS if name in ("short_factor", "long_factor") else NUMBER
    check_value(name, value, SWITCH if name == "truncate" else kind)
    return tuple(map(float, value)) if kind is NUMBERS else float(value)


def agreed(name: str, values: Iterable[Any], default: float) -> float:
    """Return the value that is given once, or several times the same."""
    found = [read_word(name, value) for value in values if value is not None]
    if len(set(found)) > 1:
        raise ConfigError(f"{name} is given twice, as {found[0]:g} and as {found[1]:g}")
    return found[0] if found else default


def yarn_attention(factor: float, given: Mapping[str, Any]) -> float:
    """Return the factor that mscale and mscale_all_dim make; 0: there is none, by the formula."""
    scales = [read_word(name, given.get(name) or 0) for name in ("mscale", "mscale_all_dim")]
    if not all(scales) or factor <= 1:
        return 0.0
    above, below = (0.1 * scale * math.log(factor) + 1 for scale in scales)
    return above / below


def write_rope(kinds: Mapping[str, Rotary], seq_len: int, how: RopeKeys) -> dict[str, Any]:
    """Return the keys of config.json, newer and older, for the positions of each kind."""
    full = kinds.get(FULL) or kinds[SLIDING]
    sliding = kinds.get(SLIDING) or full
    keys: dict[str, Any] = {how.theta: full.base}
    if how.partial:
        keys[how.share] = full.fraction
    parameters = write_one(full, how)
    scaling = {name: value for name, value in parameters.items() if name not in ALWAYS}
    if full.scaling == "longrope":
        keys[ORIGINAL] = int(full.original)
        del scaling[ORIGINAL]
        # Older versions take these two and no more; where more is said, they refuse it.
        if full.factor == max(1.0, seq_len / full.original):
            del scaling["factor"]
    if full.scaling != "default":
        old = {"type": full.scaling} if full.scaling == "longrope" else {}
        keys["rope_scaling"] = {"rope_type": full.scaling, **scaling} if not old else old | scaling
    keys["rope_parameters"] = parameters
    if how.kinds:
        keys["rope_parameters"] = {FULL: parameters, SLIDING: write_one(sliding, how)}
    if how.local_theta:
        keys[how.local_theta] = sliding.base
    return keys


def write_one(rotary: Rotary, how: RopeKeys) -> dict[str, Any]:
    """Return one set of parameters."""
    found: dict[str, Any] = {"rope_type": rotary.scaling, "rope_theta": rotary.base}
    if how.partial:
        found["partial_rotary_factor"] = rotary.fraction
    for theirs, ours in WORDS.items():
        value = getattr(rotary, ours)
        if ours not in SCALINGS[rotary.scaling] or (ours == "attention" and not value):
            continue
        if ours == "truncate":
            if not value:
                found[theirs] = False
        elif ours == "original":
            found[theirs] = int(value)
        else:
            found[theirs] = list(value) if isinstance(value, tuple) else value
    return found
