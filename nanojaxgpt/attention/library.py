"""Attention of `jax.nn` as XLA compiles it, with all scores at once: the one for ALiBi."""

import jax
from jax.ad_checkpoint import checkpoint_name

from nanojaxgpt.attention.request import Mask, Request, alibi_bias, dense_mask


def supports(request: Request) -> str:
    """Return "", or why `jax.nn.dot_product_attention` can't do it."""
    if request.softcap:
        return "jax.nn.dot_product_attention has no softcap"
    if request.dropout:
        return "jax.nn.dot_product_attention has no dropout"
    return ""


def run(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    request: Request,
    scale: float,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Return attention's output [B, T, N, H]."""
    bias = alibi_bias(mask, request.heads) if request.alibi else None
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, bias, dense_mask(mask), scale=scale, implementation="xla"
    )
    return checkpoint_name(out_BTNH, "attention")
