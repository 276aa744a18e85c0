"""Causal attention with windows and packed documents: kernels by name, and the choice of one."""

from typing import Protocol

import jax

from nanojaxgpt.attention import blocked, cudnn, library, plain, splash
from nanojaxgpt.attention.request import Mask, Request
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.sharding import axis_size, constrain, platform


class Kernel(Protocol):
    """A module of this package that computes attention."""

    def supports(self, request: Request) -> str:
        """Return "", or the reason why the kernel can't do it."""
        ...

    def run(
        self,
        q_BTNH: jax.Array,
        k_BSKH: jax.Array,
        v_BSKH: jax.Array,
        mask: Mask,
        request: Request,
        scale: float,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Return attention's output [B, T, N, H] for a request that the kernel supports.

        Where T = S, positions count up from 0 in every row, also over packed documents.
        """
        ...


KERNELS: dict[str, Kernel] = {
    "plain": plain, "blocked": blocked, "library": library, "cudnn": cudnn, "splash": splash,
}  # fmt: skip
# In the order of preference, by the names of `model.attention` that leave a choice.
PORTABLE = ("blocked", "library", "plain")
AUTO = {"gpu": ("cudnn", *PORTABLE), "tpu": ("splash", *PORTABLE)}  # by platform


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: Mask,
    *,
    scale: float,
    softcap: float = 0.0,
    alibi: bool = False,
    kernel: str = "auto",
    blocks: str = "",
    dropout: float = 0.0,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Return attention's output [B, T, N, H]; `dropout` acts on the weights where `rng` is given.

    Rows are whole sequences without a cache, so T = S and positions count up. With a `softcap` c,
    scores become c * tanh(scores / c) after the scale and before the mask (Gemma 2). `kernel` and
    `blocks` are values of `model.attention` and `model.attention_blocks`. Raises ConfigError where
    that kernel does not support the call.
    """
    dropout = dropout if rng is not None else 0.0
    k_BSKH = constrain(k_BSKH, "batch", "keys", "kv_heads", "head_dim")
    v_BSKH = constrain(v_BSKH, "batch", "keys", "kv_heads", "head_dim")
    request = make_request(q_BTNH, k_BSKH, mask, softcap, alibi, dropout, blocks)
    chosen = KERNELS[choose_kernel(request, kernel)]
    return chosen.run(q_BTNH, k_BSKH, v_BSKH, mask, request, scale, rng)


def make_request(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    mask: Mask,
    softcap: float = 0.0,
    alibi: bool = False,
    dropout: float = 0.0,
    blocks: str = "",
) -> Request:
    """Return the static facts of a call on the mesh of `jax.set_mesh`."""
    return Request(
        platform=platform(),
        query_length=q_BTNH.shape[1],
        key_length=k_BSKH.shape[1],
        heads=q_BTNH.shape[2],
        key_heads=k_BSKH.shape[2],
        head_dim=q_BTNH.shape[3],
        dtype=q_BTNH.dtype.name,
        window=mask.window,
        packed=mask.query_segments_BT is not None,
        softcap=softcap,
        alibi=alibi,
        dropout=dropout,
        sequence_shards=axis_size("sequence"),
        blocks=blocks,
    )


def choose_kernel(request: Request, asked: str = "auto") -> str:
    """Return the name of the kernel for a value of `model.attention`.

    `auto` takes the platform's first kernel that supports the request, `xla` the first of those
    that XLA compiles anywhere. Raises ConfigError where a kernel asked for by name does not
    support the request: none is replaced silently.
    """
    if request.query_length == 1:  # a single token only initializes parameters
        asked = "auto"
    groups = {"auto": AUTO.get(request.platform, PORTABLE), "xla": PORTABLE}
    names = groups.get(asked, (asked,))
    if not KERNELS.keys() >= set(names):
        known = ", ".join([*groups, *KERNELS])
        raise ConfigError(f"model.attention={asked!r} is not one of {known}")
    reasons = [KERNELS[name].supports(request) for name in names]
    if all(reasons):
        raise ConfigError(
            f"model.attention={asked!r} does not support this model: {reasons[0]}; use 'auto'"
        )
    return names[reasons.index("")]
