"""One Transformer from one frozen ModelConfig: tokens (and a cache) to logits (and the cache).

Names end in their dimensions: B batch, T query length, S key length, D embed, N heads, K key
heads, H head dim, F mlp, V vocab, L layers. Parameters are a plain nested dict with the layers
stacked on a leading axis, whatever is scanned or unrolled; their names carry the other dimensions.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nanojaxgpt import attention
from nanojaxgpt.attention.cache import Cache, attend_cache, update_cache
from nanojaxgpt.attention.request import Mask
from nanojaxgpt.projection import Blocks, decoding_params, project
from nanojaxgpt.sharding import constrain, platform


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


class Multipliers(NamedTuple):
    """Factors of the embeddings, of the attention's scores and of the logits; scalars."""

    embed: jax.typing.ArrayLike
    attention: jax.typing.ArrayLike
    logit: jax.typing.ArrayLike


class Context(NamedTuple):
    """What every layer sees alike."""

    mask: Mask
    positions_BT: jax.Array
    deterministic: bool
    score_multiplier: jax.typing.ArrayLike


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "swiglu": jax.nn.silu,
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
}
GATED = ("swiglu", "geglu")

REMAT: dict[str, Callable | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def scaled(x: jax.Array, factor: jax.typing.ArrayLike) -> jax.Array:
    """Return `x` times a scalar, in the dtype of `x`."""
    return x * jnp.asarray(factor, x.dtype)


def uniform_init(bound: float) -> Callable:
    """Return an initializer of numbers in [-bound, bound)."""
    return lambda rng, shape, dtype: jax.random.uniform(rng, shape, dtype, -bound, bound)


def kernel_init(cfg: ModelConfig, fan_in: int, residual: bool = False) -> Callable:
    """Return the initializer of a projection; GPT-2 shrinks those that write to the residual.

    With muP GPT-2's shrinks with the width, as the others do by themselves.
    """
    if cfg.init == "gpt2":
        std = 0.02 / math.sqrt(cfg.width)
        return nn.initializers.normal(std / math.sqrt(2 * cfg.num_layers) if residual else std)
    if cfg.init == "fan_in":
        # Cutting a normal at two standard deviations leaves 0.8796 of its spread.
        return nn.initializers.truncated_normal(1 / math.sqrt(fan_in) / 0.87962566103423978)
    return uniform_init(1 / math.sqrt(fan_in))


def bias_init(cfg: ModelConfig, fan_in: int) -> Callable:
    """Return the initializer of a projection's bias: zeros, but for torch's default."""
    return uniform_init(1 / math.sqrt(fan_in)) if cfg.init == "torch" else nn.initializers.zeros


def embed_init(cfg: ModelConfig) -> Callable:
    """Return the initializer of the token and position tables."""
    std = {"gpt2": 0.02, "fan_in": 1 / math.sqrt(cfg.embed_dim), "torch": 1.0}
    return nn.initializers.normal(std[cfg.init])


class Weights(nn.Module):
    """A module that declares its parameters with their logical axes, in the compute dtype."""

    cfg: ModelConfig

    def weight(self, name: str, init: Callable, shape: tuple, axes: tuple) -> jax.Array:
        """Return the parameter `name`; it is stored as cfg.param_dtype."""
        boxed = nn.with_logical_partitioning(init, axes)
        array: Any = self.param(name, boxed, shape, jnp.dtype(self.cfg.param_dtype))
        return array.astype(self.cfg.compute_dtype)

    def kernel(
        self, name: str, init: Callable, shape: tuple, axes: tuple, inputs: int = 0
    ) -> jax.Array | Blocks:
        """Return a projection's kernel for `project`, flattened to [inputs, out] where asked."""
        if self.has_variable("params", name):
            stored = self.get_variable("params", name)
            if isinstance(stored, Blocks):
                return stored
        kernel = self.weight(name, init, shape, axes)
        return kernel.reshape(inputs, -1) if inputs else kernel

    def normalize(self, x: jax.Array, name: str, bias: bool = True) -> jax.Array:
        """Return LayerNorm or RMSNorm over the last axis, computed in float32."""
        cfg, shape = self.cfg, x.shape[-1:]
        scale = self.weight(f"{name}_scale", nn.initializers.ones, shape, ("norm",))
        y = x.astype(jnp.float32)
        if cfg.norm == "layernorm":
            y -= jnp.mean(y, -1, keepdims=True)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + cfg.norm_eps)
        y *= scale
        if bias and cfg.norm_bias and cfg.norm == "layernorm":
            y += self.weight(f"{name}_bias", nn.initializers.zeros, shape, ("norm",))
        return y.astype(cfg.compute_dtype)


