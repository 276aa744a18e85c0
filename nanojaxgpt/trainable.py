"""Trainable and frozen parameters: the tree split by `optim.trainable`, and merged again.

With `optim.trainable_layers` a stack of layers is split as well: its first rows are frozen, its
last ones train, both under the same path.
"""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from nanojaxgpt.checks import compile_pattern
from nanojaxgpt.config.sections import Config
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.model.config import JobConfig
from nanojaxgpt.model.parameters import Params, PyTree, Table, row_of

# The branch of the frozen parameters that holds those of another model, which are never saved.
TEACHER = "teacher"
ADAPTERS = "_lora_"  # what the paths of all adapters have
HEAD = "label_CD"  # the path of the head for labels


def without_teacher(frozen: Params) -> Params:
    """Return the frozen parameters that are the model's own."""
    return {name: value for name, value in frozen.items() if name != TEACHER}


def trained_patterns(cfg: Config) -> tuple[str, ...]:
    """Return optim.trainable; if it is () and there are adapters, these and a head for labels."""
    if cfg.optim.trainable or not cfg.lora.rank:
        return cfg.optim.trainable
    return (ADAPTERS, HEAD) if cfg.model.num_labels else (ADAPTERS,)


def is_trainable(path: str, patterns: Sequence[str]) -> bool:
    """Return whether the parameter with this path trains.

    The first pattern found in the path decides: `PATTERN` trains, `!PATTERN` freezes. A path that
    no pattern matches is frozen; without patterns everything trains.
    """
    for pattern in patterns:
        if compile_pattern(pattern.removeprefix("!")).search(path):
            return not pattern.startswith("!")
    return not patterns


def frozen_rows(cfg: JobConfig) -> dict[str, int]:
    """Return how many of its first layers are frozen in each stack, by optim.trainable_layers."""
    below = frozen_layers(cfg)
    places = cfg.model.places[:below] if below else ()
    return {name: sum(stack == name for stack, _ in places) for name in cfg.model.stacks if below}


def frozen_layers(cfg: JobConfig) -> int:
    """Return how many of the first layers are frozen. Raises ConfigError."""
    count, layers = cfg.optim.trainable_layers, cfg.model.num_layers
    if count > layers:
        raise ConfigError(f"optim.trainable_layers={count}, but the model has {layers} layers")
    return layers - count if count else 0


def check_trainable(patterns: Sequence[str], table: Table) -> None:
    """Raise ConfigError if a pattern matches no path, or if nothing trains."""
    for pattern in patterns:
        if not any(map(compile_pattern(pattern.removeprefix("!")).search, table)):
            raise ConfigError(
                f"optim.trainable: {pattern!r} matches no parameter; the paths: {', '.join(table)}"
            )
    if not any(is_trainable(path, patterns) for path in table):
        raise ConfigError(f"optim.trainable={tuple(patterns)} leaves no parameter to train")
    for path, row in table.items():
        if row.kind == "adapter" and not is_trainable(path, patterns):
            raise ConfigError(
                f"optim.trainable={tuple(patterns)} freezes the adapter {path}: put {ADAPTERS!r} "
                "first, or set lora.rank=0"
            )


def split_job_params(params: Params, cfg: JobConfig) -> tuple[Params, Params]:
    """Split the parameters of a model into (trainable, frozen), as the config of its job says."""
    return split_params(params, trained_patterns(cfg), frozen_rows(cfg))


def split_params(
    params: Params, patterns: Sequence[str], rows: Mapping[str, int] = {}, prefix: str = ""
) -> tuple[Params, Params]:
    """Split a nested dict into (trainable, frozen), without empty branches.

    `rows` says how many of a stack's first rows are frozen, whatever the patterns say.
    """
    trainable, frozen = {}, {}
    for name, value in params.items():
        path, below = f"{prefix}{name}", rows.get(prefix.removesuffix("/"), 0)
        if isinstance(value, dict):
            parts = split_params(value, patterns, rows, f"{path}/")
        elif not is_trainable(path, patterns) or (below and below == value.shape[0]):
            parts = {}, value
        else:
            parts = (value[below:], value[:below]) if below else (value, {})
        for found, part in zip((trainable, frozen), parts, strict=True):
            if not (isinstance(part, dict) and not part):
                found[name] = part
    return trainable, frozen


def merge_params(trainable: Params, frozen: Params | None) -> Params:
    """Merge two nested dicts into one; the reverse of `split_params`."""
    merged = dict(trainable)
    for name, value in (frozen or {}).items():
        if name not in merged:
            merged[name] = value
        elif isinstance(value, dict):
            merged[name] = merge_params(merged[name], value)
        else:
            merged[name] = join_rows(value, merged[name])
    return merged


def join_rows(first: PyTree, last: PyTree) -> PyTree:
    """Return a stack of layers from its first and its last rows, arrays or abstract ones."""
    if not isinstance(first, jax.ShapeDtypeStruct):
        return jnp.concatenate([first, last])
    shape = (first.shape[0] + last.shape[0], *first.shape[1:])
    return jax.ShapeDtypeStruct(shape, first.dtype, sharding=first.sharding)


def split_lines(trainable: Params, opt_state: PyTree, table: Table) -> list[str]:
    """Return a table of the split: path, parameters, how many train, bytes of optimizer state."""
    held = dict.fromkeys(table, 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        row = row_of(jax.tree_util.keystr(path, simple=True, separator="/"), table)
        if row:
            held[row.path] += math.prod(leaf.shape) * leaf.dtype.itemsize
    rows: list[tuple[str, ...]] = [("path", "parameters", "trainable", "frozen", "bytes of state")]
    totals = [0, 0, 0, 0]
    for path, row in table.items():
        *parents, name = path.split("/")
        branch = trainable
        for parent in parents:
            branch = branch.get(parent, {})
        trains = math.prod(branch[name].shape) if name in branch else 0
        numbers = (row.size, trains, row.size - trains, held[path])
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        rows.append((path, *(f"{number:,}" for number in numbers)))
    rows.append(("all", *(f"{number:,}" for number in totals)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
