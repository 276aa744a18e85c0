"""The model's shape: the config's fields with their derived values, and its layers as a pattern.

No jax here: a config is checked before any backend starts.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

from nanojaxgpt.checks import read_float

GATED = ("swiglu", "geglu")
SCALINGS = ("default", "linear", "llama3", "yarn", "longrope")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Rotary positions of one layer; the fields are the words of an entry of `model.rotary`.

    The scalings are those of transformers' `rope_type`, whose names for the fields differ.
    """

    base: float = 10000.0
    fraction: float = 1.0  # of the head's dimensions, from the first, that turn
    scaling: str = "default"
    factor: float = 1.0  # linear, llama3, yarn: how much longer the context became
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


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer; `mlp_dim` gives parameters another shape."""

    window: int  # tokens that a query sees, itself included; 0: all
    rotary: Rotary | None
    mlp_dim: int


class Multipliers(NamedTuple):
    """Factors of the embeddings, of the attention's scores and of the logits; scalars."""

    embed: Any
    attention: Any
    logit: Any


# The config fields of `Multipliers`, in its order.
MULTIPLIERS = ("embed_multiplier", "attention_multiplier", "logit_multiplier")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model's shape: `ModelConfig(**cfg.model)`; config.py has the defaults and the choices.

    Sizes given as 0 (num_kv_heads, head_dim, mlp_dim) are filled in here.
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp: str
    mlp_dim: int
    mlp_dims: tuple[int, ...]
    seq_len: int
    vocab_size: int
    positions: str
    rotary_base: float
    rotary: tuple[str, ...]
    norm: str
    norm_placement: str
    norm_bias: bool
    norm_eps: float
    norm_scale: bool
    final_norm: bool
    parallel_block: bool
    parallel_norms: bool
    bias: bool
    bias_in: str
    head_bias: bool
    qk_norm: bool
    qk_norm_over: str
    windows: tuple[int, ...]
    smeared_keys: bool
    attention_scale: float
    attention_softcap: float
    logit_softcap: float
    tied_head: bool
    dropout: float
    mup_base_dim: int
    embed_multiplier: float
    attention_multiplier: float
    residual_multiplier: float
    logit_multiplier: float
    init: str
    attention: str
    unroll: int
    remat: str
    param_dtype: str
    compute_dtype: str

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError("model.vocab_size is 0: it comes from the tokenizer")
        head_dim = self.head_dim or self.embed_dim // self.num_heads
        object.__setattr__(self, "head_dim", head_dim)
        object.__setattr__(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
        object.__setattr__(self, "mlp_dim", self.mlp_dim or 4 * self.embed_dim)
        power = 1 if self.mup_base_dim else 0.5
        scale = self.attention_scale or head_dim**-power
        object.__setattr__(self, "attention_scale", scale)

    @property
    def width(self) -> float:
        """The width over that at which muP is the standard parametrization; 1 without muP."""
        return self.embed_dim / self.mup_base_dim if self.mup_base_dim else 1.0

    @property
    def multipliers(self) -> "Multipliers":
        """The numbers of the forward pass that can also be given traced."""
        return Multipliers(self.embed_multiplier, self.attention_multiplier, self.logit_multiplier)

    @functools.cached_property
    def layers(self) -> tuple[LayerConfig, ...]:
        """The shortest period of the layers; it repeats over all of them."""
        kinds = [parse_rotary(entry, self.rotary_base) for entry in self.rotary]
        rotary = kinds if self.positions == "rotary" else [None]
        length = math.lcm(len(self.windows), len(rotary), len(self.mlp_dims))
        every = [
            LayerConfig(
                self.windows[index % len(self.windows)],
                rotary[index % len(rotary)],
                self.mlp_dims[index % len(self.mlp_dims)] or self.mlp_dim,
            )
            for index in range(min(length, self.num_layers))
        ]
        shorter = [n for n in range(1, len(every)) if len(every) % n == 0]
        repeats = [n for n in shorter if every == every[:n] * (len(every) // n)]
        return tuple(every[: repeats[0]] if repeats else every)

    @functools.cached_property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """The layers of each stack of parameters, by its name: layers of one shape are one."""
        found: dict[int, list[int]] = {}
        for index in range(self.num_layers):
            found.setdefault(self.layer(index).mlp_dim, []).append(index)
        alike = len(found) == 1
        return {
            "layers" if alike else f"layers_{number}": tuple(indices)
            for number, indices in enumerate(found.values())
        }

    @functools.cached_property
    def places(self) -> tuple[tuple[str, int], ...]:
        """The stack of each layer, and its row in it."""
        rows = {index: (name, row) for name, indices in self.stacks.items()
                for row, index in enumerate(indices)}  # fmt: skip
        return tuple(rows[index] for index in range(self.num_layers))

    def layer(self, index: int) -> LayerConfig:
        """Return the layer of this index, from 0."""
        return self.layers[index % len(self.layers)]