class Block(Weights):
    """One layer: attention and MLP around the residual stream."""

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, layer: jax.Array | int, context: Context, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        cfg, pre = self.cfg, self.cfg.norm_placement == "pre"

        def residual(x_BTD: jax.Array, update_BTD: jax.Array, name: str) -> jax.Array:
            update_BTD = nn.Dropout(cfg.dropout)(update_BTD, context.deterministic)
            x_BTD = constrain(x_BTD + update_BTD, "batch", "sequence", "features")
            return x_BTD if pre else self.normalize(x_BTD, name)

        y_BTD = self.normalize(x_BTD, "attention_norm") if pre else x_BTD
        update_BTD, cache = self.attention(y_BTD, cache, layer, context)
        if cfg.mlp != "none" and cfg.parallel_block:
            return residual(x_BTD, update_BTD + self.feed_forward(y_BTD), "norm"), cache
        x_BTD = residual(x_BTD, update_BTD, "attention_norm")
        if cfg.mlp != "none":
            y_BTD = self.normalize(x_BTD, "mlp_norm") if pre else x_BTD
            x_BTD = residual(x_BTD, self.feed_forward(y_BTD), "mlp_norm")
        return x_BTD, cache

    def attention(
        self, x_BTD: jax.Array, cache: Cache | None, layer: jax.Array | int, context: Context
    ) -> tuple[jax.Array, Cache | None]:
        """Return the attention's update [B, T, D] and the cache with this layer's keys."""
        cfg = self.cfg
        q_BTNH = self.heads(x_BTD, "q_DNH", cfg.num_heads, "heads")
        k_BTKH = self.heads(x_BTD, "k_DKH", cfg.num_kv_heads, "kv_heads")
        v_BTKH = self.heads(x_BTD, "v_DKH", cfg.num_kv_heads, "kv_heads")
        if cfg.qk_norm:
            q_BTNH = self.normalize(q_BTNH, "q_norm", bias=False)
            k_BTKH = self.normalize(k_BTKH, "k_norm", bias=False)
        # Parameters are counted, so that sizes that can't fit are refused, before tables are built.
        positions = "none" if self.is_initializing() else cfg.positions
        if positions == "rotary":
            q_BTNH = rotate(q_BTNH, context.positions_BT, cfg.rotary_base)
            k_BTKH = rotate(k_BTKH, context.positions_BT, cfg.rotary_base)
        q_BTNH = scaled(q_BTNH, context.score_multiplier)
        scaling: dict[str, Any] = dict(scale=cfg.attention_scale, alibi=positions == "alibi")
        if cfg.smeared_keys:
            gate_K = self.weight("smear_K", nn.initializers.zeros, (cfg.num_kv_heads,), ("norm",))
        if cache is not None:
            cache = seen = update_cache(cache, k_BTKH, v_BTKH, context.positions_BT)
            if cfg.smeared_keys:
                k_BSKH = smear(jnp.swapaxes(cache.k_BKSH, 1, 2), gate_K, None)
                seen = cache._replace(k_BKSH=jnp.swapaxes(k_BSKH, 1, 2))
            mask = context.mask._replace(window=cfg.windows[layer % len(cfg.windows)])
            out_BTNH = attend_cache(q_BTNH, seen, mask, **scaling)
        else:
            if cfg.smeared_keys:
                k_BTKH = smear(k_BTKH, gate_K, context.mask.key_segments_BS)
            # Kept only where `apply` is asked for intermediates, as probe.py does.
            heads: Any = (q_BTNH, k_BTKH)
            self.sow("intermediates", "heads", heads, reduce_fn=lambda _, new: new)
            out_BTNH = attention.attend_windows(
                q_BTNH, k_BTKH, v_BTKH, context.mask, cfg.windows, layer, **scaling,
                kernel=cfg.attention, dropout=cfg.dropout,
                rng=self.make_rng("dropout") if cfg.dropout and not context.deterministic else None,
            )  # fmt: skip
        fan_in, axes = cfg.num_heads * cfg.head_dim, ("heads", "head_dim", "embed")
        shape = (cfg.num_heads, cfg.head_dim, cfg.embed_dim)
        o_ID = self.kernel("o_NHD", kernel_init(cfg, fan_in, residual=True), shape, axes, fan_in)
        update_BTD = project(out_BTNH.reshape(*out_BTNH.shape[:2], fan_in), o_ID)
        if cfg.bias:
            bias = bias_init(cfg, fan_in)
            update_BTD += self.weight("o_bias", bias, (cfg.embed_dim,), ("norm",))
        return update_BTD, cache

    def heads(self, x_BTD: jax.Array, name: str, heads: int, axis: str) -> jax.Array:
        """Return the projection of `x` to `heads` heads [B, T, heads, H]."""
        cfg = self.cfg
        shape = (cfg.embed_dim, heads, cfg.head_dim)
        init, axes = kernel_init(cfg, cfg.embed_dim), ("embed", axis, "head_dim")
        y_BTI = project(x_BTD, self.kernel(name, init, shape, axes, cfg.embed_dim))
        y_BTNH = y_BTI.reshape(*x_BTD.shape[:2], heads, cfg.head_dim)
        if cfg.bias:
            init = bias_init(cfg, cfg.embed_dim)
            y_BTNH += self.weight(f"{name[0]}_bias", init, shape[1:], (axis, "head_dim"))
        return constrain(y_BTNH, "batch", "sequence", axis, "head_dim")

    def feed_forward(self, x_BTD: jax.Array) -> jax.Array:
        """Return the MLP's update [B, T, D]."""
        cfg, shape = self.cfg, (self.cfg.embed_dim, self.cfg.mlp_dim)

        def widen(name: str) -> jax.Array:
            init, axes = kernel_init(cfg, cfg.embed_dim), ("embed", "mlp")
            y_BTF = project(x_BTD, self.kernel(f"{name}_DF", init, shape, axes))
            if cfg.bias:
                init = bias_init(cfg, cfg.embed_dim)
                y_BTF += self.weight(f"{name}_bias", init, (cfg.mlp_dim,), ("mlp",))
            return constrain(y_BTF, "batch", "sequence", "mlp")

        y_BTF = ACTIVATIONS[cfg.mlp](widen("gate" if cfg.mlp in GATED else "up"))
        if cfg.mlp in GATED:
            y_BTF *= widen("up")
        # Stored [out, in]: the gradient of a wide-to-narrow kernel is 1.1x faster so on CPU.
        init = kernel_init(cfg, cfg.mlp_dim, residual=True)
        down_DF = self.kernel("down_DF", init, shape, ("embed", "mlp"))
        update_BTD = project(y_BTF, down_DF, "TF,DF->TD")
        if cfg.bias:
            init = bias_init(cfg, cfg.mlp_dim)
            update_BTD += self.weight("down_bias", init, (cfg.embed_dim,), ("norm",))
        return update_BTD


