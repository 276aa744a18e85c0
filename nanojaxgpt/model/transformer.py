"""One Transformer from one frozen ModelConfig: tokens (and a cache) to logits (and the cache).

Names end in their dimensions: B batch, T query length, S key length, D embed, N heads, K key
heads, H head dim, F mlp, V vocab, L layers. Parameters are a plain nested dict; layers of one
shape are stacked on a leading axis, whatever is scanned or unrolled (see parameters.py).
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanojaxgpt.attention.cache import Cache
from nanojaxgpt.attention.request import Mask
from nanojaxgpt.model.block import Block, Context, Weights, scaled
from nanojaxgpt.model.config import LayerConfig, ModelConfig, Multipliers
from nanojaxgpt.model.head import Head
from nanojaxgpt.model.lora import add_adapters
from nanojaxgpt.model.parameters import Parameter, Params, PyTree, model_rows
from nanojaxgpt.model.projection import decoding_params
from nanojaxgpt.model.remat import checkpoint_policy
from nanojaxgpt.model.rotary import sinusoids
from nanojaxgpt.sharding import constrain, platform


class Layer(nn.Module):
    """A Block under the name of its stack: the keys of its dropout are derived from the name."""

    cfg: ModelConfig
    layer: LayerConfig
    stack: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Return the residual stream [B, T, D] after the layer."""
        return Block(self.cfg, self.layer, name=self.stack)(x_BTD, context)[0]


