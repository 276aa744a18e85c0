"""cuDNN's fused attention for NVIDIA GPUs, by `jax.nn`."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from nanojaxgpt.attention.request import Mask, Request, dense_mask


def supports(request: Request) -> str:
    """Return "", or why cuDNN can't do it."""
    if request.platform != "gpu":
        return f"cudnn needs an NVIDIA GPU, and this is a {request.platform}"
    if request.softcap:
        return "jax.nn.dot_product_attention has no softcap for cudnn"
    if request.alibi:
        return "cudnn has no ALiBi here"
    if request.dropout:
        return "cudnn has no attention dropout here"
    if request.dtype != "bfloat16":
        return "cudnn needs bfloat16"
    if request.head_dim % 8 or request.head_dim > 256:
        return "cudnn needs a head_dim divisible by 8, and of 256 at most"
    if request.query_length != request.key_length:
        return "cudnn's causal mask needs as many queries as keys here"
    if request.query_length % 2:
        return "cudnn needs an even length to be trained"
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
    """Return attention's output [B, T, N, H].

    Packed rows take a dense mask of T x S: `jax.nn` (0.10.2 to 0.12) has one length a row, shape
    [B], for padding. The kernel knows offsets of segments, but only a private function takes them.
    """
    seen: dict[str, Any] = dict(is_causal=True)
    if request.packed:
        seen = dict(mask=dense_mask(mask))
    elif mask.window:
        seen["local_window_size"] = mask.window - 1, 0
    out_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, scale=scale, implementation="cudnn", **seen
    )
    return checkpoint_name(out_BTNH, "attention")
