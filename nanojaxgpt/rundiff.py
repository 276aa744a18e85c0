"""In: two run directories. Out: what differs between them, ready for JSON.

Of two checkpoints only the arrays with different fingerprints are read, one pair at a time.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanojaxgpt import config
from nanojaxgpt.console import LIBRARY_ERRORS, warn
from nanojaxgpt.errors import CheckpointError
from nanojaxgpt.metrics import read_metrics
from nanojaxgpt.rundir import load_run, read_identity, saved_steps

if TYPE_CHECKING:
    import numpy as np

IDENTITY = ("code", "packages", "python", "devices", "data")  # of identity.json
LOSSES = ("loss", "validation_loss")  # of metrics.jsonl
CHECKED = ("config", *LOSSES, "checkpoint")  # what makes two runs different for --check
CHUNK = 1 << 24  # elements that are subtracted at a time

Section = dict[str, Any]  # "problem": why it can't be compared, or ""; "differing"; details


def compare_runs(runs: Sequence[Path], step: int = 0) -> dict[str, Any]:
    """Return {section: what differs} for config, identity, losses and checkpoints of two runs.

    `step` names the checkpoints to compare; 0: the newest that both runs have. Raises ConfigError
    where one is not a run directory, CheckpointError where one has no checkpoint of `step`.
    """
    left, right = (dict(config.fields(load_run(run))) for run in runs)
    return {
        "runs": [str(run) for run in runs],
        "config": {"problem": "", "differing": unequal(left, right)},
        **compare_identities(runs),
        **compare_losses(runs),
        "checkpoint": compare_checkpoints(runs, step),
    }


def differing(found: dict[str, Any]) -> list[str]:
    """Return which of the sections in CHECKED differ or can't be compared."""
    return [name for name in CHECKED if found[name]["problem"] or found[name]["differing"]]


def unequal(left: dict[str, Any], right: dict[str, Any]) -> dict[str, list[Any]]:
    """Return {name: [left value, right value]} where they differ; None stands for a missing one."""
    names = [*left, *(name for name in right if name not in left)]
    pairs = {name: [left.get(name), right.get(name)] for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def flatten(value: Any, name: str) -> dict[str, Any]:
    """Return the leaves of nested objects by their paths, "data.parts.0.tokens"."""
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        children = list(enumerate(value))
    else:
        return {name: value}
    return {k: v for key, child in children for k, v in flatten(child, f"{name}.{key}").items()}


def compare_identities(runs: Sequence[Path]) -> dict[str, Section]:
    """Return a section for each entry of identity.json."""
    subject = "its code, packages, devices and data"
    left, right = (read_identity(run, subject, warn) for run in runs)
    missing = [str(run) for run, one in zip(runs, (left, right), strict=True) if not one]
    problem = f"no readable identity.json in {' and '.join(missing)}" if missing else ""
    sections = {}
    for name in IDENTITY:
        pair = (flatten(one.get(name), name) for one in (left, right))
        sections[name] = {"problem": problem, "differing": {} if problem else unequal(*pair)}
    return sections


def compare_losses(runs: Sequence[Path]) -> dict[str, Section]:
    """Return a section for each loss: how many steps differ, and the first of them."""
    left, right = (read_metrics(run, warn) for run in runs)
    sections = {}
    for name in LOSSES:
        a, b = ({r["step"]: r[name] for r in records if name in r} for records in (left, right))
        common = sorted(a.keys() & b.keys())
        steps = [step for step in common if not same_number(a[step], b[step])]
        section: Section = {"problem": "", "differing": len(steps), "common": len(common)}
        section["logged"] = [len(a), len(b)]
        if (a or b) and not common:
            section["problem"] = f"no step in common: {len(a)} logged in A, {len(b)} in B"
        if steps:
            first = steps[0]
            section["first"] = {
                "step": first, "values": [a[first], b[first]], "difference": b[first] - a[first],
            }  # fmt: skip
        sections[name] = section
    return sections


def same_number(left: float, right: float) -> bool:
    """Return whether two numbers are equal, or both not a number."""
    return left == right or (math.isnan(left) and math.isnan(right))


def compare_checkpoints(runs: Sequence[Path], step: int) -> Section:
    """Return how many arrays differ, and by how much each: parameters first. Imports jax."""
    folders = [Path(run) / "checkpoints" for run in runs]
    steps = [saved_steps(folder) for folder in folders]
    for folder, saved in zip(folders, steps, strict=True):
        if step and step not in saved:
            raise CheckpointError(f"no checkpoint of step {step} in {folder}; available: {saved}")
    common = set(steps[0]) & set(steps[1])
    chosen = step or max(common, default=None)
    section: Section = {"problem": "", "step": chosen, "arrays": 0, "differing": []}
    if not common:
        if any(steps):
            section["problem"] = f"no step in common: A has {steps[0]}, B has {steps[1]}"
        return section
    try:
        return section | compare_arrays([folder.absolute() / str(chosen) for folder in folders])
    except Exception as error:  # Orbax raises many kinds for damaged files
        LIBRARY_ERRORS.lines.clear()  # they were about this
        return section | {"problem": f"unusable: {str(error).strip().split(chr(10))[0][:300]}"}


def compare_arrays(paths: Sequence[Path]) -> Section:
    """Return how many arrays two checkpoints have, and those that differ. Reads only the latter.

    "largest" is the largest absolute difference, None where dtype, shape or the array itself
    differ ("kinds"). Raises what Orbax raises.
    """
    from nanojaxgpt.checkpoint import LeafReader, read_leaves

    left, right = (read_leaves(path, {}) for path in paths)
    names = sorted({**left, **right}, key=lambda name: not name.startswith("params/"))
    readers, found = [LeafReader(path) for path in paths], []
    for name in names:
        a, b = left.get(name, []), right.get(name, [])
        if a == b:
            continue
        largest = None
        if a[:2] == b[:2]:
            largest = largest_difference(*(reader.read(name) for reader in readers))
        found.append({"array": name, "kinds": [a[:2], b[:2]], "largest": largest})
    return {"arrays": len(names), "differing": found}


def largest_difference(left: "np.ndarray", right: "np.ndarray") -> float:
    """Return the largest |left - right| of two arrays of a shape; NaN where only one is NaN."""
    import numpy as np

    wide = np.float32 if left.dtype.itemsize < 4 else np.float64
    left, right, largest = left.reshape(-1), right.reshape(-1), 0.0
    for at in range(0, left.size, CHUNK):
        a, b = (array[at : at + CHUNK].astype(wide) for array in (left, right))
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore"):
            largest = max(largest, float(np.where(same, 0, np.abs(a - b)).max()), key=nan_last)
    return largest


def nan_last(number: float) -> tuple[bool, float]:
    """Return the key that sorts NaN above every number."""
    return math.isnan(number), number