class Transformer(Weights):
    """A decoder-only language model.

    `model.apply({"params": params}, tokens_BT)` gives (logits_BTV float32, None). With a cache of
    each layer, the new tokens are written at `positions_BT`, which count up from their first, and
    the cache comes back filled.
    """

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        cache: tuple[Cache, ...] | None = None,
        deterministic: bool = True,
        logits: bool = True,
        multipliers: Multipliers | None = None,
    ) -> tuple[Any, tuple[Cache, ...] | None]:
        """Return (logits_BTV, cache), or, with `logits` off, ((x_BTD, head), cache).

        head(x_BTD) gives float32 logits [B, T, V]: so a loss can make them in parts.
        `positions_BT` (default: 0 to T - 1) count within a document, `segments_BT` number the
        documents of a row: tokens see only their own. Dropout needs `deterministic=False` and
        an rng named "dropout". `multipliers` (default: the config's) may be traced.
        """
        cfg, factors = self.cfg, multipliers or self.cfg.multipliers
        if cfg.positions == "learned" and tokens_BT.shape[1] > cfg.seq_len:
            raise ValueError(f"{tokens_BT.shape[1]} tokens, but {cfg.seq_len} learned positions")
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        shape, axes = (cfg.vocab_size, cfg.embed_dim), ("vocab", "embed")
        embed_VD = self.weight("embed_VD", embed_init(cfg), shape, axes)
        x_BTD = embed_VD[tokens_BT] + self.position_embedding(positions_BT)
        x_BTD = scaled(x_BTD, factors.embed)
        x_BTD = nn.Dropout(cfg.dropout)(x_BTD, deterministic)
        x_BTD = constrain(x_BTD, "batch", "sequence", "features")

        if cache is None:
            order_1T = jnp.arange(tokens_BT.shape[1])[None]
            mask = Mask(order_1T, order_1T, segments_BT, segments_BT)
            context = Context(mask, positions_BT, deterministic, factors.attention)
            x_BTD = self.scan_layers(x_BTD, context)
        else:
            mask = Mask(positions_BT, jnp.arange(cache[0].k_BKSH.shape[2])[None])
            context = Context(mask, positions_BT, True, factors.attention)
            x_BTD, cache = self.loop_layers(x_BTD, cache, context)
        if cfg.final_norm:
            x_BTD = self.normalize(x_BTD, "final_norm")

        head_VD = embed_VD
        if not cfg.tied_head or self.has_variable("params", "head_VD"):  # see decoding_params
            head_VD = self.kernel("head_VD", kernel_init(cfg, cfg.embed_dim), shape, axes)

        def head(x_BTD: jax.Array) -> jax.Array:
            x_BTD = scaled(x_BTD, factors.logit)
            logits_BTV = project(x_BTD, head_VD, "TD,VD->TV", jnp.float32)
            if cfg.width != 1:
                logits_BTV /= cfg.width
            if cfg.logit_softcap:
                logits_BTV = cfg.logit_softcap * jnp.tanh(logits_BTV / cfg.logit_softcap)
            return constrain(logits_BTV, "batch", "sequence", "vocab")

        return (head(x_BTD) if logits else (x_BTD, head)), cache

    def position_embedding(self, positions_BT: jax.Array) -> jax.Array:
        """Return what is added to the token embeddings: [B, T, D], or 0."""
        cfg = self.cfg
        if cfg.positions == "learned":
            shape, axes = (cfg.seq_len, cfg.embed_dim), ("positions", "embed")
            return self.weight("position_TD", embed_init(cfg), shape, axes)[positions_BT]
        if cfg.positions == "sinusoidal" and not self.is_initializing():
            return sinusoids(positions_BT, cfg.embed_dim).astype(cfg.compute_dtype)
        return jnp.zeros((), cfg.compute_dtype)

    def scan_layers(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Return the residual stream after all layers."""
        cfg = self.cfg
        # Slicing stacked weights costs 0.84x on CPU; deep models would compile for minutes.
        shallow_on_cpu = platform() == "cpu" and cfg.num_layers <= 12
        unroll = cfg.unroll or (cfg.num_layers if shallow_on_cpu else 1)
        if self.is_initializing():
            unroll = 1  # nothing is gained, and random numbers take long to compile
        block = Block
        if cfg.remat != "none":
            block = nn.remat(Block, policy=REMAT[cfg.remat], prevent_cse=unroll > 1)
        scan = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=cfg.num_layers,
            unroll=unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(cfg, name="layers")(x_BTD, jnp.arange(cfg.num_layers), context)[0]

    def loop_layers(
        self, x_BTD: jax.Array, cache: tuple[Cache, ...], context: Context
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Return the residual stream after all layers, and their caches."""
        layers, filled = decoding_params(self.variables["params"], 1)["layers"], []
        for index, params in enumerate(layers):
            x_BTD, one = Block(self.cfg, parent=None).apply(
                {"params": params}, x_BTD, index, context, cache[index]
            )
            filled.append(one)
        return x_BTD, tuple(filled)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, base: float) -> jax.Array:
    """Return queries or keys turned by their positions (RoPE; first half against second)."""
    half = x_BTNH.shape[-1] // 2
    frequencies = base ** (-np.arange(half, dtype=np.float32) / half)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, -1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x_BTNH.dtype)


