"""In: a config and a target. Out: rehearsals of the meshes and remat policies that may fit it."""

import itertools
import math
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

from nanojaxgpt.chips import Chip
from nanojaxgpt.config import with_fields
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
from nanojaxgpt.step import make_step

MAX_COMPILES = 8  # at one to three minutes each
SEARCHED = ("data", "fsdp", "tensor")  # other axes stay as the config has them
POLICIES = ("none", "dots_no_batch", "full")  # from the fastest to the smallest
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
    for trial, left in trials:
        for policy in POLICIES:
            alike = ALIKE * asked.get((policy, trial.mesh.tensor), 0)
            if max(alike, kept_activations(trial, policy)) > left:
                continue
            if len(found) == limit:
                return found
            trial = with_fields(trial, {"model.remat": policy})
            sizes = mesh_name(trial.mesh.given())
            say(f"compiling {len(found) + 1} of at most {limit}: {sizes}, remat {policy}")
            found.append(rehearse_step(trial, target))
            if found[-1].memory.fits:
                break
            asked[policy, trial.mesh.tensor] = found[-1].memory.temporaries
    return found
