"""In: a sweep's trials and folder. Out: what came of each trial, and of each point over seeds."""

import math
import statistics
from pathlib import Path
from typing import NamedTuple

from nanojaxgpt import metrics
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.names import unknown_name
from nanojaxgpt.sweep.claims import read_outcome, run_path
from nanojaxgpt.sweep.plan import SEED, Trial


class TrialResult(NamedTuple):
    """What came of one trial; `value` is the metric's last number, NaN where there is none."""

    trial: Trial
    state: str
    seconds: float
    value: float
    curve: list[tuple[int, float]]


class Group(NamedTuple):
    """The trials of one point that differ by their seed alone."""

    results: list[TrialResult]
    mean: float
    spread: float  # sample standard deviation; 0 for one seed


def read_results(folder: Path, trials: list[Trial], metric: str) -> list[TrialResult]:
    """Return the result of every trial that has ended.

    Raises ConfigError where none has ended, or where none ever logged the metric.
    """
    outcomes = [(trial, read_outcome(folder, trial.name)) for trial in trials]
    ended = [(trial, outcome) for trial, outcome in outcomes if outcome]
    if not ended:
        raise ConfigError(f"no trial in {folder} has ended yet; nanojaxgpt sweep run runs them")
    runs = [run_path(folder, trial.name) for trial, _ in ended]
    results = []
    for (trial, outcome), curve in zip(ended, read_curves(runs, metric), strict=True):
        finite = outcome["state"] == "finished" and curve
        value = curve[-1][1] if finite else math.nan
        results.append(TrialResult(trial, outcome["state"], outcome["seconds"], value, curve))
    return results


def read_curves(runs: list[Path], metric: str) -> list[list[tuple[int, float]]]:
    """Return the metric by step of every run. Raises ConfigError where none ever logged it."""
    records = [metrics.read_metrics(run) for run in runs]
    curves = [[(r["step"], r[metric]) for r in own if metric in r] for own in records]
    if not any(curves):
        names = sorted({name for own in records for record in own for name in record} - {"step"})
        raise ConfigError(
            f"{unknown_name('metric', metric, names)}; the trials logged {', '.join(names)}"
            " (validation_loss needs data that is held out)"
        )
    return curves


def group_seeds(results: list[TrialResult], maximize: bool) -> list[Group]:
    """Return the groups of results that differ by their seed alone, the best first.

    A group with a trial that is not finite has no mean, and comes last.
    """
    found: dict[str, list[TrialResult]] = {}
    for result in results:
        rest = {field: v for field, v in result.trial.point.items() if field != SEED}
        found.setdefault(repr(sorted(rest.items())), []).append(result)
    groups = []
    for members in found.values():
        values = [member.value for member in members]
        spread = statistics.stdev(values) if len(values) > 1 and all_finite(values) else 0.0
        groups.append(Group(members, statistics.fmean(values), spread))
    sign = -1 if maximize else 1
    return sorted(groups, key=lambda g: sign * g.mean if math.isfinite(g.mean) else math.inf)


def all_finite(values: list[float]) -> bool:
    """Return whether all are numbers."""
    return all(map(math.isfinite, values))
