"""In: a config and a target. Out: rehearsals of the meshes and remat policies that may fit it."""

import itertools
import math
from collections.abc import Callable, Iterator

import jax
from ml_collections import ConfigDict

from nanojaxgpt.errors import ConfigError
from nanojaxgpt.rehearse.chips import Chip
from nanojaxgpt.rehearse.estimate import Memory, device_tokens
from nanojaxgpt.rehearse.report import mesh_name
from nanojaxgpt.rehearse.step import (
    Rehearsal,
    abstract_batch,
    fit_target,
    make_mesh,
    rehearse_step,
    state_memory,
)
from nanojaxgpt.rehearse.targets import Target
from nanojaxgpt.train import make_step

MAX_COMPILES = 8  # at one to three minutes each
SEARCHED = ("data", "fsdp", "tensor")  # other axes stay as the config has them
POLICIES = ("none", "dots_no_batch", "full")  # from the fastest to the smallest
ALIKE = 0.9  # GPT-2 small on v5e:4x4 asked for 26.2 to 26.7 GiB of temporaries on four meshes


def candidates(cfg: ConfigDict, target: Target) -> list[tuple[ConfigDict, float]]:
    """Return configs whose mesh divides and whose state fits, the least traffic first.

    Each with the bytes that are left on a device.
    """
    found = []
    for shape in meshes(cfg, target.topology.count, target.topology.slices):
        trial = fit_target(cfg, target)
        trial.mesh.update(shape)
        try:
            memory = exact_memory(trial, target)
        except ConfigError:
            continue  # something does not divide
        if memory.total <= memory.available:
            found.append((trial, memory.available - memory.total))
    return sorted(found, key=lambda trial: expected_seconds(trial[0], target.topology.chip))


def meshes(cfg: ConfigDict, count: int, slices: int) -> Iterator[dict[str, int]]:
    """Yield the sizes of the searched axes that multiply to the devices left by the others."""
    sizes = {**cfg.mesh, "slice": max(cfg.mesh.slice, slices)}
    others = math.prod(max(size, 1) for axis, size in sizes.items() if axis not in SEARCHED)
    left, rest = divmod(count, others)
    sizes = [n for n in range(1, left + 1) if left % n == 0] if not rest else []
    for fsdp, tensor in itertools.product(sizes, sizes):
        if left % (fsdp * tensor) == 0:
            yield {"data": left // fsdp // tensor, "fsdp": fsdp, "tensor": tensor}


def exact_memory(cfg: ConfigDict, target: Target) -> Memory:
    """Return what a device holds without temporaries. Raises ConfigError."""
    cfg, mesh = make_mesh(cfg, target)
    with jax.set_mesh(mesh):
        return state_memory(
            cfg, make_step(cfg, mesh), abstract_batch(cfg, mesh), target.topology.chip.memory
        )


def expected_seconds(cfg: ConfigDict, chip: Chip) -> float:
    """Return a rough time of the traffic, which only orders the trials.

    Weights gathered twice and their gradients scattered over fsdp, gradients summed over data,
    and over tensor four sums of the activations a layer.
    """
    mesh, model, train = cfg.mesh, cfg.model, cfg.train
    layer = 4 * model.embed_dim**2 + 3 * model.embed_dim * (model.mlp_dim or 4 * model.embed_dim)
    weights = 2 * model.num_layers * layer / mesh.tensor
    tokens = device_tokens(cfg) * train.accumulation_steps
    sent = 3 * train.accumulation_steps * weights * (1 - 1 / mesh.fsdp)
    sent += 4 * weights / mesh.fsdp * (1 - 1 / mesh.data)
    sums = 4 * model.num_layers * tokens * model.embed_dim * 2
    sent += 2 * sums * (1 - 1 / mesh.tensor)
    return sent / chip.link_speed


def kept_activations(cfg: ConfigDict, policy: str) -> float:
    """Return the fewest bytes of activations a device keeps, for pruning: never too many."""
    mesh, model = cfg.mesh, cfg.model
    width = model.embed_dim
    if policy != "full":
        width += (2 * model.embed_dim + (model.mlp_dim or 4 * model.embed_dim)) / mesh.tensor
    item = 2 if model.compute_dtype == "bfloat16" else 4
    return model.num_layers * device_tokens(cfg) * width * item


def search(
    cfg: ConfigDict, target: Target, say: Callable[[str], None], limit: int = MAX_COMPILES
) -> list[Rehearsal]:
    """Return at most `limit` rehearsals: for each mesh the fastest policy that fits.

    Meshes of one size of `tensor` keep alike activations: a policy that asked for too much on one
    is not tried on the next where about as much would not fit. Raises ConfigError where no mesh
    can hold even the parameters and the optimizer's state.
    """
    trials, found = candidates(cfg, target), []
    if not trials:
        raise ConfigError(
            f"no mesh of {target.topology.count} x {target.topology.chip.kind} divides the batch "
            "and the model and holds its parameters, gradients and optimizer state"
        )
    say(f"{len(trials)} meshes hold the state; at most {limit} programs are compiled")
    asked: dict[tuple[str, int], float] = {}
    for trial, room in trials:
        for policy in POLICIES:
            alike = ALIKE * asked.get((policy, trial.mesh.tensor), 0)
            if max(alike, kept_activations(trial, policy)) > room:
                continue
            if len(found) == limit:
                return found
            trial.model.remat = policy
            sizes = mesh_name(trial.mesh)
            say(f"compiling {len(found) + 1} of at most {limit}: {sizes}, remat {policy}")
            found.append(rehearse_step(trial, target))
            if found[-1].memory.fits:
                break
            asked[policy, trial.mesh.tensor] = found[-1].memory.temporaries
    return found