def sinusoids(positions_BT: jax.Array, embed_dim: int) -> jax.Array:
    """Return fixed sine and cosine positions [B, T, D], interleaved (Vaswani 2017)."""
    half = embed_dim // 2
    frequencies = 10000.0 ** (-np.arange(half, dtype=np.float32) / half)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1)
    return waves.reshape(*positions_BT.shape, embed_dim)


def smear(k_BSKH: jax.Array, gate_K: jax.Array, segments_BS: jax.Array | None) -> jax.Array:
    """Return keys mixed with the key before, sigmoid(gate) of their own (Olsson 2022)."""
    before_BSKH = jnp.pad(k_BSKH[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)))
    if segments_BS is not None:
        same_BS = jnp.pad(segments_BS[:, 1:] == segments_BS[:, :-1], ((0, 0), (1, 0)))
        before_BSKH *= same_BS[..., None, None]
    own_K1 = jax.nn.sigmoid(gate_K.astype(jnp.float32))[:, None].astype(k_BSKH.dtype)
    return own_K1 * k_BSKH + (1 - own_K1) * before_BSKH


def init_params(cfg: ModelConfig, rng: jax.Array) -> Any:
    """Return new parameters, each leaf boxed with its logical axes (see sharding.unbox)."""
    return Transformer(cfg).init(rng, jnp.zeros((1, 1), jnp.int32))["params"]


def count_params(cfg: ModelConfig) -> int:
    """Return the number of parameters; nothing is allocated."""
    shapes = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
