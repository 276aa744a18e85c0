"""In: a config and a target. Out: rehearsals of meshes, remat policies and micro-batches for it.

And the largest blocks of splash that compile for it.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from nanojaxgpt.attention import attend
from nanojaxgpt.attention.request import Mask
from nanojaxgpt.chips import Chip
from nanojaxgpt.config import with_fields
from nanojaxgpt.config.remat import named_activations
from nanojaxgpt.errors import ConfigError, MemoryExceeded
from nanojaxgpt.memory import (
    Memory,
    abstract_batch,
    device_tokens,
    kept_activations,
    readable,
    state_memory,
)
from nanojaxgpt.model.config import JobConfig
from nanojaxgpt.model.parameters import parameters
from nanojaxgpt.rehearse.report import mesh_name
from nanojaxgpt.rehearse.step import (
    Rehearsal,
    fit_target,
    rehearse_step,
    resolve_mesh,
)
from nanojaxgpt.rehearse.targets import Target
from nanojaxgpt.sharding import partition_spec
from nanojaxgpt.step import make_step

MAX_COMPILES = 8  # at one to three minutes each
SEARCHED = ("data", "fsdp", "tensor")  # other axes stay as the config has them
REFINED = 3  # compiles of these that are left for other micro-batches
# From the fastest to the smallest. The second keeps all products that the backward pass needs.
POLICIES = ("none", "save=q,k,v,attention,o,gate,up", "save=q,k,v,attention", "full")
# From the fewest tiles to the most; the first are those of published recipes for Trillium.
BLOCKS = (
    "q=1024 kv=1024 backward_q=1024 backward_kv=2048 fused=true",
    "q=1024 kv=1024 fused=true",
    "q=512 kv=1024 fused=true",
    "q=512 kv=512 fused=true",
)
ALIKE = 0.9  # GPT-2 small on v5e:4x4 asked for 26.2 to 26.7 GiB of temporaries on four meshes


def candidates(cfg: JobConfig, target: Target) -> list[tuple[JobConfig, float]]:
    """Return the configs whose mesh divides batch and model, the least traffic first.

    Each with the bytes that its state leaves on a device; below 0 it does not fit.
    """
    found = []
    for shape in meshes(cfg, target.topology.count, target.topology.slices):
        try:
            trial = with_fields(fit_target(cfg, target), shape)
            trial, mesh = resolve_mesh(trial, target)
            memory = exact_memory(trial, mesh, target)
        except ConfigError:
            continue  # something is not divisible
        found.append((trial, memory.available - memory.total))
    return sorted(found, key=lambda trial: expected_seconds(trial[0], target.topology.chip))


def meshes(cfg: JobConfig, count: int, slices: int) -> Iterator[dict[str, int]]:
    """Yield the fields of the searched axes, which multiply to the devices left by the others."""
    sizes = {**cfg.mesh.given(), "slice": max(cfg.mesh.slice, slices)}
    others = math.prod(max(size, 1) for axis, size in sizes.items() if axis not in SEARCHED)
    left, rest = divmod(count, others)
    sizes = [n for n in range(1, left + 1) if left % n == 0] if not rest else []
    for fsdp, tensor in itertools.product(sizes, sizes):
        if left % (fsdp * tensor) == 0:
            data = left // fsdp // tensor
            yield {"mesh.data": data, "mesh.fsdp": fsdp, "mesh.tensor": tensor}


def exact_memory(cfg: JobConfig, mesh: Mesh, target: Target) -> Memory:
    """Return the bytes that a device holds without temporaries. Raises ConfigError."""
    with jax.set_mesh(mesh):
        step, available = make_step(cfg, mesh), target.topology.chip.memory
        batch = abstract_batch(cfg, mesh)
        return state_memory(cfg, step.abstract, step.frozen, batch, available)


def expected_seconds(cfg: JobConfig, chip: Chip) -> float:
    """Return a rough time of the traffic, which only orders the trials.

    Weights gathered twice and their gradients scattered over fsdp, gradients summed over data,
    and over tensor four sums of the activations a layer.
    """
    mesh, model, train = cfg.mesh, cfg.model, cfg.train
    rows = parameters(model).values()
    weights = 2 * sum(row.size for row in rows if row.kind == "kernel") / mesh.tensor
    tokens = device_tokens(cfg) * train.accumulation_steps
    sent = 3 * train.accumulation_steps * weights * (1 - 1 / mesh.fsdp)
    sent += 4 * weights / mesh.fsdp * (1 - 1 / mesh.data)
    sums = 4 * model.num_layers * tokens * model.embed_dim * 2
    sent += 2 * sums * (1 - 1 / mesh.tensor)
    return sent / chip.link_speed


def search(
    cfg: JobConfig, target: Target, say: Callable[[str], None], limit: int = MAX_COMPILES
) -> list[Rehearsal]:
    """Return at most `limit` rehearsals: for each mesh the fastest policy that fits.

    Of the best, or where none fits of the smallest, other micro-batches are tried: see `refine`.
    Meshes of one size of `tensor` keep alike activations: a policy that asked for too much on one
    is not tried on the next where about as much would not fit. Raises ConfigError where no mesh
    divides the batch and the model, MemoryExceeded where none holds even the state.
    """
    divided, found = candidates(cfg, target), []
    trials = [(trial, left) for trial, left in divided if left >= 0]
    chips = f"{target.topology.count} x {target.topology.chip.kind}"
    if not divided:
        raise ConfigError(f"no mesh of {chips} divides the batch and the model")
    if not trials:
        raise MemoryExceeded(
            f"no mesh of {chips} holds the parameters, gradients and optimizer state; on the best "
            f"mesh each chip lacks {readable(-max(left for _, left in divided))}"
        )
    say(f"{len(trials)} meshes hold the state; at most {limit} programs are compiled")
    asked: dict[tuple[str, int], float] = {}
    first = max(1, limit - REFINED)
    for trial, left in trials:
        for policy in policies(cfg):
            alike = ALIKE * asked.get((policy, trial.mesh.tensor), 0)
            if max(alike, kept_activations(trial, policy)) > left:
                continue
            if len(found) == first:
                return found + refine(found, target, say, limit - first)
            trial = with_fields(trial, {"model.remat": policy})
            sizes = mesh_name(trial.mesh.given())
            say(f"compiling {len(found) + 1} of at most {limit}: {sizes}, {policy_name(trial)}")
            found.append(rehearse_step(trial, target))
            if found[-1].memory.fits:
                break
            asked[policy, trial.mesh.tensor] = found[-1].memory.temporaries
    return found + refine(found, target, say, limit - len(found))


def policies(cfg: JobConfig) -> list[str]:
    """Return POLICIES with the activations that the model has."""
    known = named_activations(cfg.model)
    found = []
    for policy in POLICIES:
        names = [n for n in policy.removeprefix("save=").split(",") if n in known]
        found.append("save=" + ",".join(names) if names else policy)
    return found


def policy_name(cfg: JobConfig) -> str:
    """Return the remat policy and the micro-batches in words."""
    parts = cfg.train.accumulation_steps
    return f"remat {cfg.model.remat}" + (f", {parts} micro-batches" if parts > 1 else "")


def refine(
    found: list[Rehearsal], target: Target, say: Callable[[str], None], limit: int
) -> list[Rehearsal]:
    """Return at most `limit` rehearsals of the best of `found` with other micro-batches.

    Where it fits, fewer and larger ones, which gather the weights less often, until one does not
    fit; where nothing fits, more and smaller ones of the smallest, until one does.
    """
    if not found:
        return []
    fitting = sorted((one for one in found if one.memory.fits), key=lambda r: r.roofline.seconds)
    best = fitting[0] if fitting else min(found, key=lambda one: one.memory.total)
    train, mesh, tried = best.cfg.train, best.cfg.mesh, []
    rows = train.batch_size // (mesh.slice * mesh.data * mesh.fsdp)
    parts = [n for n in range(1, rows + 1) if rows % n == 0]
    fewer = [n for n in reversed(parts) if n < train.accumulation_steps]
    more = [n for n in parts if n > train.accumulation_steps]
    for count in (fewer if fitting else more)[:limit]:
        trial = with_fields(best.cfg, {"train.accumulation_steps": count})
        say(f"compiling {mesh_name(best.mesh)}, {policy_name(trial)}")
        tried.append(rehearse_step(trial, target))
        if tried[-1].memory.fits != bool(fitting):
            break
    return tried


def largest_blocks(cfg: JobConfig, target: Target) -> str:
    """Return the first of BLOCKS that the chip's compiler takes, "" for the usual ones.

    Attention alone is compiled, forward and backward. How fast it is nobody says: larger tiles have
    been faster on every chip with a published recipe, as long as they fit its vector memory.
    """
    if target.note or target.topology.chip.platform != "tpu":
        return ""
    for text in BLOCKS:
        try:
            compile_attention(with_fields(cfg, {"model.attention_blocks": text}), target)
        except (ConfigError, jax.errors.JaxRuntimeError):
            continue
        return text
    return ""


def compile_attention(cfg: JobConfig, target: Target) -> None:
    """Compile splash for one row of a device. Raises ConfigError, JaxRuntimeError."""
    cfg, mesh = resolve_mesh(cfg, target)
    model, rows = cfg.model, cfg.mesh.slice * cfg.mesh.data * cfg.mesh.fsdp
    place = NamedSharding(mesh, partition_spec(["batch", "sequence", "heads", "head_dim"]))

    def heads(count: int) -> jax.ShapeDtypeStruct:
        shape = rows, model.seq_len, count, model.head_dim
        return jax.ShapeDtypeStruct(shape, model.compute_dtype, sharding=place)

    def loss(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        order_1T = jnp.arange(model.seq_len)[None]
        out_BTNH = attend(
            q_BTNH, k_BTKH, v_BTKH, Mask(order_1T, order_1T, window=model.windows[0]),
            scale=model.attention_scale, softcap=model.attention_softcap, kernel="splash",
            blocks=model.attention_blocks,
        )  # fmt: skip
        return jnp.sum(out_BTNH.astype(jnp.float32))

    with jax.set_mesh(mesh):
        keys = heads(model.num_kv_heads)
        jax.jit(jax.grad(loss, (0, 1, 2))).lower(heads(model.num_heads), keys, keys).compile()
