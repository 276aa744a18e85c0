"""Where the parameters beside the adapters are: the run or model that a run started from.

A run with adapters saves what trains alone. Its identity.json names the base and holds a hash of
it, so that another one is never taken for it.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from nanojaxgpt import checkpoint, config, rundir, sharding
from nanojaxgpt.config.sections import Config
from nanojaxgpt.errors import CheckpointError, ConfigError, why
from nanojaxgpt.hosts.team import ALONE, Team
from nanojaxgpt.interchange.loading import read_params
from nanojaxgpt.interchange.opening import config_of, find_model
from nanojaxgpt.interchange.pretrained import Pretrained
from nanojaxgpt.model.config import JobConfig, ModelConfig, complete
from nanojaxgpt.model.lora import add_adapters, merge_adapters
from nanojaxgpt.model.parameters import Params, parameters
from nanojaxgpt.model.quantize import dequantize_base, quantize_base, with_int8_rows
from nanojaxgpt.trainable import merge_params, split_job_params

EDGE = 2**16  # bytes at each end of a file that are hashed


class Bases:
    """The arrays of models that were loaded, so that those of one base are shared.

    An origin says what was read: a hash of it, where it is, and how its kernels were rounded.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], jax.Array] = {}

    def share(
        self, origin: tuple[str, Path, str], cfg: ModelConfig, mesh: Mesh,
        read: Callable[[], Params],
    ) -> Params:  # fmt: skip
        """Return the parameters of a model `cfg` from `origin`; they are read unless all are known.

        Known arrays are used in either case. Models whose vocabulary or context differs share
        those of equal shape.
        """
        leaves, tree = jax.tree_util.tree_flatten_with_path(checkpoint.abstract_params(cfg, mesh))
        keys = [
            (origin, checkpoint.path_name(path), leaf.shape, leaf.dtype, leaf.sharding)
            for path, leaf in leaves
        ]
        if not all(key in self._known for key in keys):
            for key, array in zip(keys, tree.flatten_up_to(read()), strict=True):
                self._known.setdefault(key, array)
        return tree.unflatten([self._known[key] for key in keys])


def read_start(
    cfg: Config, mesh: Mesh, step: int, report: Callable[[str], None], team: Team = ALONE
) -> tuple[str, Params]:
    """Return (where they are from, the parameters) of init.from_model or a step of init.from_run.

    They have no adapters, and the head for labels that they have there.
    """
    source, shape = start_source(cfg)
    return load_source(source, shape, mesh, step, report, team)


def start_source(cfg: Config) -> tuple[Path | Pretrained, ModelConfig]:
    """Return init.from_run or the opened init.from_model, and the model's shape there."""
    name = cfg.init.from_model
    source = find_model(name) if name else Path(cfg.init.from_run)
    labels = config_of(source).model.num_labels
    return source, dataclasses.replace(complete(cfg).model.bare, num_labels=labels)


def load_source(
    source: Path | Pretrained,
    cfg: ModelConfig,
    mesh: Mesh,
    step: int,
    report: Callable[[str], None],
    team: Team = ALONE,
) -> tuple[str, Params]:
    """Return (where they are from, the parameters) of a run or of another opened model."""
    if isinstance(source, Path):
        step, params = load_run_params(source, cfg, mesh, step, report, team)
        return f"{source}, step {step}", params
    return str(source.origin), read_params(source, cfg, mesh)


def load_pretrained(
    source: Pretrained, cfg: ModelConfig, mesh: Mesh, bases: Bases | None
) -> Params:
    """Return the parameters of an opened model, shared by `bases`."""
    if bases is None:
        return read_params(source, cfg, mesh)
    origin = hash_model(source.origin), source.origin.resolve(), ""
    return bases.share(origin, cfg, mesh, lambda: read_params(source, cfg, mesh))


def load_run_params(
    run: Path,
    cfg: ModelConfig,
    mesh: Mesh,
    step: int = 0,
    report: Callable[[str], None] = print,
    team: Team = ALONE,
    bases: Bases | None = None,
) -> tuple[int, Params]:
    """Return (step, parameters) of a run as checkpoint.load_params does, of one with adapters too.

    These are merged where the model `cfg` has none. What others may have is shared by `bases`.
    Raises CheckpointError, ConfigError.
    """
    theirs = rundir.read_config(run)
    if not theirs.lora.rank:
        step, params = checkpoint.load_params(run, cfg, mesh, step, report, team)
        if bases is not None:
            origin = hash_saved(run, step), run.resolve(), ""
            params = bases.share(origin, cfg, mesh, lambda: params)
        return step, params
    shape = {f"model.{name}": value for name, value in cfg.given().items()}
    job = complete(config.with_fields(theirs, shape))
    abstract = checkpoint.abstract_params(job.model, mesh)
    abstract, _ = split_job_params(abstract, job)
    found = checkpoint.restore(run / "checkpoints", {"params": abstract}, step, report, team)
    if found is None:
        raise CheckpointError(f"{run} has no checkpoint yet")
    step, items = found
    whole = rounded_base(job, run, mesh, report, team, Bases() if bases is None else bases)
    params = merge_params(items["params"], split_job_params(whole, job)[1])
    return step, params if cfg.lora.rank else merge_adapters(job.model, params)


