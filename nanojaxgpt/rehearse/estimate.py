"""In: shapes, shardings, a compiled step, a chip. Out: bytes, seconds, and which of them bounds."""

import collections
from typing import Any, NamedTuple

import numpy as np

from nanojaxgpt.chips import Chip
from nanojaxgpt.config.sections import Config
from nanojaxgpt.memory import Memory, device_tokens
from nanojaxgpt.rehearse.collectives import Collective, ring_bytes


class Traffic(NamedTuple):
    """What one device sends in a step by one kind of collective over some mesh axes."""

    kind: str
    axes: str
    network: str
    devices: int
    times: int
    sent: float
    seconds: float


class Roofline(NamedTuple):
    """Seconds of a step if one resource were all; MFU and step time if all overlap perfectly."""

    compute: float
    memory: float
    communication: float
    mfu: float

    @property
    def seconds(self) -> float:
        """Return the step time that nothing can beat."""
        return max(self.compute, self.memory, self.communication)

    @property
    def bound(self) -> str:
        """Return the name of the resource that takes longest."""
        names = ("compute", "memory", "communication")
        return max(names, key=lambda name: getattr(self, name))


def network_names(chip: Chip) -> tuple[str, str]:
    """Return the names of a chip's links and of its network between slices or nodes."""
    return {"tpu": ("ICI", "DCN"), "gpu": ("NVLink", "InfiniBand")}.get(
        chip.platform, ("memory", "network")
    )


def group_axes(group: tuple[int, ...], mesh_shape: dict[str, int]) -> str:
    """Return the mesh axes along which the devices of a group differ, `data+fsdp`."""
    places = np.unravel_index(np.array(group), tuple(mesh_shape.values()))
    varying = [axis for axis, at in zip(mesh_shape, places, strict=True) if len(set(at)) > 1]
    return "+".join(varying)


def link_speed(places: np.ndarray, chip: Chip, shape: tuple[int, ...]) -> float:
    """Return bytes/s into a device from a group of one slice, whose coordinates are given [n, d].

    Every torus dimension that the group spans gives a link, or two where it closes to a ring.
    Optical switches close the rings of a 3-D torus, and only where whole cubes are joined.
    """
    if not chip.torus:
        return chip.link_speed
    closed = [size % chip.wraps == 0 for size in shape]
    if chip.torus == 3:
        closed = [all(closed)] * 3
    links = 0
    for at, size, wraps in zip(places.T, shape, closed, strict=True):
        ring = wraps and len(set(at)) == size
        links += (2 if ring else 1) if len(set(at)) > 1 else 0
    return chip.link_speed * max(links, 1)


def traffic(
    collectives: tuple[Collective, ...],
    mesh_shape: dict[str, int],
    places: np.ndarray,
    chip: Chip,
    shape: tuple[int, ...],
) -> tuple[Traffic, ...]:
    """Return the traffic by kind, axes and network, the slowest first.

    `places` are Target.places of mesh.devices.flat. A group over several slices works in two
    levels: over its links in each slice, and the part of one device over the network.
    """
    rows: dict[tuple[Any, ...], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
    links, network = network_names(chip)
    for one in collectives:
        group = max(one.groups, key=lambda g: len(set(places[list(g), 0])))
        at = places[list(group)]
        slices = len(set(at[:, 0]))
        inside = len(group) // slices
        near = at[at[:, 0] == at[0, 0]][:, 1:]
        axes = group_axes(group, mesh_shape)
        for name, size, devices, speed in (
            (links, one.size, inside, link_speed(near, chip, shape)),
            (network, one.size / inside, slices, chip.network_speed),
        ):
            if devices > 1:
                sent = one.times * ring_bytes(one.kind, size, devices)
                row = rows[one.kind, axes, name, devices]
                row[:] = row[0] + one.times, row[1] + sent, row[2] + sent / speed
    found = [
        Traffic(kind, axes, name, devices, int(times), sent, seconds)
        for (kind, axes, name, devices), (times, sent, seconds) in rows.items()
    ]
    return tuple(sorted(found, key=lambda t: -t.seconds))


def roofline(
    cfg: Config,
    memory: Memory,
    model_flops: float,
    extra_flops: float,
    seconds_sent: float,
    chip: Chip,
    count: int,
) -> Roofline:
    """Return the step's bounds on `count` chips.

    Compute has the recomputed FLOPs too, MFU not. Memory is a lower bound: state and temporaries
    are read and written once, and each micro-batch reads its weights twice.
    """
    compute = (model_flops + extra_flops) / count / chip.flops
    item = 2 if cfg.model.compute_dtype == "bfloat16" else 4
    stored = 2 if cfg.model.param_dtype == "bfloat16" else 4
    gathered = memory.parameters * cfg.mesh.fsdp * item / stored
    moved = 2 * memory.total + 2 * cfg.train.accumulation_steps * gathered
    seconds = max(compute, moved / chip.memory_speed, seconds_sent)
    mfu = model_flops / count / chip.flops / seconds
    return Roofline(compute, moved / chip.memory_speed, seconds_sent, mfu)


def advice(cfg: Config, memory: Memory) -> str:
    """Return the advice for a step that does not fit, the largest part first."""
    state = memory.parameters + memory.optimizer + memory.gradients
    mesh, train, model = cfg.mesh, cfg.train, cfg.model
    factor = next((n for n in range(2, mesh.data + 1) if mesh.data % n == 0), 1)
    sharded = f"mesh.fsdp={mesh.fsdp * factor} mesh.data={mesh.data // factor}"
    rows = train.batch_size // (mesh.slice * mesh.data * mesh.fsdp)
    parts = [n for n in range(train.accumulation_steps + 1, rows + 1) if rows % n == 0]
    logits = device_tokens(cfg) / train.loss_chunks * model.vocab_size * 4 / mesh.tensor
    if state > memory.available / 2 and mesh.data > 1:
        return f"more shards of the state: {sharded}"
    if state > memory.available * 0.8:
        return f"more chips: the state alone is {state / memory.available:.0%} of a device"
    if logits > memory.available / 8 and model.seq_len % (train.loss_chunks * 4) == 0:
        return f"fewer logits at once: train.loss_chunks={train.loss_chunks * 4}"
    if model.remat != "full":
        return "fewer activations kept: model.remat=full"
    if parts:
        return f"smaller micro-batches: train.accumulation_steps={parts[0]}"
    if mesh.data > 1:
        return f"more shards of the state: {sharded}"
    return f"mesh.tensor={mesh.tensor * 2}, or more chips"
