"""JAX's splash attention for TPU, a Pallas kernel; interpreted, slowly, elsewhere."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from nanojaxgpt.attention.request import Mask, Request
from nanojaxgpt.config.blocks import LANES, SplashBlocks, splash_blocks
from nanojaxgpt.sharding import axis_size, partition_spec


def supports(request: Request) -> str:
    """Return "", or why splash can't do it."""
    if request.alibi:
        return "splash has no ALiBi"
    if request.dropout:
        return "splash has no attention dropout"
    if request.query_length != request.key_length:
        return "splash needs as many queries as keys here"
    if request.query_length % (LANES * request.sequence_shards):
        return f"splash needs a length divisible by {LANES} on each device of the axis sequence"
    try:
        block_sizes(request)
    except ValueError as error:
        return f"splash has blocks of model.attention_blocks, in which {error}"
    return ""


def block_sizes(request: Request) -> SplashBlocks:
    """Return the blocks for the tokens that a device has. Raises ValueError."""
    queries = request.query_length // request.sequence_shards
    return splash_blocks(request.blocks, queries, request.key_length)


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
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = request.query_length, request.heads // axis_size("tensor")
    seen = splash.CausalMask((length, length))
    if mask.window:
        seen = splash.LocalMask((length, length), (mask.window - 1, 0), 0)
    sizes = block_sizes(request)
    apart: dict[str, Any] = {}
    if not sizes.fused:
        apart = dict(block_q_dq=sizes.backward_q, block_kv_dq=sizes.backward_kv)
    blocks = splash.BlockSizes(
        block_q=sizes.q, block_kv=sizes.kv, block_kv_compute=sizes.kv_compute,
        block_q_dkv=sizes.backward_q, block_kv_dkv=sizes.backward_kv,
        block_kv_dkv_compute=sizes.backward_kv_compute, use_fused_bwd_kernel=sizes.fused, **apart,
    )  # fmt: skip
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([seen] * heads),
        head_shards=1,
        q_seq_shards=request.sequence_shards,
        attn_logits_soft_cap=request.softcap or None,
        block_sizes=blocks,
        residual_checkpoint_name="attention",
        interpret=request.platform != "tpu",
    )
    q_BNTH = jnp.swapaxes(q_BTNH, 1, 2) * scale
    k_BKSH, v_BKSH = jnp.swapaxes(k_BSKH, 1, 2), jnp.swapaxes(v_BSKH, 1, 2)
    arrays = [kernel, q_BNTH, k_BKSH, v_BKSH]
    if mask.query_segments_BT is not None and mask.key_segments_BS is not None:
        arrays += [mask.query_segments_BT, mask.key_segments_BS]

    def shard(
        kernel: Callable, q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, *segments: Any
    ) -> jax.Array:
        def row(q_NTH: jax.Array, k_KSH: jax.Array, v_KSH: jax.Array, *segments: Any) -> jax.Array:
            return kernel(q_NTH, k_KSH, v_KSH, splash.SegmentIds(*segments) if segments else None)

        return jax.vmap(row)(q_BNTH, k_BKSH, v_BKSH, *segments)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # A Pallas kernel is opaque to the partitioner: each device runs it on its own shard.
        queries = partition_spec(["batch", "heads", "sequence"])
        keys = partition_spec(["batch", "kv_heads", "keys"])
        tokens = PartitionSpec(None, *partition_spec(["sequence"]))
        specs = [kernel.manual_sharding_spec(NamedSharding(mesh, tokens)), queries, keys, keys]
        specs += [partition_spec(["batch", "sequence"]), partition_spec(["batch", "keys"])]
        shard = jax.shard_map(
            shard, in_specs=tuple(specs[: len(arrays)]), out_specs=queries, check_vma=False
        )
    return jnp.swapaxes(shard(*arrays), 1, 2).astype(q_BTNH.dtype)
