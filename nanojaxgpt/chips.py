"""In: the name of a topology, `v5e:16x16`. Out: its chip's data sheet, its shape, its size."""

import difflib
import math
import re
from typing import NamedTuple

from nanojaxgpt.checks import show
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
    wraps: int  # a dimension closes to a ring where it (in 3-D: each) divides by this; 0: never
    source: str


_CLOUD = "Google Cloud documentation,"
_BOOK = "How to Scale Your Model, ch. 2 (links, network)"
_GPUS = "How to Scale Your Model, ch. 12; NVIDIA's data sheet as others quote it"

# Compared in November 2026 with stored copies of the sources:
# - A TPU's FLOP/s, memory, its speed and the torus stand on Google Cloud's pages on v4, v5e, v5p
#   and v6e, and so does the network of v5e (2 x 100 Gb/s for 8 chips) and v5p (50 Gb/s a chip).
# - Its links, where they close to rings, and the network of v4 and v6e are the book's. For the
#   links of v5e, v5p and v6e Google's pages have 11 % more (50, 100 and 100 GB/s).
# - NVIDIA's pages were not at hand. The book agrees with all figures of GPUs, to two digits; the
#   others are quoted from the data sheets alike in several places. FLOP/s of H100 and H200 are
#   half of what those state, which is with sparsity.
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
        "TPU v6e", "tpu", 918e12, 32 * GIB, 1.638e12, 90e9, 12.5e9, 2, 16,
        f"{_CLOUD} TPU v6e; {_BOOK}",
    ),
    "a100": Chip(
        "NVIDIA A100 80GB SXM", "gpu", 312e12, 80e9, 2.039e12, 300e9, 25e9, 0, 0,
        f"{_GPUS}; 200 Gb/s InfiniBand a GPU as in DGX A100",
    ),
    "h100": Chip(
        "NVIDIA H100 80GB SXM", "gpu", 989e12, 80e9, 3.35e12, 450e9, 50e9, 0, 0,
        f"{_GPUS}; 400 Gb/s InfiniBand a GPU as in DGX H100",
    ),
    "h200": Chip(
        "NVIDIA H200 SXM", "gpu", 989e12, 141e9, 4.8e12, 450e9, 50e9, 0, 0,
        f"{_GPUS}; 400 Gb/s InfiniBand a GPU as in DGX H200",
    ),
    "cpu": Chip(
        "CPU", "cpu", 1e11, 4 * GIB, 1e10, 1e10, 1e9, 0, 0,
        "round figures for one core, of no particular machine",
    ),
}  # fmt: skip

GPUS_PER_NODE = 8
SIZE = re.compile("[1-9][0-9]{0,5}")


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
    if not name:
        raise ConfigError(f"name the hardware, as in --topology=v5e:4x4; chips: {', '.join(CHIPS)}")
    kind, colon, text = name.partition(":")
    if kind not in CHIPS:
        near = difflib.get_close_matches(kind.lower(), CHIPS, 2, 0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"available: {', '.join(CHIPS)}"
        raise ConfigError(f"--topology={show(name)}: no chip {show(kind)}; {hint}")
    chip = CHIPS[kind]
    dimensions = max(chip.torus, 1)
    parts = text.split("x")
    if not colon or len(parts) != dimensions or not all(map(SIZE.fullmatch, parts)):
        example = {1: "8", 2: "4x4", 3: "4x4x4"}[dimensions]
        raise ConfigError(f"--topology={show(name)}: write the sizes as in {kind}:{example}")
    if slices < 1 or (slices > 1 and chip.platform != "tpu"):
        raise ConfigError(f"--slices={slices} must be at least 1, and only TPUs have slices")
    return Topology(name, chip, tuple(map(int, parts)), slices)
