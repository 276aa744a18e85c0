"""In: a config, abstract arrays with shardings, devices. Out: the bytes needed, and MemoryExceeded.

The bytes compared before anything is allocated are a lower bound, so that nothing that fits is
refused. A CPU has no allocator that fails, and Linux would kill the process: there the compiled
program's own count is compared before its first step.
"""

import functools
import math
import os
import re
import resource
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nanojaxgpt import checkpoint, sharding
from nanojaxgpt.config import with_fields
from nanojaxgpt.config.remat import parse_remat
from nanojaxgpt.config.sections import Config
from nanojaxgpt.data.rows import Batch
from nanojaxgpt.errors import ConfigError, MemoryExceeded
from nanojaxgpt.model.config import JobConfig, ModelConfig
from nanojaxgpt.model.parameters import Params, PyTree
from nanojaxgpt.step import TrainState, make_step

EXHAUSTED = re.compile(r"RESOURCE_EXHAUSTED|out of memory|bad_alloc", re.I)
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB")
OWN_GROUPS = Path("/proc/self/cgroup")
SUGGESTED = 3  # changes that an error names
EVALUATION_ADVICE = (
    "To use less memory, lower eval.batch_size (0: that of training), raise train.loss_chunks, or "
    "set model.compute_dtype=bfloat16"
)
# These don't change the training: preferred to others that save up to twice as much.
HARMLESS = ("mesh.", "train.accumulation_steps", "train.loss_chunks", "model.remat")


class Memory(NamedTuple):
    """Bytes on one device; all but `temporaries` follow exactly from shapes and shardings.

    `temporaries` are the compiler's, less the gradients, which are among them.
    """

    parameters: int
    optimizer: int
    gradients: int
    batch: int
    temporaries: int
    available: float
    compiled: bool  # False: the compiler itself ran out of memory

    @property
    def total(self) -> int:
        """The sum of all bytes."""
        return self.parameters + self.optimizer + self.gradients + self.batch + self.temporaries

    @property
    def fits(self) -> bool:
        """Whether the device can hold it."""
        return self.compiled and self.total <= self.available


def shard_bytes(tree: PyTree) -> int:
    """Return the bytes that one device holds of a tree of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def abstract_batch(cfg: Config, mesh: Mesh, batch_size: int = 0) -> Batch:
    """Return the abstract batch of a step, with the shardings of the loader.

    A `batch_size` of 0 means that of training.
    """

    def rows(dtype: Any) -> jax.ShapeDtypeStruct:
        shape = batch_size or cfg.train.batch_size, cfg.model.seq_len
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))

    whole = Batch(rows(jnp.int32), rows(jnp.int32), rows(jnp.float32))
    if cfg.objective.has_reference:
        whole = whole._replace(reference_BT=rows(jnp.float32))
    if cfg.data.packing == "wrap" and not cfg.data.source.startswith("task:"):
        return whole
    return whole._replace(segments_BT=rows(jnp.int32), positions_BT=rows(jnp.int32))


def state_memory(
    cfg: Config, state: TrainState, frozen: Params, batch: Batch, available: float
) -> Memory:
    """Return the bytes on one device that follow from shapes and shardings.

    Temporaries are 0. The optimizer's bytes include a float32 master copy. All gradients exist at
    once, since an update depends on their global norm; they have the dtype of the parameters, their
    sum over micro-batches is float32.
    """
    params = shard_bytes((state.params, frozen))
    optimizer = shard_bytes((state.step, state.opt_state))
    gradients = shard_bytes(state.params)
    if cfg.train.accumulation_steps > 1:
        gradients = shard_bytes(jax.tree.map(as_float32, state.params))
    return Memory(params, optimizer, gradients, shard_bytes(batch), 0, available, True)


def as_float32(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Return an abstract array like this one, in float32."""
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)


