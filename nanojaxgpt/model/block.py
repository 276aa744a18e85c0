"""One layer of the Transformer: attention and MLP around the residual stream."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from nanojaxgpt.attention import attend
from nanojaxgpt.attention.cache import Cache, attend_cache, update_cache
from nanojaxgpt.attention.request import Mask
from nanojaxgpt.config.sections import GATED
from nanojaxgpt.model.config import LayerConfig, ModelConfig
from nanojaxgpt.model.parameters import Parameter, layer_rows
from nanojaxgpt.model.projection import Blocks, project
from nanojaxgpt.model.quantize import Int8
from nanojaxgpt.model.rotary import rotate
from nanojaxgpt.sharding import constrain


class Context(NamedTuple):
    """What every layer sees alike."""

    mask: Mask
    positions_BT: jax.Array
    deterministic: bool
    score_multiplier: jax.typing.ArrayLike
    alpha: jax.typing.ArrayLike  # lora.alpha
    prefill: bool = False  # the cache is empty: tokens see only each other


# Flax numbers the keys that a module asks for, and its `scan`, by which the layers once ran, traced
# them twice: with the second key of each, dropout keeps the bits of runs that began then.
KEYS = 2

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
}


def activate(x: jax.Array, kind: str) -> jax.Array:
    """Return the activation of an MLP, computed in float32.

    Of bfloat16 nothing but `x` is kept for the gradient: what lies between has twice its size.
    """
    if x.dtype == jnp.float32:
        return ACTIVATIONS[kind](x)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def run(x: jax.Array) -> jax.Array:
        return ACTIVATIONS[kind](x.astype(jnp.float32)).astype(x.dtype)

    return run(x)


def scaled(x: jax.Array, factor: jax.typing.ArrayLike) -> jax.Array:
    """Return `x` times a scalar, in the dtype of `x`."""
    return x * jnp.asarray(factor, x.dtype)


class Weights(nn.Module):
    """A module that uses parameters of the table, in the compute dtype."""

    cfg: ModelConfig

    @property
    def rows(self) -> dict[str, Parameter]:
        """The rows of the table that belong to this module, by name."""
        raise NotImplementedError

    def stored(self, name: str) -> jax.Array:
        """Return a parameter as it is stored."""
        row = self.rows[name]
        array: Any = self.param(name, row.init, row.shape, jnp.dtype(row.dtype(self.cfg)))
        return array

    def weight(self, name: str) -> jax.Array:
        """Return a parameter in the compute dtype."""
        return self.stored(name).astype(self.cfg.compute_dtype)

    def kernel(self, name: str) -> tuple[jax.Array | Blocks | Int8, str]:
        """Return a kernel as a matrix, and the terms by which `project` multiplies with it."""
        known = self.has_variable("params", name)
        stored = self.get_variable("params", name) if known else None
        if isinstance(stored, Blocks):
            return stored, ""
        row = self.rows[name]
        inputs = math.prod(row.shape[axis] for axis in row.summed)
        out_first = row.summed == (1,)
        terms, shape = ("TI,OI->TO", row.shape) if out_first else ("TI,IO->TO", (inputs, -1))
        if isinstance(stored, Int8):
            return Int8(stored.values.reshape(shape), stored.scale.reshape(-1)), terms
        return self.weight(name).reshape(shape), terms

    def add_bias(self, y: jax.Array, name: str) -> jax.Array:
        """Return `y` plus a bias, where the model has it.

        Broadcast before it is rounded, so that its gradient, a sum over all tokens, is taken in
        float32: left to XLA, a sum of bfloat16 took an eighth of a step on a CPU.
        """
        if name not in self.rows:
            return y
        return y + jnp.broadcast_to(self.stored(name), y.shape).astype(y.dtype)

    def normalize(self, x: jax.Array, name: str, axis: int | tuple[int, ...] = -1) -> jax.Array:
        """Return LayerNorm or RMSNorm over the last axis or axes, computed in float32."""
        cfg, y = self.cfg, x.astype(jnp.float32)
        if cfg.norm == "layernorm":
            y -= jnp.mean(y, axis, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis, keepdims=True) + cfg.norm_eps)
        if f"{name}_scale" in self.rows:
            scale = self.weight(f"{name}_scale")
            y *= scale.astype(jnp.float32) + cfg.norm_offset if cfg.norm_offset else scale
        return self.add_bias(y, f"{name}_bias").astype(cfg.compute_dtype)


class Block(Weights):
    """One layer: attention and MLP around the residual stream."""

    layer: LayerConfig

    @property
    def rows(self) -> dict[str, Parameter]:
        """The parameters of one layer."""
        return layer_rows(self.cfg, self.layer)

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """Return the residual stream [B, T, D] after this layer, and its cache."""
        cfg, place = self.cfg, self.cfg.norm_placement

        def before(name: str) -> jax.Array:
            return self.normalize(x_BTD, name) if place in ("pre", "sandwich") else x_BTD

        def after(update_BTD: jax.Array, name: str) -> jax.Array:
            return (
                self.normalize(update_BTD, name) if place in ("sandwich", "output") else update_BTD
            )

        def add(update_BTD: jax.Array, name: str) -> jax.Array:
            drop = nn.Dropout(cfg.dropout)
            update_BTD = [drop(update_BTD, context.deterministic) for _ in range(KEYS)][-1]
            if cfg.residual_multiplier != 1:
                update_BTD = scaled(update_BTD, cfg.residual_multiplier)
            sum_BTD = constrain(x_BTD + update_BTD, "batch", "sequence", "features")
            return self.normalize(sum_BTD, name) if place == "post" else sum_BTD

        x_BTD = checkpoint_name(x_BTD, "layer_input")
        y_BTD = before("attention_norm")
        update_BTD, cache = self.attention(y_BTD, cache, context)
        update_BTD = after(update_BTD, "attention_output_norm")
        if cfg.mlp != "none" and cfg.parallel_block:
            y_BTD = before("mlp_norm") if cfg.parallel_norms else y_BTD
            update_BTD += after(self.feed_forward(y_BTD, context), "mlp_output_norm")
            return add(update_BTD, "norm"), cache
        x_BTD = add(update_BTD, "attention_norm")
        if cfg.mlp != "none":
            x_BTD = checkpoint_name(x_BTD, "mlp_input")
            update_BTD = self.feed_forward(before("mlp_norm"), context)
            update_BTD = after(update_BTD, "mlp_output_norm")
            x_BTD = add(update_BTD, "mlp_norm")
        return x_BTD, cache

    def attention(
        self, x_BTD: jax.Array, cache: Cache | None, context: Context
    ) -> tuple[jax.Array, Cache | None]:
        """Return the attention's update [B, T, D] and the cache with this layer's keys."""
        cfg, rotary = self.cfg, self.layer.rotary
        q_BTNH = self.heads(x_BTD, "q_DNH", cfg.num_heads, "heads", context)
        k_BTKH = self.heads(x_BTD, "k_DKH", cfg.num_kv_heads, "kv_heads", context)
        v_BTKH = self.heads(x_BTD, "v_DKH", cfg.num_kv_heads, "kv_heads", context)
        if cfg.qk_norm:
            axis = -1 if cfg.qk_norm_over == "head" else (-2, -1)
            q_BTNH = self.normalize(q_BTNH, "q_norm", axis)
            k_BTKH = self.normalize(k_BTKH, "k_norm", axis)
        # Parameters are counted, so that sizes that can't fit are refused, before tables are built.
        starting = self.is_initializing()
        if rotary and not starting:
            q_BTNH = rotate(q_BTNH, context.positions_BT, rotary, cfg.seq_len)
            k_BTKH = rotate(k_BTKH, context.positions_BT, rotary, cfg.seq_len)
        q_BTNH = checkpoint_name(scaled(q_BTNH, context.score_multiplier), "q")
        gate_K = self.weight("smear_K") if cfg.smeared_keys else None
        mask = context.mask._replace(window=self.layer.window)
        scores: dict[str, Any] = dict(
            scale=cfg.attention_scale, softcap=cfg.attention_softcap,
            alibi=cfg.positions == "alibi" and not starting,
        )  # fmt: skip
        if cache is not None:
            cache = update_cache(cache, k_BTKH, v_BTKH, context.positions_BT)
        if cache is not None and not context.prefill:
            seen = cache
            if gate_K is not None:
                k_BSKH = smear(jnp.swapaxes(cache.k_BKSH, 1, 2), gate_K, None)
                seen = cache._replace(k_BKSH=jnp.swapaxes(k_BSKH, 1, 2))
            out_BTNH = attend_cache(q_BTNH, seen, mask, **scores)
        else:
            if gate_K is not None:
                k_BTKH = smear(k_BTKH, gate_K, mask.key_segments_BS)
            k_BTKH, v_BTKH = checkpoint_name(k_BTKH, "k"), checkpoint_name(v_BTKH, "v")
            # Kept only where `apply` is asked for intermediates, as papers/probe.py does.
            heads: Any = (q_BTNH, k_BTKH)
            self.sow("intermediates", "heads", heads, reduce_fn=lambda _, new: new)
            dropping = cfg.dropout and not context.deterministic
            rngs = [self.make_rng("dropout") for _ in range(KEYS)] if dropping else [None]
            out_BTNH = attend(
                q_BTNH, k_BTKH, v_BTKH, mask, **scores, kernel=cfg.attention,
                blocks=cfg.attention_blocks, dropout=cfg.dropout, rng=rngs[-1],
            )  # fmt: skip
        out_BTI = out_BTNH.reshape(*out_BTNH.shape[:2], -1)
        update_BTD = self.add_bias(self.project(out_BTI, "o_NHD", context), "o_bias")
        return checkpoint_name(update_BTD, "o"), cache

    def project(self, x_BTI: jax.Array, name: str, context: Context) -> jax.Array:
        """Return x [B, T, in] times a kernel as a matrix, and its adapter's part, [B, T, out]."""
        y_BTO, lora = self.multiply(x_BTI, name), self.cfg.lora
        down, up = self.rows[name].adapter
        # New adapters are drawn apart, see lora.add_adapters.
        if down not in self.rows or self.is_initializing():
            return y_BTO
        drop = nn.Dropout(lora.dropout, name=f"{down}_dropout")
        x_BTR = self.multiply(drop(x_BTI, context.deterministic), down)
        return y_BTO + self.multiply(scaled(x_BTR, context.alpha / lora.divisor), up)

    def multiply(self, x_BTI: jax.Array, name: str) -> jax.Array:
        """Return x [B, T, in] times a kernel as a matrix, [B, T, out]."""
        return project(x_BTI, *self.kernel(name), recomputed=self.cfg.remat != "none")

    def heads(
        self, x_BTD: jax.Array, name: str, heads: int, axis: str, context: Context
    ) -> jax.Array:
        """Return the projection of `x` to `heads` heads [B, T, heads, H]."""
        y_BTO = self.project(x_BTD, name, context)
        y_BTNH = y_BTO.reshape(*x_BTD.shape[:2], heads, self.cfg.head_dim)
        y_BTNH = self.add_bias(y_BTNH, f"{name[0]}_bias")
        return constrain(y_BTNH, "batch", "sequence", axis, "head_dim")

    def feed_forward(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Return the MLP's update [B, T, D]."""
        cfg = self.cfg

        def widen(name: str) -> jax.Array:
            y_BTF = self.add_bias(self.project(x_BTD, f"{name}_DF", context), f"{name}_bias")
            return checkpoint_name(constrain(y_BTF, "batch", "sequence", "mlp"), name)

        y_BTF = activate(widen("gate" if cfg.mlp in GATED else "up"), cfg.mlp)
        if cfg.mlp in GATED:
            y_BTF *= widen("up")
        update_BTD = self.add_bias(self.project(y_BTF, "down_DF", context), "down_bias")
        return checkpoint_name(update_BTD, "down")


def smear(k_BSKH: jax.Array, gate_K: jax.Array, segments_BS: jax.Array | None) -> jax.Array:
    """Return keys mixed with the key before, sigmoid(gate) of their own (Olsson 2022)."""
    before_BSKH = jnp.pad(k_BSKH[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    if segments_BS is not None:
        same_BS = jnp.pad(segments_BS[:, 1:] == segments_BS[:, :-1], ((0, 0), (1, 0)))
        before_BSKH *= same_BS[..., None, None]
    own_K1 = jax.nn.sigmoid(gate_K.astype(jnp.float32))[:, None].astype(k_BSKH.dtype)
    return own_K1 * k_BSKH + (1 - own_K1) * before_BSKH
