"""The forward pass that all objectives share: a batch's features, and the head that reads them."""

from typing import Any

import jax

from nanojaxgpt.data.rows import Batch
from nanojaxgpt.model.config import MULTIPLIERS, Multipliers
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.schedules import Hyper


def features(
    model: Transformer,
    params: Params,
    batch: Batch,
    hyper: Hyper,
    rng: jax.Array,
    dropout: bool = True,
) -> Any:
    """Return (x_BTD, head), where head(x_BTD) gives float32 logits [B, T, V].

    Without `dropout` the model has none, whatever its config says.
    """
    found, _ = model.apply(
        {"params": params},
        batch.tokens_BT, batch.positions_BT, batch.segments_BT,
        deterministic=not dropout or model.cfg.deterministic, logits=False, rngs={"dropout": rng},
        multipliers=Multipliers(*(hyper[name] for name in MULTIPLIERS)),
    )  # fmt: skip
    return found