def device_tokens(cfg: Config) -> float:
    """Return the tokens of one micro-batch on one device; all mesh axes must have a size."""
    mesh, train = cfg.mesh, cfg.train
    shards = mesh.slice * mesh.data * mesh.fsdp * mesh.sequence
    return train.batch_size * cfg.model.seq_len / train.accumulation_steps / shards


def kept_activations(cfg: JobConfig, policy: str) -> float:
    """Return the fewest bytes of activations that a device keeps for the backward pass."""
    mesh, model = cfg.mesh, cfg.model
    width, remat = model.embed_dim, parse_remat(policy)
    if remat.policy == "names":
        widths: dict[str, float] = dict.fromkeys(("o", "down", "mlp_input"), model.embed_dim)
        widths |= dict.fromkeys(("q", "attention"), model.num_heads * model.head_dim / mesh.tensor)
        widths |= dict.fromkeys(("k", "v"), model.num_kv_heads * model.head_dim / mesh.tensor)
        widths |= dict.fromkeys(("gate", "up"), model.mlp_dim / mesh.tensor)
        width = 0 if "layer_input" in remat.offload else width
        width += sum(widths.get(name, 0) for name in remat.save)
    elif policy != "full":
        width += (2 * model.embed_dim + model.mlp_dim) / mesh.tensor
    item = 2 if model.compute_dtype == "bfloat16" else 4
    return model.num_layers * device_tokens(cfg) * width * item


