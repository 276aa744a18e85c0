"""In: a topology. Out: devices to compile for, those of libtpu or CUDA's plug-in, or fake ones."""

import importlib.util
import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from nanojaxgpt.chips import GPUS_PER_NODE, Topology
from nanojaxgpt.errors import ConfigError

INSTALL = "pip install -e .[tpu]"
NO_LIBTPU = f"libtpu is not installed ({INSTALL} compiles for the chip itself)"
NO_CUDA = "CUDA's plug-in is not installed (pip install -e .[cuda13] compiles for the chip itself)"
GPU = (
    "XLA for GPU compiled the step, without tuning on the chip; attention is that of XLA, because "
    "cuDNN's can't be compiled without a GPU"
)
# What the compiler must know of a chip, from NVIDIA's tables of compute capabilities 8.0 and 9.0.
GPU_SHAPE = """
    threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
    registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_block: 49152
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
    device_address_bits: 64 driver_version: "13.0.0" runtime_version: "13.0.0"
    compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
"""
GPU_LIMITS = {
    "a100": "cuda_compute_capability { major: 8 } core_count: 108 fpus_per_core: 64 "
    "l2_cache_size: 41943040 clock_rate_ghz: 1.41 "
    "shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912",
    "h100": "cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 "
    "l2_cache_size: 52428800 clock_rate_ghz: 1.98 "
    "shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448",
}
MAX_FAKE_DEVICES = 1024  # XLA's client for CPU takes memory for each: 10,000 x 10,000 took all
FAKE = (
    "XLA for CPU partitioned the step: parameters and optimizer state are exact, temporaries and "
    "collectives are those of the CPU's compiler, attention is the plain kernel"
)


class Target(NamedTuple):
    """Devices to compile for; `places` holds each one's slice and its coordinates there.

    `note` is empty where the chip's own compiler works, else it names the estimated parts.
    """

    topology: Topology
    devices: tuple[Any, ...]
    note: str

    @property
    def fake(self) -> bool:
        """Return whether another platform's compiler stands in."""
        return self.devices[0].platform != self.topology.chip.platform

    def places(self, devices: Sequence[Any]) -> np.ndarray:
        """Return each device's slice (GPUs: node) and its coordinates there [count, 1 + n]."""
        topology = self.topology
        if topology.chip.torus and not self.fake:
            dims = topology.chip.torus
            return np.array([[getattr(d, "slice_index", 0), *d.coords[:dims]] for d in devices])
        if topology.chip.torus:
            spots = itertools.product(*map(range, (topology.slices, *topology.shape)))
        else:
            spots = (divmod(i, GPUS_PER_NODE) for i in range(topology.count))
        where = dict(zip(self.devices, spots, strict=True))
        return np.array([where[device] for device in devices])


def open_target(topology: Topology) -> Target:
    """Return the devices of a topology. Raises ConfigError where its shape can't be.

    Nothing but the CPU is started in this process: an accelerator that is here stays free.
    """
    jax.config.update("jax_platforms", "cpu")
    platform = topology.chip.platform
    if platform == "tpu" and importlib.util.find_spec("libtpu"):
        return Target(topology, tpu_devices(topology), "")
    if platform == "gpu" and has_cuda_plugin():
        return Target(topology, gpu_devices(topology), GPU)
    devices = fake_devices(topology.count)
    if platform == "tpu":
        return Target(topology, devices, f"{NO_LIBTPU}; {FAKE}")
    if platform == "gpu":
        return Target(topology, devices, f"{NO_CUDA}; {FAKE}")
    return Target(topology, devices, "the chip's figures are round numbers, of no real machine")


def has_cuda_plugin() -> bool:
    """Return whether jax's plug-in for CUDA is installed."""
    names = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
    return bool(importlib.util.find_spec("jax_plugins")) and any(
        map(importlib.util.find_spec, names)
    )


def tpu_devices(topology: Topology) -> tuple[Any, ...]:
    """Return libtpu's descriptions of the chips. Raises ConfigError on a shape it refuses."""
    from jax.experimental import topologies

    quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    # Without these libtpu asks the network what machine this is, and fails where a training
    # process on the same machine holds its lock; nothing here touches a chip.
    alone = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    host = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-16"}
    for name, value in (quiet | alone | host).items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.name.startswith("v4"):
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--topology={topology.name}: {str(error).splitlines()[0]}") from None
    return tuple(found.devices)


def gpu_devices(topology: Topology) -> tuple[Any, ...]:
    """Return descriptions of the GPUs by CUDA's plug-in, which needs no driver for them."""
    from jax.experimental import topologies

    chip = topology.chip
    limits = GPU_LIMITS["a100" if topology.name.startswith("a100") else "h100"]
    described = f"""
        platform_name: "CUDA" device_description_str: "{chip.kind}"
        dnn_version_info {{ major: 9 minor: 10 }}
        gpu_device_info {{
          {limits} {GPU_SHAPE}
          memory_bandwidth: {int(chip.memory_speed)} device_memory_size: {int(chip.memory)}
        }}"""
    nodes = -(-topology.count // GPUS_PER_NODE)
    shape = f"1x{nodes}x{-(-topology.count // nodes)}"
    found = topologies.get_topology_desc(
        platform="cuda", target_config=described, topology=shape
    ).devices
    return tuple(found[: topology.count])


def fake_devices(count: int) -> tuple[Any, ...]:
    """Return so many CPU devices. Raises ConfigError where they are too many, or fewer started."""
    if count > MAX_FAKE_DEVICES:
        raise ConfigError(
            f"{count:,} fake devices are too many, {MAX_FAKE_DEVICES:,} at most; libtpu takes more "
            f"for TPUs: {INSTALL}"
        )
    try:
        known = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_num_cpu_devices", max(count, known))
    except RuntimeError:
        pass  # the backend runs already
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ConfigError(f"{count} fake devices needed, but {len(devices)} have started already")
    return tuple(devices[:count])
