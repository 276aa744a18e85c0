"""The entries of `model.rotary`: each says how one layer turns its queries and keys."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from nanojaxgpt.checks import read_float

# The words that each scaling takes, besides those of `default`.
SCALINGS: dict[str, tuple[str, ...]] = {
    "default": ("base", "fraction", "scaling"),
    "linear": ("factor",),
    "llama3": ("factor", "original", "low", "high"),
    "yarn": ("factor", "original", "fast", "slow", "truncate", "attention"),
    "longrope": ("factor", "original", "attention", "short", "long"),
}


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions of one layer; the fields are the words of an entry of `model.rotary`.

    The scalings are those of transformers' `rope_type`, whose names for the fields differ.
    """

    base: float = 10000.0
    fraction: float = 1.0  # of the head's dimensions, from the first, that turn
    scaling: str = "default"
    factor: float = 1.0  # how much longer the context became
    original: float = 0.0  # llama3, yarn, longrope: the context before that
    low: float = 1.0  # llama3: low_freq_factor
    high: float = 4.0  # llama3: high_freq_factor
    fast: float = 32.0  # yarn: beta_fast
    slow: float = 1.0  # yarn: beta_slow
    truncate: float = 1.0  # yarn: whether its bounds are whole dimensions
    attention: float = 0.0  # yarn, longrope: factor of cosine and sine; 0: by formula
    short: tuple[float, ...] = ()  # longrope: factors of the wavelengths, seq_len <= original
    long: tuple[float, ...] = ()  # longrope: beyond it

    def turned(self, head_dim: int) -> int:
        """Return how many of the head's dimensions turn."""
        return int(head_dim * self.fraction)


def parse_rotary(entry: str, base: float) -> Rotary | None:
    """Return the positions of an entry of `model.rotary`: none, or words KEY=VALUE.

    `base` is model.rotary_base, where the entry has none. Raises ValueError.
    """
    if entry == "none":
        return None
    known, given = {f.name: f for f in dataclasses.fields(Rotary)}, dict[str, Any](base=base)
    for word in entry.split():
        name, equals, text = word.partition("=")
        if name not in known or not equals:
            raise ValueError(f"{word!r} is not one of {', '.join(known)} with =VALUE, or none")
        if name == "scaling":
            given[name] = text
        elif name in ("short", "long"):
            given[name] = tuple(map(read_float, text.split(",")))
        else:
            given[name] = read_float(text)
    found = Rotary(**given)
    if problem := rotary_problem(found, given):
        raise ValueError(problem)
    return found


def write_rotary(found: Rotary | None, base: float) -> str:
    """Return the shortest entry that `parse_rotary` reads as `found`."""
    if found is None:
        return "none"
    words = {}
    for name, value in vars(found).items():
        default = base if name == "base" else getattr(Rotary, name, None)
        if value != default:
            items = value if isinstance(value, tuple) else (value,)
            words[name] = ",".join(str(item).removesuffix(".0") for item in items)
    return " ".join(f"{name}={text}" for name, text in words.items())


def rotary_problem(found: Rotary, given: Iterable[str]) -> str:
    """Return the fault of one entry, of which the words `given` are written out; or ""."""
    if found.scaling not in SCALINGS:
        return f"scaling={found.scaling!r} must be one of {', '.join(SCALINGS)}"
    taken = SCALINGS["default"] + SCALINGS[found.scaling]
    if unused := [name for name in given if name not in taken]:
        return f"{unused[0]}=... means nothing with scaling={found.scaling}"
    values = [v for v in dataclasses.astuple(found) if not isinstance(v, str)]
    numbers = [n for v in values for n in (v if isinstance(v, tuple) else (v,))]
    if not all(map(math.isfinite, numbers)):
        return "all numbers must be finite"
    if not (found.base > 0 and 0 < found.fraction <= 1 and found.factor >= 1):
        return "base must be above 0, fraction above 0 and at most 1, factor at least 1"
    if "original" in taken and not found.original > 1:
        return f"scaling={found.scaling} needs original=TOKENS, the context before it"
    if found.scaling == "yarn" and not found.base > 1:
        return "scaling=yarn needs a base above 1"
    if not (found.high > found.low and found.fast >= found.slow > 0 and found.attention >= 0):
        return "high must be above low, fast at least slow, slow above 0, attention at least 0"
    if not all(number > 0 for number in found.short + found.long):
        return "short and long must be above 0"
    return ""


def rotary_problems(entries: tuple[str, ...], base: float, head_dim: int) -> list[str]:
    """Return the fault of `model.rotary` for heads of `head_dim` dimensions."""
    problems = []
    for entry in entries:
        try:
            found = parse_rotary(entry, base)
        except ValueError as error:
            problems.append(f"model.rotary: {error}")
            continue
        turned = found.turned(head_dim) if found else 0
        if turned % 2 or (found and not turned):
            problems.append(
                f"rotary positions need an even head_dim, of which they turn {turned} of {head_dim}"
            )
        for name in ("short", "long") if found and found.scaling == "longrope" else ():
            if len(getattr(found, name)) != turned // 2:
                problems.append(f"model.rotary: {name} needs {turned // 2} numbers, as many as "
                                "there are frequencies")  # fmt: skip
    return problems if entries else ["model.rotary is empty; ('',) means model.rotary_base alone"]
