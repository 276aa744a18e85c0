"""In: the name of a topology, `v5e:16x16`. Out: its chip's data sheet, its shape, its size."""

import difflib
import math
from typing import NamedTuple

from nanojaxgpt.errors import ConfigError

GIB = 2**30


class Chip(NamedTuple):
    """One device's data sheet, in bytes, bytes/s one way, and dense bfloat16 FLOP/s."""

    kind: str
    platform: str  # tpu, gpu, cpu
    flops: float
    memory: float
    memory_speed: float
    link_speed: float  # of one torus link; where torus is 0, of a device into its switch
    network_speed: float  # a device's share of its host's network
    torus: int  # dimensions of the torus that the links make; 0: a switch
    wraps: int  # a dimension closes to a ring where it divides by this; 0: never
    source: str


_BOOK = "the link and network speeds: How to Scale Your Model, ch. 2, How to Think About TPUs"
_CLOUD = "Google Cloud documentation,"
_NVIDIA = "400 Gb/s InfiniBand a GPU as in the DGX data sheet"

# FLOP/s and memory of v5e, v5p and v6e were compared with their source; the other figures are as
# remembered from theirs, and still have to be.
CHIPS: dict[str, Chip] = {
    "v4": Chip(
        "TPU v4", "tpu", 275e12, 32 * GIB, 1.2e12, 45e9, 6.25e9, 3, 4,
        f"{_CLOUD} TPU v4; {_BOOK}",
    ),
    "v5e": Chip(
        "TPU v5e", "tpu", 197e12, 16 * GIB, 819e9, 45e9, 3.125e9, 2, 16,
        f"{_CLOUD} TPU v5e; {_BOOK}",
    ),
    "v5p": Chip(
        "TPU v5p", "tpu", 459e12, 95 * GIB, 2.765e12, 90e9, 6.25e9, 3, 4,
        f"{_CLOUD} TPU v5p; {_BOOK}",
    ),
    "v6e": Chip(
        "TPU v6e", "tpu", 918e12, 32 * GIB, 1.6e12, 90e9, 12.5e9, 2, 16,
        f"{_CLOUD} TPU v6e; {_BOOK}",
    ),
    "a100": Chip(
        "NVIDIA A100 80GB SXM", "gpu", 312e12, 80e9, 2.039e12, 300e9, 25e9, 0, 0,
        "NVIDIA A100 Tensor Core GPU data sheet; 200 Gb/s InfiniBand a GPU as in DGX A100",
    ),
    "h100": Chip(
        "NVIDIA H100 80GB SXM", "gpu", 989e12, 80e9, 3.35e12, 450e9, 50e9, 0, 0,
        f"NVIDIA H100 Tensor Core GPU data sheet; {_NVIDIA}",
    ),
    "h200": Chip(
        "NVIDIA H200 SXM", "gpu", 989e12, 141e9, 4.8e12, 450e9, 50e9, 0, 0,
        f"NVIDIA H200 Tensor Core GPU data sheet; {_NVIDIA}",
    ),
    "cpu": Chip(
        "CPU", "cpu", 1e11, 4 * GIB, 1e10, 1e10, 1e9, 0, 0,
        "round figures for one core, of no particular machine",
    ),
}  # fmt: skip

GPUS_PER_NODE = 8


class Topology(NamedTuple):
    """`count` chips: `slices` tori of `shape`, or for GPUs and CPUs one dimension of them."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def count(self) -> int:
        """Return the number of chips in all slices."""
        return self.slices * math.prod(self.shape)


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Return the topology of `CHIP:AxB[xC]` or, for GPUs and CPUs, `CHIP:COUNT`.

    Raises ConfigError, with the nearest name where there is one.
    """
    kind, colon, text = name.partition(":")
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind, CHIPS, 2, 0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(CHIPS)}"
        raise ConfigError(f"--topology={name}: no chip {kind!r}; {hint}")
    chip = CHIPS[kind]
    dimensions = max(chip.torus, 1)
    parts = text.split("x")
    if not colon or len(parts) != dimensions or not all(p.isdecimal() and int(p) for p in parts):
        example = {1: "8", 2: "4x4", 3: "4x4x4"}[dimensions]
        raise ConfigError(
            f"--topology={name}: write {kind}:{example}, with other sizes if you like"
        )
    if slices < 1 or (slices > 1 and chip.platform != "tpu"):
        raise ConfigError(f"--slices={slices}: at least 1, and only TPUs come in slices")
    return Topology(name, chip, tuple(map(int, parts)), slices)
