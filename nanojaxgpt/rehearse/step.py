"""In: a config and a target. Out: the real train step compiled for it, and what it takes there."""

import re
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from nanojaxgpt import sharding
from nanojaxgpt.config import with_fields
from nanojaxgpt.config.remat import parse_remat
from nanojaxgpt.flops import attention_flops, train_flops
from nanojaxgpt.memory import Memory, abstract_batch, state_memory
from nanojaxgpt.model.config import JobConfig
from nanojaxgpt.model.parameters import count_params
from nanojaxgpt.rehearse import estimate
from nanojaxgpt.rehearse.collectives import Program, read_collectives
from nanojaxgpt.rehearse.estimate import Roofline, Traffic
from nanojaxgpt.rehearse.flops import count_matmuls, weight_flops
from nanojaxgpt.rehearse.targets import Target
from nanojaxgpt.step import Step, make_hyper, make_step

NONE = Program((), 0)
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Flops(NamedTuple):
    """FLOPs of a whole step: the formula's, its part with weights and the jaxpr's of that part.

    `recomputed` is what the backward pass does again, matmuls with weights and attention.
    """

    formula: int
    weights_formula: int
    weights_counted: int
    recomputed: int

    @property
    def difference(self) -> float:
        """Return by how much the count exceeds the formula, as a fraction."""
        return self.weights_counted / self.weights_formula - 1


class Rehearsal(NamedTuple):
    """All that is known of one step on one target."""

    cfg: JobConfig
    mesh: dict[str, int]
    num_params: int
    memory: Memory
    flops: Flops
    traffic: tuple[Traffic, ...]
    unknown_loops: int
    roofline: Roofline
    compile_seconds: float


def fit_target(cfg: JobConfig, target: Target) -> JobConfig:
    """Return the config as it can be compiled: on fake devices without the chip's own kernels."""
    if target.topology.chip.platform == "gpu" and not target.fake:
        return with_fields(cfg, {"model.attention": "xla"})  # cuDNN's needs a GPU
    if not target.fake:
        return cfg
    unroll = cfg.model.unroll or 1  # as it would be on the chip
    return with_fields(cfg, {"model.attention": "xla", "model.unroll": unroll})


def resolve_mesh(cfg: JobConfig, target: Target) -> tuple[JobConfig, Mesh]:
    """Return the config with every mesh axis given, and the mesh. Raises ConfigError.

    Where the config has one slice, it gets those of the target.
    """
    slices = cfg.mesh.slice if cfg.mesh.slice > 1 else target.topology.slices
    mesh = sharding.make_mesh({**cfg.mesh.given(), "slice": slices}, target.devices)
    return with_fields(cfg, {f"mesh.{axis}": size for axis, size in mesh.shape.items()}), mesh


def trace(cfg: JobConfig, mesh: Mesh) -> tuple[Step, Any]:
    """Return the step of a config and its trace. Raises ConfigError."""
    step = make_step(cfg, mesh)
    batch = abstract_batch(cfg, mesh)
    return step, step.train_step.trace(step.abstract, batch, make_hyper(cfg), step.frozen)


def count_flops(cfg: JobConfig, mesh: Mesh, traced: Any) -> Flops:
    """Return the step's FLOPs by formula and by its jaxpr.

    What is recomputed is the difference to the jaxpr of the same step that keeps everything. A
    fused attention kernel shows none of its own: where attention is recomputed, the formula's
    forward pass counts.
    """
    model, seq_len, rows = cfg.model, cfg.model.seq_len, cfg.train.batch_size
    full = count_matmuls(traced.jaxpr.jaxpr)
    kept = full
    if cfg.model.remat != "none" or cfg.train.loss_chunks > 1:
        plain = with_fields(cfg, {"model.remat": "none", "train.loss_chunks": 1})
        kept = count_matmuls(trace(plain, mesh)[1].jaxpr.jaxpr)
    again = full.weights - kept.weights
    remat = parse_remat(cfg.model.remat)
    kept_attention = "attention" in remat.save + remat.offload
    if remat.policy not in ("none", "dots") and not kept_attention:
        again += attention_flops(model, seq_len) * rows
    weights = weight_flops(model, seq_len) * rows
    return Flops(train_flops(model, seq_len) * rows, weights, kept.weights, again)


def temporaries_wanted(error: Exception, memory: Memory) -> int:
    """Return the bytes, beyond `memory`, that a compiler out of memory asks for.

    libtpu writes "... HLO temporaries (44.05G) exceeds ..." or "Used 30.12G of 15.75G hbm".
    Raises the error where it is another one.
    """
    text = str(error)
    apart = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", text)
    whole = re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of", text)
    found = apart or whole
    if "RESOURCE_EXHAUSTED" not in text or not found:
        raise error
    number, unit = found.groups()
    counted = memory.gradients if apart else memory.total
    return max(int(float(number) * UNITS[unit]) - counted, 0)


def compile_step(traced: Any, memory: Memory) -> tuple[Memory, Program]:
    """Return the memory with the compiler's temporaries, and the collectives.

    Where the chip's memory does not hold the program, the compiler's message has the bytes, and
    there are no collectives to read. Raises JaxRuntimeError on anything else.
    """
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return memory._replace(temporaries=temporaries_wanted(error, memory), compiled=False), NONE
    stats = compiled.memory_analysis()
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    total += max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
    left = max(total - memory.total, 0)
    return memory._replace(temporaries=left), read_collectives(compiled.as_text())


def rehearse_step(cfg: JobConfig, target: Target) -> Rehearsal:
    """Compile the train step of `cfg` for the target. Raises ConfigError where it can't be."""
    chip = target.topology.chip
    cfg, mesh = resolve_mesh(fit_target(cfg, target), target)
    with jax.set_mesh(mesh):
        step, traced = trace(cfg, mesh)
        flops = count_flops(cfg, mesh, traced)
        batch = abstract_batch(cfg, mesh)
        memory = state_memory(cfg, step.abstract, step.frozen, batch, chip.memory)
        began = time.monotonic()
        memory, program = compile_step(traced, memory)
        seconds = time.monotonic() - began
    places = target.places(list(mesh.devices.flat))
    shape = target.topology.shape
    sent = estimate.traffic(program.collectives, dict(mesh.shape), places, chip, shape)
    bound = estimate.roofline(
        cfg, memory, flops.formula, flops.recomputed, sum(t.seconds for t in sent), chip, mesh.size
    )
    num_params = count_params(cfg.model)
    return Rehearsal(
        cfg, dict(mesh.shape), num_params, memory, flops, sent, program.unknown_loops, bound,
        seconds,
    )  # fmt: skip
