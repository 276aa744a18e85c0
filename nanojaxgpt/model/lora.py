"""Adapters of low rank: drawn for a model, checked against it, and merged into its kernels."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from nanojaxgpt.checks import compile_pattern
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.model.parameters import Params, parameters


def check_targets(cfg: ModelConfig) -> None:
    """Raise ConfigError where adapters have a target that is not a kernel of the layers."""
    kernels = [path for path, row in parameters(cfg).items() if row.kind == "kernel"]
    for pattern in cfg.lora.targets or ("",):
        if not pattern or not any(map(compile_pattern(pattern).search, kernels)):
            raise ConfigError(
                f"lora.targets: {pattern!r} matches no kernel; the paths: {', '.join(kernels)}"
            )


def add_adapters(cfg: ModelConfig, params: Params, rng: jax.Array) -> Params:
    """Return the parameters with new adapters, whose output is 0.

    Each has a key of its own, so that the other parameters' random numbers stay as they are.
    """
    found = dict(params)
    for path, row in parameters(cfg).items():
        if row.kind == "adapter":
            key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
            leaf = row.init(key, row.array_shape, jnp.float32)
            found[row.stack] = {**found[row.stack], row.name: leaf}
    return found


def merge_adapters(cfg: ModelConfig, params: Params) -> Params:
    """Return the parameters of the model `cfg.bare`: its kernels with their adapters added.

    The sum is float32, rounded to the kernel's dtype.
    """
    if not cfg.lora.rank:
        return params
    scale = cfg.lora.alpha / cfg.lora.divisor
    merged: dict[str, Any] = {
        name: dict(part) if name in cfg.stacks else part for name, part in params.items()
    }
    for row in parameters(cfg).values():
        down, up = row.adapter if row.kind == "kernel" else ("", "")
        stack = merged.get(row.stack, {})
        if down not in stack:
            continue
        layers = stack[row.name]
        order = (*row.summed, *(axis for axis in range(len(row.shape)) if axis not in row.summed))

        def add(kernel: jax.Array, down: jax.Array, up: jax.Array, order: tuple = order) -> Any:
            delta = jnp.tensordot(down, up, 1, precision="highest")
            delta = jnp.transpose(delta, [order.index(axis) for axis in range(len(order))])
            return (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)

        whole = jax.jit(jax.vmap(add), out_shardings=layers.sharding)
        stack[row.name] = whole(layers, stack.pop(down), stack.pop(up))
    return merged