def rounded_base(
    cfg: JobConfig, run: Path, mesh: Mesh, report: Callable[[str], None], team: Team, bases: Bases
) -> Params:
    """Return all parameters of the base of a run with adapters, rounded as lora.base_dtype says."""
    known = team.decide(lambda: base_identity(cfg, run))
    source, shape = start_source(cfg)
    where = source if isinstance(source, Path) else source.origin
    origin = known["hash"], where.resolve(), cfg.lora.base_dtype

    def read() -> Params:
        _, whole = load_source(source, shape, mesh, known["step"], report, team)
        if not cfg.lora.base_dtype:
            return whole
        whole = quantized(cfg.model, whole, mesh)
        return jax.jit(functools.partial(dequantize_base, cfg.model))(whole)

    return bases.share(origin, shape, mesh, read)


def frozen_base(
    cfg: JobConfig, run: Path, mesh: Mesh, report: Callable[[str], None], team: Team = ALONE
) -> Params:
    """Return the frozen parameters of a run with adapters. Raises what `base_identity` raises."""
    step = team.decide(lambda: base_identity(cfg, run))["step"]
    _, whole = read_start(cfg, mesh, step, report, team)
    return quantized(cfg.model, split_job_params(whole, cfg)[1], mesh)


def quantized(cfg: ModelConfig, frozen: Params, mesh: Mesh) -> Params:
    """Return parameters of a base on a mesh, with their kernels as lora.base_dtype says."""
    quantize, rows = functools.partial(quantize_base, cfg), with_int8_rows(parameters(cfg))
    layout = sharding.tree_shardings(jax.eval_shape(quantize, frozen), rows, mesh)
    return jax.jit(quantize, out_shardings=layout)(frozen)


def place_adapters(cfg: ModelConfig, params: Params, rng: jax.Array, mesh: Mesh) -> Params:
    """Return the parameters on a mesh with new adapters."""
    made = jax.eval_shape(lambda: add_adapters(cfg, {name: {} for name in cfg.stacks}, rng))
    layout = sharding.tree_shardings(made, parameters(cfg), mesh)
    draw = jax.jit(lambda: add_adapters(cfg, {name: {} for name in cfg.stacks}, rng),
                   out_shardings=layout)  # fmt: skip
    return merge_params(params, draw())


def base_identity(cfg: Config, run: Path) -> dict[str, Any]:
    """Return path, step and hash of the base of a run with adapters.

    Raises ConfigError where it is missing, CheckpointError where it is not that of the run's
    identity.json.
    """
    init = cfg.init
    field, name = (
        ("from_model", init.from_model) if init.from_model else ("from_run", init.from_run)
    )
    old = rundir.read_identity(run, "the base").get("base", {})
    try:
        source = find_model(name) if init.from_model else Path(name)
        if isinstance(source, Path):
            step = init.step or old.get("step") or newest_step(source)
            digest = hash_saved(source, step)
        else:
            step, digest = 0, hash_model(source.origin)
    except (ConfigError, CheckpointError) as error:
        raise type(error)(f"init.{field}={name}, the base of {run}: {error}") from error
    found = dict(path=name, step=step, hash=digest)
    if old and old["hash"] != digest:
        raise CheckpointError(
            f"init.{field}={name} is not what {run} was trained on: its hash was {old['hash']}, "
            f"and is {digest} now; restore it, or choose another --run"
        )
    return found


def newest_step(run: Path) -> int:
    """Return the step of a run's newest checkpoint. Raises ConfigError, CheckpointError."""
    rundir.read_config(run)
    steps = rundir.saved_steps(run / "checkpoints")
    if not steps:
        raise CheckpointError(f"{run} has no checkpoint yet")
    return steps[-1]


def hash_saved(run: Path, step: int) -> str:
    """Return a hash of a checkpoint's parameters, by their fingerprints."""
    theirs = rundir.read_config(run)
    folder = run / "checkpoints" / str(step)
    try:
        leaves = checkpoint.saved_leaves(folder)
    except Exception as error:  # whatever Orbax raises
        raise CheckpointError(f"{folder} can't be read: {why(error, folder)}") from error
    params = {name: kind for name, kind in leaves.items() if name.startswith("params/")}
    below = base_identity(theirs, run)["hash"] if theirs.lora.rank else ""
    return hashlib.sha256(json.dumps([params, below], sort_keys=True).encode()).hexdigest()[:16]


def hash_model(origin: Path) -> str:
    """Return a hash of a model's files: their sizes, beginnings and ends."""
    digest = hashlib.sha256()
    kinds = ("config.json", "*.safetensors", "*.gguf")
    files = [origin] if origin.is_file() else [p for kind in kinds for p in origin.glob(kind)]
    for path in sorted(files):
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            for place in (0, max(0, size - EDGE)):
                file.seek(place)
                digest.update(file.read(EDGE))
        digest.update(f"{path.name} {size}".encode())
    return digest.hexdigest()[:16]
