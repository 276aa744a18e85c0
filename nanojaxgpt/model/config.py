"""The model's shape: the config's fields with their derived values, and its layers as a pattern.

No jax here: a config is checked before any backend starts.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

from nanojaxgpt import config
from nanojaxgpt.config.rotary import Rotary, parse_rotary
from nanojaxgpt.config.sections import Config, Lora, Model


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer; `mlp_dim` gives parameters another shape."""

    window: int  # tokens that a query sees, itself included; 0: all
    rotary: Rotary | None
    mlp_dim: int


class LayerStack(NamedTuple):
    """Layers whose parameters are stacked: the index of the first one, and how many there are."""

    first: int
    count: int


class Multipliers(NamedTuple):
    """Factors of the embeddings, the attention's scores and the logits, and lora.alpha; scalars."""

    embed: Any
    attention: Any
    logit: Any
    alpha: Any


# The config fields of `Multipliers`, in its order.
MULTIPLIERS = ("embed_multiplier", "attention_multiplier", "logit_multiplier", "alpha")


@dataclasses.dataclass(frozen=True)
class ModelConfig(Model):
    """The section `model` of a config, complete, with the adapters of the section `lora`.

    Fields given as 0 (num_kv_heads, head_dim, mlp_dim, attention_scale) are filled in. Raises
    ValueError where the vocabulary has no size yet.
    """

    lora: Lora = dataclasses.field(default=Lora())
    filled: tuple[str, ...] = dataclasses.field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError("model.vocab_size is 0: it comes from the tokenizer")
        head_dim = self.head_dim or self.embed_dim // self.num_heads
        sizes = {
            "head_dim": head_dim,
            "num_kv_heads": self.num_heads,
            "mlp_dim": 4 * self.embed_dim,
            "attention_scale": head_dim ** -(1 if self.mup_base_dim else 0.5),
        }
        filled = tuple(name for name in sizes if not getattr(self, name))
        object.__setattr__(self, "filled", filled)
        for name in filled:
            object.__setattr__(self, name, sizes[name])

    @property
    def bare(self) -> "ModelConfig":
        """The model without adapters."""
        return ModelConfig(**self.given())

    def given(self) -> dict[str, Any]:
        """Return {field: value} as in the config: 0 for what was filled in."""
        rules = self.rules()
        return super().given() | {name: rules[name].default for name in self.filled}

    @property
    def width(self) -> float:
        """The width over that at which muP is the standard parametrization; 1 without muP."""
        return self.embed_dim / self.mup_base_dim if self.mup_base_dim else 1.0

    @property
    def multipliers(self) -> "Multipliers":
        """The numbers of the forward pass that can also be given traced."""
        own = self.embed_multiplier, self.attention_multiplier, self.logit_multiplier
        return Multipliers(*own, self.lora.alpha)

    @property
    def deterministic(self) -> bool:
        """Whether training needs no random numbers: nothing is dropped."""
        return not self.dropout and not (self.lora.rank and self.lora.dropout)

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
    def stacks(self) -> dict[str, LayerStack]:
        """The stacks of parameters by their names: layers of one shape are one."""
        shapes = [layer.mlp_dim for layer in self.layers]
        period, alike = len(shapes), len(set(shapes)) == 1
        found = {}
        for number, shape in enumerate(dict.fromkeys(shapes)):
            members = [index for index in range(period) if shapes[index] == shape]
            count = sum(-((index - self.num_layers) // period) for index in members)
            found["layers" if alike else f"layers_{number}"] = LayerStack(members[0], count)
        return found

    @functools.cached_property
    def places(self) -> tuple[tuple[str, int], ...]:
        """The stack of each layer, and its row in it."""
        rows, found = dict.fromkeys(self.stacks, 0), list[tuple[str, int]]()
        for index in range(self.num_layers):
            name = self.stack_of(self.layer(index))
            found.append((name, rows[name]))
            rows[name] += 1
        return tuple(found)

    def stack_of(self, layer: LayerConfig) -> str:
        """Return the name of the stack that layers of this shape are in."""
        names = {self.layer(stack.first).mlp_dim: name for name, stack in self.stacks.items()}
        return names[layer.mlp_dim]

    def layer(self, index: int) -> LayerConfig:
        """Return the layer of this index, from 0."""
        return self.layers[index % len(self.layers)]


@dataclasses.dataclass(frozen=True)
class JobConfig(Config):
    """A config whose model is complete: what a job takes. `data.loader.resolve` makes it."""

    model: ModelConfig = dataclasses.field()  # no default: the vocabulary must be known

    def __post_init__(self) -> None:
        if self.model.lora != self.lora:
            object.__setattr__(self, "model", ModelConfig(**self.model.given(), lora=self.lora))


def complete(cfg: config.AnyConfig) -> JobConfig:
    """Return a config whose vocabulary has a size, as that of a run, for a job."""
    return cfg if isinstance(cfg, JobConfig) else config.build(dict(config.fields(cfg)), JobConfig)
