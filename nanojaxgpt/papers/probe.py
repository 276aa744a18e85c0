"""In: a model, its parameters and tokens. Out: the attention that the model computes inside."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from nanojaxgpt.attention.request import Mask, alibi_bias, dense_mask, soft_cap
from nanojaxgpt.data.rows import Batch
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.model.transformer import Transformer


@functools.partial(jax.jit, static_argnums=0)
def attention_logits(cfg: ModelConfig, params: Params, batch: Batch) -> jax.Array:
    """Return what each layer's softmax is taken of, float32 [L, B, N, T, S]; -inf is not seen."""
    kept: Any = Transformer(cfg).apply(
        {"params": params}, batch.tokens_BT, batch.positions_BT, batch.segments_BT,
        logits=False, mutable="intermediates",
    )[1]  # fmt: skip
    q_LBTNH, k_LBSKH = jax.tree.map(
        lambda *heads: jnp.stack(heads), *kept["intermediates"]["heads"]
    )
    k_LBSNH = jnp.repeat(k_LBSKH, cfg.num_heads // cfg.num_kv_heads, axis=3)
    logits_LBNTS = cfg.attention_scale * jnp.einsum(
        "LBTNH,LBSNH->LBNTS", q_LBTNH, k_LBSNH, preferred_element_type=jnp.float32
    )
    logits_LBNTS = soft_cap(logits_LBNTS, cfg.attention_softcap)
    order_1T = jnp.arange(batch.tokens_BT.shape[1])[None]
    mask = Mask(order_1T, order_1T, batch.segments_BT, batch.segments_BT)
    if cfg.positions == "alibi":
        logits_LBNTS += alibi_bias(mask, cfg.num_heads)
    windows = [cfg.layer(index).window for index in range(cfg.num_layers)]
    seen = [dense_mask(mask._replace(window=window)) for window in windows]
    return jnp.where(jnp.stack(seen), logits_LBNTS, -jnp.inf)


@functools.partial(jax.jit, static_argnums=0)
def largest_logits(cfg: ModelConfig, params: Params, batch: Batch) -> jax.Array:
    """Return the largest attention logit of each layer [L], with one row's in memory at a time."""

    def row(one: Batch) -> jax.Array:
        logits_LBNTS = attention_logits(cfg, params, jax.tree.map(lambda x: x[None], one))
        return jnp.max(logits_LBNTS, axis=(1, 2, 3, 4))

    return jnp.max(jax.lax.map(row, batch), axis=0)


@functools.partial(jax.jit, static_argnums=0)
def attention_weights(cfg: ModelConfig, params: Params, batch: Batch) -> jax.Array:
    """Return the attention weights of each layer [L, B, N, T, S]."""
    return jax.nn.softmax(attention_logits(cfg, params, batch))
