"""The head of the model: from features to logits, as a pytree of what it takes for that."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.projection import Blocks, project
from nanojaxgpt.model.quantize import Int8
from nanojaxgpt.sharding import constrain


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """`head(x_BTD)` gives float32 logits [B, T, V]: so a loss can make them in parts."""

    kernel: jax.Array | Blocks | Int8  # [V, D], or as it is laid out for decoding
    bias_V: jax.Array | None
    multiplier: Any  # of the logits
    terms: str = dataclasses.field(metadata=dict(static=True))  # see projection.project
    cfg: ModelConfig = dataclasses.field(metadata=dict(static=True))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return the logits of features [B, T, D]."""
        cfg = self.cfg
        x_BTD = x_BTD * jnp.asarray(self.multiplier, x_BTD.dtype)
        logits_BTV = project(x_BTD, self.kernel, self.terms, jnp.float32)
        if self.bias_V is not None:
            logits_BTV += self.bias_V.astype(jnp.float32)
        if cfg.width != 1:
            logits_BTV /= cfg.width
        if cfg.logit_softcap:
            logits_BTV = cfg.logit_softcap * jnp.tanh(logits_BTV / cfg.logit_softcap)
        return constrain(logits_BTV, "batch", "sequence", "vocab")
