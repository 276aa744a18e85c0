"""What kind of CPU this machine has. No jax here."""

import functools
import hashlib
import platform
from contextlib import suppress
from pathlib import Path


def cpu_features() -> str:
    """Return the CPU's instruction sets as Linux lists them; "" elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return ""


def cpu_identity() -> str:
    """Return a name for the kind of CPU."""
    features = f"{platform.machine()} {platform.processor()} {cpu_features()}"
    return hashlib.sha256(features.encode()).hexdigest()[:12]


@functools.cache
def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16."""
    return not {"amx_bf16", "avx512_bf16"}.isdisjoint(cpu_features().split())


@functools.cache
def has_avx512() -> bool:
    """Return whether this CPU has vectors of 512 bits."""
    return "avx512f" in cpu_features().split()