class Transformer(Weights):
    """A decoder-only language model.

    `model.apply({"params": params}, tokens_BT)` gives (logits_BTV float32, None). With a cache of
    each layer, the new tokens are written at `positions_BT`, which count up from their first, and
    the cache comes back filled. The first `frozen_layers` layers have no gradients.
    """

    frozen_layers: int = 0

    @property
    def rows(self) -> dict[str, Parameter]:
        """The parameters outside the layers."""
        return model_rows(self.cfg)

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
        prefill: bool = False,
    ) -> tuple[Any, tuple[Cache, ...] | None]:
        """Return (logits_BTV, cache), or, with `logits` off, ((x_BTD, head), cache), see Head.

        `positions_BT` (default: 0 to T - 1) count within a document, `segments_BT` number the
        documents of a row: tokens see only their own. Dropout needs `deterministic=False` and
        an rng named "dropout". `multipliers` (default: the config's) may be traced. With `prefill`
        the cache is empty, and tokens see each other as without it, by the same kernels.
        """
        cfg, factors = self.cfg, multipliers or self.cfg.multipliers
        if cfg.positions == "learned" and tokens_BT.shape[1] > cfg.seq_len:
            raise ValueError(f"{tokens_BT.shape[1]} tokens, but {cfg.seq_len} learned positions")
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        embed_VD = self.weight("embed_VD")
        x_BTD = embed_VD[tokens_BT] + self.position_embedding(positions_BT)
        x_BTD = scaled(x_BTD, factors.embed)
        x_BTD = nn.Dropout(cfg.dropout)(x_BTD, deterministic)
        x_BTD = constrain(x_BTD, "batch", "sequence", "features")

        order_1T = jnp.arange(tokens_BT.shape[1])[None]
        mask = Mask(order_1T, order_1T, segments_BT, segments_BT)
        if cache is not None and not prefill:
            mask = Mask(positions_BT, jnp.arange(cache[0].k_BKSH.shape[2])[None])
        scalars = factors.attention, factors.alpha
        context = Context(mask, positions_BT, deterministic, *scalars, prefill)
        if self.is_initializing():
            x_BTD = self.init_layers(x_BTD, context)
        elif cache is None and not self.is_mutable_collection("intermediates"):
            x_BTD = self.scan_layers(x_BTD, context)
        else:
            x_BTD, cache = self.loop_layers(x_BTD, context, cache)
        if cfg.final_norm:
            x_BTD = self.normalize(x_BTD, "final_norm")
        # A head laid out for decoding stands beside a tied embedding, see decoding_params.
        apart = not cfg.tied_head or self.has_variable("params", "head_VD")
        kernel, terms = self.kernel("head_VD") if apart else (embed_VD, "TI,OI->TO")
        bias_V = self.weight("head_bias") if cfg.head_bias else None
        if cfg.num_labels and self.is_initializing():
            self.weight("label_CD")  # last, so that the others' values are the same with it

        head = Head(kernel, bias_V, factors.logit, terms, cfg)
        return (head(x_BTD) if logits else (x_BTD, head)), cache

    def position_embedding(self, positions_BT: jax.Array) -> jax.Array:
        """Return the embeddings of the positions, [B, T, D], or 0."""
        cfg = self.cfg
        if cfg.positions == "learned":
            return self.weight("position_TD")[positions_BT]
        if cfg.positions == "sinusoidal" and not self.is_initializing():
            return sinusoids(positions_BT, cfg.embed_dim).astype(cfg.compute_dtype)
        return jnp.zeros((), cfg.compute_dtype)

    def init_layers(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Declare the parameters of all layers, one stack after the other."""
        for name, stack in self.cfg.stacks.items():
            scan = nn.scan(
                Block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                length=stack.count,
            )
            layer = self.cfg.layer(stack.first)
            x_BTD = scan(self.cfg, layer, name=name)(x_BTD, context)[0]
        return x_BTD

    def scan_layers(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """Return the residual stream after all layers, a period of them at a time."""
        cfg, period = self.cfg, len(self.cfg.layers)
        whole = cfg.num_layers // period
        # Slicing stacked weights costs 0.84x on CPU; deep models would compile for minutes.
        shallow_on_cpu = platform() == "cpu" and cfg.num_layers <= 12
        unroll = max(1, (cfg.unroll or (cfg.num_layers if shallow_on_cpu else 1)) // period)

        def run_layer(
            index: int, params: Params, key: jax.Array | None, x_BTD: jax.Array
        ) -> jax.Array:
            layer = Layer(cfg, cfg.layer(index), cfg.places[index][0], parent=None)
            rngs = {} if key is None else {"dropout": key}
            return layer.apply({"params": params}, x_BTD, context, rngs=rngs)  # pyright: ignore

        if cfg.remat != "none":
            run_layer = jax.checkpoint(
                run_layer, policy=checkpoint_policy(cfg.remat), prevent_cse=unroll > 1,
                static_argnums=0,
            )  # fmt: skip

        first, rest = range(period), range(whole * period, cfg.num_layers)
        stacks = {stack: self.variables["params"][stack] for stack in cfg.stacks}
        keys, in_period = self.layer_keys(context), [cfg.places[i][0] for i in first]

        def run(x_BTD: jax.Array, part: tuple, indices: range) -> tuple[jax.Array, None]:
            params, keys = part
            for number, index in enumerate(indices):
                stack, row = cfg.places[index]
                one = {stack: take(params[stack], row)}
                x_BTD = run_layer(index, one, None if keys is None else take(keys, number), x_BTD)
            return x_BTD, None

        def take(tree: PyTree, row: int) -> PyTree:
            return jax.tree.map(lambda w: w[row], tree)

        def periods(tree: PyTree, each: int) -> PyTree:
            return jax.tree.map(
                lambda w: w[: whole * each].reshape(whole, each, *w.shape[1:]), tree
            )

        if period == 1:  # without the axis of periods: another program would have other bits

            def run_one(x_BTD: jax.Array, part: tuple) -> tuple[jax.Array, None]:
                params, key = part
                return run_layer(0, params, key, x_BTD), None

            return scan_above(run_one, x_BTD, (stacks, keys), whole, unroll, self.frozen_layers)
        parts = {s: periods(params, in_period.count(s)) for s, params in stacks.items()}
        parts = parts, None if keys is None else periods(keys, period)
        body = functools.partial(run, indices=first)
        below = self.frozen_layers // period
        x_BTD = scan_above(body, x_BTD, parts, whole, unroll, below)
        return run(x_BTD, (stacks, None if keys is None else keys[rest.start :]), rest)[0]

    def layer_keys(self, context: Context) -> jax.Array | None:
        """Return a key for the dropout of each layer [L]; None without dropout."""
        if self.cfg.deterministic or context.deterministic or self.scope is None:
            return None
        rng: Any = self.scope.rngs["dropout"]
        return jax.random.split(rng.rng, self.cfg.num_layers)

    def loop_layers(
        self, x_BTD: jax.Array, context: Context, cache: tuple[Cache, ...] | None
    ) -> tuple[jax.Array, tuple[Cache, ...] | None]:
        """Return the residual stream after all layers, and their caches."""
        cfg, filled = self.cfg, list[Any]()
        layers = decoding_params(cfg, self.variables["params"], 1)["layers"]
        sown = self.is_mutable_collection("intermediates")

        # Layers alike are traced once: a program of 30 is ready in a quarter of the time.
        @functools.partial(jax.jit, static_argnums=0, inline=True)
        def run_layer(
            layer: LayerConfig, params: Params, x_BTD: jax.Array, cache: Cache | None
        ) -> tuple[tuple[jax.Array, Cache | None], Any]:
            block = Block(cfg, layer, parent=None)
            return block.apply({"params": params}, x_BTD, context, cache, mutable="intermediates")

        for index, params in enumerate(layers):
            one = cache[index] if cache is not None else None
            (x_BTD, one), kept = run_layer(cfg.layer(index), params, x_BTD, one)
            if sown:
                self.sow("intermediates", "heads", kept["intermediates"]["heads"])
            filled.append(one)
        return x_BTD, tuple(filled) if cache is not None else None


def scan_above(
    run: Callable, x_BTD: jax.Array, parts: tuple, length: int, unroll: int, below: int
) -> jax.Array:
    """Return x_BTD after `length` steps of a scan; the first `below` give no gradients to `parts`.

    They are a scan of their own, so that the backward pass need not run through it.
    """
    if below:
        params, keys = jax.tree.map(lambda w: w[:below], parts)
        first = jax.lax.stop_gradient(params), keys
        x_BTD = jax.lax.scan(run, x_BTD, first, length=below, unroll=min(unroll, below))[0]
        parts = jax.tree.map(lambda w: w[below:], parts)
    left = length - below
    return jax.lax.scan(run, x_BTD, parts, length=left, unroll=max(1, min(unroll, left)))[0]


def init_params(cfg: ModelConfig, rng: jax.Array) -> Params:
    """Return new parameters, a nested dict of the paths of the table."""
    params = Transformer(cfg).init(rng, jnp.zeros((1, 1), jnp.int32))["params"]
    return add_adapters(cfg, params, rng)
