"""In: a sweep's trials and folder. Out: how they stand, a table, the best config, plots."""

import collections
import csv
import itertools
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from nanojaxgpt import config, console, metrics
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.rundir import write_text
from nanojaxgpt.sweep.claims import is_running, read_outcome, run_path
from nanojaxgpt.sweep.plan import SEED, Trial, count, show_point, swept_fields

# Two samples differ at 5 % (two-sided) with a power of 80 %: normal quantiles 0.975 and 0.8.
QUANTILES = 1.959964 + 0.841621
MOST_HEAT_MAPS = 6  # every pair of four fields
MOST_TICKS = 8  # values of a field that have a tick of their own


class Result(NamedTuple):
    """What came of one trial; `value` is the metric's last number, NaN where there is none."""

    trial: Trial
    state: str
    seconds: float
    value: float
    curve: list[tuple[int, float]]


class Group(NamedTuple):
    """The trials of one point that differ by their seed alone."""

    results: list[Result]
    mean: float
    spread: float  # sample standard deviation; 0 for one seed


def status_lines(folder: Path, trials: list[Trial]) -> list[str]:
    """Return how each trial stands, and a first line that counts them."""
    states, lines = [], []
    for trial in trials:
        state = read_outcome(folder, trial.name).get("state", "")
        records = [] if state else metrics.read_metrics(run_path(folder, trial.name))
        if not state:
            running = is_running(folder, trial.name)
            state = "running" if running else "stopped" if records else "missing"
        states.append(state)
        step = f" at step {records[-1]['step']}/{trial.cfg.train.num_steps}" if records else ""
        lines.append(f"{trial.name}  {state}{step}  {show_point(trial.point)}")
    return [f"{count(len(trials), 'trial')}: {count_states(states)}", *lines]


def count_states(states: Iterable[str]) -> str:
    """Return `3 finished, 1 pruned`."""
    counts = collections.Counter(states)
    return ", ".join(f"{number} {state}" for state, number in counts.items()) or "none yet"


def read_results(folder: Path, trials: list[Trial], metric: str) -> list[Result]:
    """Return what came of every trial that has ended.

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
        results.append(Result(trial, outcome["state"], outcome["seconds"], value, curve))
    return results


def read_curves(runs: list[Path], metric: str) -> list[list[tuple[int, float]]]:
    """Return the metric by step of every run. Raises ConfigError where none ever logged it."""
    records = [metrics.read_metrics(run) for run in runs]
    curves = [[(r["step"], r[metric]) for r in own if metric in r] for own in records]
    if not any(curves):
        names = sorted({name for own in records for record in own for name in record} - {"step"})
        raise ConfigError(
            f"{config.unknown_name('metric', metric, names)}; the trials logged {', '.join(names)}"
            " (validation_loss needs data that is held out)"
        )
    return curves


def group_seeds(results: list[Result], maximize: bool) -> list[Group]:
    """Return the groups of results that differ by their seed alone, the best first.

    A group with a trial that is not finite has no mean, and comes last.
    """
    found: dict[str, list[Result]] = {}
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


def seeds_needed(first: Group, second: Group) -> int:
    """Return how many seeds each of two points needs for their difference to show; 0: unknown.

    The two-sample formula 2 (z s / d)^2 with the pooled spread s and the difference d of the means,
    at 5 % and a power of 80 %, normal approximation; at least 2.
    """
    parts = [(len(g.results) - 1, g.spread) for g in (first, second) if len(g.results) > 1]
    difference = abs(first.mean - second.mean)
    if not parts or not difference or not math.isfinite(difference):
        return 0
    variance = sum(n * s**2 for n, s in parts) / sum(n for n, _ in parts)
    return max(2, math.ceil(2 * QUANTILES**2 * variance / difference**2))


def write_report(folder: Path, trials: list[Trial], metric: str, maximize: bool) -> list[str]:
    """Write FOLDER/report/; return the text of it in lines. Raises ConfigError.

    trials.csv, report.txt, best.py (an experiment file), curves.png, and a plot for each swept
    field and each pair of them.
    """
    results = read_results(folder, trials, metric)
    groups = group_seeds(results, maximize)
    target = folder / "report"
    target.mkdir(exist_ok=True)
    fields = swept_fields(trials)
    write_csv(target / "trials.csv", results, metric)
    lines = summary(trials, results, groups, metric)
    if math.isfinite(groups[0].mean):
        best = min(groups[0].results, key=lambda r: (-1 if maximize else 1) * r.value).trial
        write_text(target / "best.py", experiment_text(best.cfg, f"{show_point(best.point)}"))
        lines += ["", f"best: {target}/best.py, the config of {run_path(folder, best.name)}"]
    write_text(target / "report.txt", "\n".join(lines) + "\n")
    plot_curves(target / "curves.png", results, metric)
    for field in fields:
        plot_field(target / f"{field}.png", results, field, metric)
    pairs = list(itertools.combinations([f for f in fields if f != SEED], 2))
    for first, second in pairs[:MOST_HEAT_MAPS]:
        plot_pair(target / f"{first}-{second}.png", groups, (first, second), metric)
    return lines


def summary(
    trials: list[Trial], results: list[Result], groups: list[Group], metric: str
) -> list[str]:
    """Return the table of the points, the best first, and what the seeds say about the best."""
    seeds = max(len(group.results) for group in groups)
    rows = [(metric, "spread", "seeds", "state", "point")]
    for group in groups:
        states = {result.state for result in group.results}
        point = {k: v for k, v in group.results[0].trial.point.items() if k != SEED or seeds == 1}
        spread = f"{group.spread:.4f}" if len(group.results) > 1 else "-"
        mean = "-" if states == {"pruned"} else f"{group.mean:.4f}"
        row = (mean, spread, str(len(group.results)), ", ".join(sorted(states)))
        rows.append((*row, show_point(point)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{len(results)} of {count(len(trials), 'trial')} ended: "
        f"{count_states(result.state for result in results)}; "
        f"{console.duration(sum(result.seconds for result in results))} of training",
        "",
    ]
    for row in rows:
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(cell.ljust(width) for cell, width in cells).rstrip())
    if len(groups) > 1 and seeds > 1:
        first, second = groups[:2]
        needed = seeds_needed(first, second)
        verdict = f"about {needed} seeds each" if needed else "no number of seeds can be told"
        lines += [
            "",
            f"The first two differ by {abs(first.mean - second.mean):.4f}; for that to show at 5 % "
            f"with a power of 80 %: {verdict}.",
        ]
    return lines


def write_csv(path: Path, results: list[Result], metric: str) -> None:
    """Write a row per trial: name, state, seconds, the metric, and every field of the points."""
    fields = list(dict.fromkeys(field for r in results for field in r.trial.point))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", "seconds", metric, *fields])
        for result in results:
            values = dict(config.fields(result.trial.cfg))
            row = [result.trial.name, result.state, result.seconds, result.value]
            writer.writerow([*row, *[values[field] for field in fields]])


def experiment_text(cfg: ConfigDict, about: str) -> str:
    """Return an experiment file that gives `cfg`, by its differences to base_config()."""
    changes = config.differences(config.base_config(), cfg)
    body = "".join(f"    cfg.{name} = {value!r}\n" for name, _, value in changes)
    return (
        f'"""The best of a sweep: {about}."""\n\n'
        "from ml_collections import ConfigDict\n\n"
        "from nanojaxgpt.config import base_config\n\n\n"
        "def get_config() -> ConfigDict:\n"
        '    """Return the config."""\n'
        f"    cfg = base_config()\n{body}    return cfg\n"
    )


def short(field: str) -> str:
    """Return the last part of a field's name."""
    return field.split(".")[-1]


