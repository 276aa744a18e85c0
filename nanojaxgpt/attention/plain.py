"""Attention by its formula, with all scores at once: the oracle of the other kernels."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nanojaxgpt.attention.request import Mask, Request, alibi_bias, dense_mask, soft_cap


def supports(request: Request) -> str:
    """Return "": the formula has no limits but memory, for N x T x S scores a row."""
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
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    more = request.softcap, request.alibi, request.dropout, rng
    out_BTNH = plain_attention(q_BTNH, k_BKSH, v_BKSH, mask, scale, *more)
    return checkpoint_name(out_BTNH, "attention")


def plain_attention(
    q_BTNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    mask: Mask,
    scale: float,
    softcap: float = 0.0,
    alibi: bool = False,
    dropout: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Return attention's output [B, T, N, H] from keys and values laid out as a cache has them."""
    batch, length, heads, head_dim = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(batch, length, k_BKSH.shape[1], -1, head_dim)
    scores_BKGTS = jnp.einsum(
        "BTKGH,BKSH->BKGTS", q_BTKGH, k_BKSH, preferred_element_type=jnp.float32
    )
    scores_BNTS = soft_cap(scores_BKGTS.reshape(batch, heads, length, -1) * scale, softcap)
    if alibi:
        scores_BNTS += alibi_bias(mask, heads)
    weights_BNTS = jax.nn.softmax(jnp.where(dense_mask(mask), scores_BNTS, -1e30))
    if dropout and rng is not None:
        kept_BNTS = jax.random.bernoulli(rng, 1 - dropout, weights_BNTS.shape)
        weights_BNTS = jnp.where(kept_BNTS, weights_BNTS / (1 - dropout), 0)
    weights_BKGTS = weights_BNTS.reshape(scores_BKGTS.shape).astype(v_BKSH.dtype)
    # To BTKGH at once, XLA's CPU backend would sum it in bfloat16.
    out_BKGTH = jnp.einsum("BKGTS,BKSH->BKGTH", weights_BKGTS, v_BKSH)
    return jnp.moveaxis(out_BKGTH, 3, 1).reshape(q_BTNH.shape)