def readable(count: float) -> str:
    """Return a readable size, `1.5 GiB`; infinity is an unknown amount."""
    if count == math.inf:
        return "an unknown amount"
    power = min(int(math.log2(max(count, 1)) // 10), len(UNITS) - 1)
    number = count / 1024**power
    return f"{number:.3g} {UNITS[power]}" if number < 1000 else f"{number:.0f} {UNITS[power]}"


def read_number(path: Path) -> float:
    """Return the number in a file of the kernel; infinity without one."""
    try:
        return float(path.read_text())
    except (OSError, ValueError):  # "max" is no limit
        return math.inf


def group_bytes(swap: float, root: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the memory that this process's control groups allow, with `swap` bytes of swap."""
    limits = [math.inf]
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        return math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        # Version 1 has a hierarchy for each controller, version 2 one for all, without a name.
        base = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "") if controllers else ("memory.max", "memory.swap.max")
        for group in (Path(path), *Path(path).parents):
            folder = base / str(group).lstrip("/")
            more = min(swap, read_number(folder / names[1]))
            limits.append(read_number(folder / names[0]) + more)
    return min(limits)


def host_bytes() -> float:
    """Return the memory available to this process: its own, the free memory, and swap.

    The limits of its control groups and its own (`ulimit -v`) apply. If the free memory is
    unknown, all of the machine's counts.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    try:
        rows = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        known = {name: int(number) * 1024 for name, number, *_ in rows}
        held = int(Path("/proc/self/statm").read_text().split()[1]) * page
        free = known["MemAvailable:"] + known["SwapFree:"] + held
        free = min(free, group_bytes(known["SwapTotal:"]))
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * page
    return free if own == resource.RLIM_INFINITY else min(free, own)


def device_bytes(mesh: Mesh) -> float:
    """Return the memory of one device of the mesh; CPU devices share that of their host."""
    device = mesh.local_devices[0]
    if device.platform == "cpu":
        return host_bytes() / len(mesh.local_devices)
    return (device.memory_stats() or {}).get("bytes_limit", math.inf)


def check(what: str, parts: Mapping[str, float], mesh: Mesh, lower: Callable[[], str]) -> None:
    """Raise MemoryExceeded where the parts, in bytes of one device, are more than it has.

    `lower` returns advice for the message; it is only called then.
    """
    available, total = device_bytes(mesh), sum(parts.values())
    if total > available:
        each = ", ".join(f"{name} {readable(size)}" for name, size in parts.items() if size)
        raise MemoryExceeded(
            f"{what} needs at least {readable(total)} on each device, but {owner(mesh)} has "
            f"{readable(available)} ({each}). {lower()}"
        )


def owner(mesh: Mesh) -> str:
    """Return a name for the owner of the memory."""
    device, count = mesh.local_devices[0], len(mesh.local_devices)
    if device.platform != "cpu":
        return device.device_kind
    return "this machine" if count == 1 else f"this machine, divided by {count} CPU devices,"


def check_state(
    cfg: JobConfig, mesh: Mesh, state: TrainState, frozen: Params, copies: int = 1
) -> None:
    """Raise MemoryExceeded where a device can't hold the state of a step and its batch.

    `state` and `frozen` are abstract: the TrainState and the parameters that don't train. There
    are `copies` of them on a device.
    """
    memory = state_memory(cfg, state, frozen, abstract_batch(cfg, mesh), math.inf)
    parts = {
        "parameters": copies * memory.parameters,
        "optimizer state": copies * memory.optimizer,
        "gradients": copies * memory.gradients,
        "batch": copies * memory.batch,
    }
    many = f" of {copies} trials on each device (by --width)" if copies > 1 else ""
    check(f"a training step{many}", parts, mesh, lambda: suggestions(cfg, mesh, whole=False))


def check_model(what: str, cfg: ModelConfig, mesh: Mesh, cache: int, lower: str) -> None:
    """Raise MemoryExceeded where a device can't hold the parameters and `cache` bytes of keys."""
    params = shard_bytes(checkpoint.abstract_params(cfg, mesh))
    check(what, {"parameters": params, "cache": cache}, mesh, lambda: lower)


def check_evaluation(cfg: Config, mesh: Mesh, held: Mapping[str, PyTree]) -> None:
    """Raise MemoryExceeded where a device or this host can't hold an evaluation's batch.

    The device also holds the abstract trees `held`, which the message calls by their names.
    """
    batch = abstract_batch(cfg, mesh, cfg.eval.batch_size)
    parts = {name: shard_bytes(tree) for name, tree in held.items()}
    parts["evaluation batch"] = shard_bytes(batch)
    check("the evaluation", parts, mesh, lambda: EVALUATION_ADVICE)
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
    # Every host reads the rows of its own devices; more where others have the same rows.
    own = whole * len(mesh.local_devices) / mesh.size
    if own > (available := host_bytes()):
        raise MemoryExceeded(
            f"the evaluation needs at least {readable(own)} for its batch before it is on the "
            f"devices, but this machine has {readable(available)}. {EVALUATION_ADVICE}"
        )


def cache_bytes(cfg: ModelConfig, rows: int, length: int) -> int:
    """Return the bytes of the keys and values of `length` tokens in `rows` rows."""
    item = jnp.dtype(cfg.compute_dtype).itemsize
    return 2 * cfg.num_layers * rows * cfg.num_kv_heads * length * cfg.head_dim * item


def checked(program: Callable, mesh: Mesh, what: str, lower: Callable[[], str]) -> Callable:
    """Wrap a jitted program(state, batch, ...): on a CPU, compare its memory before it runs.

    `lower` returns advice for the error. Compiling ahead costs nothing: the call reuses the
    program.
    """
    seen: set[tuple] = set()

    @functools.wraps(program)
    def run(state: PyTree, batch: PyTree, *rest: PyTree, **named: PyTree) -> PyTree:
        key = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        if key not in seen and mesh.local_devices[0].platform == "cpu":
            stats = program.lower(state, batch, *rest, **named).compile().memory_analysis()
            kept = stats.output_size_in_bytes - stats.alias_size_in_bytes
            parts = {"arguments": stats.argument_size_in_bytes, "results": kept}
            parts["temporaries"] = stats.temp_size_in_bytes
            check(what, parts, mesh, lower)
        seen.add(key)
        return program(state, batch, *rest, **named)

    return run


@contextmanager
def explained(what: str, mesh: Mesh, lower: Callable[[], str]) -> Iterator[None]:
    """Turn the out-of-memory errors of devices and hosts into MemoryExceeded."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and not EXHAUSTED.search(str(error)):
            raise
        asked = re.search(r"allocat\w* ([\d.]+ ?[KMGT]?i?B|\d+ bytes)", str(error))
        wanted = f" and asked for {asked[1]} more" if asked else ""
        raise MemoryExceeded(
            f"{what} ran out of memory{wanted}; {owner(mesh)} has {readable(device_bytes(mesh))}. "
            f"{lower()}"
        ) from error


def training_explained(cfg: JobConfig, mesh: Mesh) -> AbstractContextManager[None]:
    """Return the context that explains where training runs out of memory."""
    return explained("training", mesh, functools.partial(suggestions, cfg, mesh))


def suggestions(cfg: JobConfig, mesh: Mesh, whole: bool = True) -> str:
    """Return the sentence that names the changes of one field which lower a step's memory most.

    Savings are exact for state and batch; those of the `whole` step estimate activations too.
    """
    cfg = with_fields(cfg, {f"mesh.{axis}": size for axis, size in mesh.shape.items()})
    devices = list(mesh.devices.flat)
    now, found = step_bytes(cfg, devices, whole), []
    for change in smaller_configs(cfg):
        try:
            saved = now - step_bytes(with_fields(cfg, change), devices, whole)
        except ConfigError:
            continue  # something is no longer divisible
        if saved > 0:
            text = " ".join(f"{name}={value}" for name, value in change.items())
            rank = saved * (2 if text.startswith(HARMLESS) else 1)
            found.append((rank, saved, f"{text} (about {readable(saved)} less)"))
    best = sorted(sorted(found)[-SUGGESTED:], key=lambda one: -one[1])
    if not best:
        return "Use a device with more memory, or more devices"
    return "To use less memory, set " + ", ".join(text for *_, text in best)


def step_bytes(cfg: JobConfig, devices: list[Any], whole: bool) -> float:
    """Return the bytes of state and batch on each device; roughly of all a step, if `whole`.

    Raises ConfigError.
    """
    mesh = sharding.make_mesh(cfg.mesh.given(), devices)
    with jax.set_mesh(mesh):
        step = make_step(cfg, mesh)
    batch = abstract_batch(cfg, mesh)
    exact = state_memory(cfg, step.abstract, step.frozen, batch, math.inf).total
    if not whole:
        return exact
    logits = device_tokens(cfg) / cfg.train.loss_chunks * cfg.model.vocab_size / cfg.mesh.tensor
    return exact + kept_activations(cfg, cfg.model.remat) + 4 * logits


def smaller_configs(cfg: Config) -> Iterator[dict[str, Any]]:
    """Yield changes that need less memory; some may be invalid."""
    model, train, mesh = cfg.model, cfg.train, cfg.mesh
    if mesh.data > 1:
        yield {"mesh.fsdp": mesh.fsdp * mesh.data, "mesh.data": 1}
    yield {"train.accumulation_steps": train.accumulation_steps * 2}
    yield {"train.loss_chunks": train.loss_chunks * 4}
    yield {"train.batch_size": train.batch_size // 2}
    yield {"model.seq_len": model.seq_len // 2}
    yield {"model.num_layers": model.num_layers // 2}
    yield {"model.embed_dim": model.embed_dim // 2 // model.num_heads * model.num_heads}
    if model.remat != "full":
        yield {"model.remat": "full"}
    if model.param_dtype != "bfloat16":
        yield {"model.param_dtype": "bfloat16"}
    if model.compute_dtype != "bfloat16":
        yield {"model.compute_dtype": "bfloat16"}
    if cfg.optim.ema_decay:
        yield {"optim.ema_decay": 0.0}
    yield {"optim.optimizer": "adafactor"}
