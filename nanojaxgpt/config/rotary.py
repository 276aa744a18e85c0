"""The entries of `model.rotary`: each says how one layer turns its queries and keys."""

import dataclasses
import math
from typing import Any

from nanojaxgpt.checks import read_float

SCALINGS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions of one layer; the fields are the words of an entry of `model.rotary`.

    The scalings are those of transformers' `rope_type`, whose names for the fields differ.
    """

    base: float = 10000.0
    fraction: float = 1.0  # of the head's dimensions, from the first, that turn
    scaling: str = "default"
    factor: float = 1.0  # of the scaling: how much longer the context became
    original: float = 0.0  # llama3, yarn, longrope: the context before that
    low: float = 1.0  # llama3: low_freq_factor
    high: float = 4.0  # llama3: high_freq_factor
    fast: float = 32.0  # yarn: beta_fast
    slow: float = 1.0  # yarn: beta_slow
    truncate: float = 1.0  # yarn: whether its bounds are whole dimensions
    attention: float = 0.0  # yarn, longrope: factor of cosine and sine; 0: by formula
    short: tuple[float, ...] = ()  # longrope: factors of the wavelengths within `original`
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
    if found.scaling not in SCALINGS:
        raise ValueError(f"scaling={found.scaling!r} must be one of {', '.join(SCALINGS)}")
    if not (found.base > 0 and 0 < found.fraction <= 1 and 1 <= found.factor < math.inf):
        raise ValueError("base must be above 0, fraction above 0 and at most 1, factor at least 1")
    if found.scaling in ("llama3", "yarn", "longrope") and not found.original >= 1:
        raise ValueError(f"scaling={found.scaling} needs original=TOKENS, the context before it")
    return found


def rotary_problems(entries: tuple[str, ...], base: float, head_dim: int) -> list[str]:
    """Return what is wrong with `model.rotary` for heads of `head_dim` dimensions."""
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