def numbers_of(values: list[Any]) -> bool:
    """Return whether all values are numbers, so that they have places on an axis."""
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def scale_of(values: list[Any]) -> str:
    """Return `log` for positive numbers over a decade or more (or 8 to 1), else `linear`."""
    spans = numbers_of(values) and min(values) > 0 and max(values) >= 8 * min(values)
    return "log" if spans else "linear"


def plot_curves(path: Path, results: list[Result], metric: str) -> None:
    """Write the metric of every trial against the step as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for result in results:
        points = [point for point in result.curve if math.isfinite(point[1])]
        if points:
            style = {"marker": "o", "markersize": 3, "linewidth": 1, "alpha": 0.8}
            axes.plot(*zip(*points, strict=True), label=show_point(result.trial.point), **style)
    axes.set(xlabel="step", ylabel=metric)
    axes.grid(alpha=0.3)
    if 0 < len(axes.lines) <= 12:
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def plot_field(path: Path, results: list[Result], field: str, metric: str) -> None:
    """Write the metric against one swept field as a PNG, a dot per finite trial."""
    from matplotlib.figure import Figure

    points = [(r.trial.point[field], r.value) for r in results if field in r.trial.point]
    points = [(value, found) for value, found in points if math.isfinite(found)]
    values = [value for value, _ in points]
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    axes = figure.subplots()
    if points:
        places = values if numbers_of(values) else [str(value) for value in values]
        axes.plot(places, [found for _, found in points], "o", alpha=0.7)
        if numbers_of(values):
            axes.set_xscale(scale_of(values))
        if numbers_of(values) and len(set(values)) <= MOST_TICKS:
            axes.set_xticks(sorted(set(values)), [f"{value:g}" for value in sorted(set(values))])
            axes.minorticks_off()
    axes.set(xlabel=field, ylabel=metric)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot_pair(path: Path, groups: list[Group], pair: tuple[str, str], metric: str) -> None:
    """Write a heat map of the best mean over two fields as a PNG; dots where there is no grid."""
    from matplotlib.figure import Figure

    cells: dict[tuple, float] = {}
    for group in groups:  # the best come first
        point = group.results[0].trial.point
        if set(pair) <= point.keys() and math.isfinite(group.mean):
            cells.setdefault((point[pair[0]], point[pair[1]]), group.mean)
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=pair[0], ylabel=pair[1])
    columns, rows = [sorted({key[i] for key in cells}, key=ordered) for i in (0, 1)]
    if cells and len(columns) * len(rows) <= 2 * len(cells):
        heat = [[cells.get((column, row), math.nan) for column in columns] for row in rows]
        image = axes.imshow(heat, origin="lower", aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(columns)), [str(value) for value in columns])
        axes.set_yticks(range(len(rows)), [str(value) for value in rows])
        middle = (min(cells.values()) + max(cells.values())) / 2
        for (column, row), value in cells.items():
            at, color = (columns.index(column), rows.index(row)), "wk"[value > middle]
            axes.text(*at, f"{value:.3f}", ha="center", va="center", color=color, fontsize=8)
        figure.colorbar(image, label=metric)
    elif cells:
        sides = [[key[i] for key in cells] for i in (0, 1)]
        places = [side if numbers_of(side) else [str(value) for value in side] for side in sides]
        dots = axes.scatter(*places, c=list(cells.values()), cmap="viridis")
        axes.set(xscale=scale_of(sides[0]), yscale=scale_of(sides[1]))
        figure.colorbar(dots, label=metric)
    figure.savefig(path, dpi=120)


def ordered(value: Any) -> tuple:
    """Return a key that sorts numbers before names."""
    return (0, value, "") if numbers_of([value]) else (1, 0, str(value))
