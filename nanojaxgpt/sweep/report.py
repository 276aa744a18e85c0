"""In: a sweep's trials and folder. Out: how they stand, a table, the best config, plots."""

import collections
import csv
import itertools
import math
from collections.abc import Iterable
from pathlib import Path

from nanojaxgpt import config, console, metrics
from nanojaxgpt.config.sections import Config
from nanojaxgpt.extras import plots_advice
from nanojaxgpt.rundir import write_text
from nanojaxgpt.sweep.claims import is_running, read_outcome, run_path
from nanojaxgpt.sweep.plan import SEED, Trial, count, show_point, swept_fields
from nanojaxgpt.sweep.plots import plot_curves, plot_field, plot_pair
from nanojaxgpt.sweep.results import Group, TrialResult, group_seeds, read_results

# Two samples differ at 5 % (two-sided) with a power of 80 %: normal quantiles 0.975 and 0.8.
QUANTILES = 1.959964 + 0.841621
MOST_HEAT_MAPS = 6  # every pair of four fields


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
    field but the seed, and each pair of them; without matplotlib no plots, as the last line says.
    The best has the best mean over its seeds, and the
    first of them: the luckiest would promise too much.
    """
    results = read_results(folder, trials, metric)
    groups = group_seeds(results, maximize)
    target = folder / "report"
    target.mkdir(exist_ok=True)
    write_csv(target / "trials.csv", results, metric)
    lines = points_table(trials, results, groups, metric)
    if math.isfinite(groups[0].mean):
        best, seeds = groups[0].results[0].trial, count(len(groups[0].results), "seed")
        write_text(target / "best.py", experiment_text(best.cfg, show_point(best.point)))
        lines += [
            "",
            f"best: {target}/best.py, by the mean over {seeds}; the config of "
            f"{run_path(folder, best.name)}",
        ]
    write_text(target / "report.txt", "\n".join(lines) + "\n")
    for old in target.glob("*.png"):  # perhaps of a field that is no longer swept
        old.unlink()
    if missing := plots_advice():
        return [*lines, "", f"no plots: {missing}"]
    fields = [field for field in swept_fields(trials) if field != SEED]
    plot_curves(target / "curves.png", groups, fields, metric, maximize)
    for field in fields:
        plot_field(target / f"{field}.png", groups, field, fields, metric, maximize)
    for pair in list(itertools.combinations(fields, 2))[:MOST_HEAT_MAPS]:
        plot_pair(target / f"{'-'.join(pair)}.png", groups, pair, metric, maximize)
    return lines


def points_table(
    trials: list[Trial], results: list[TrialResult], groups: list[Group], metric: str
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
        verdict = (
            f"about {needed} seeds each" if needed else "the number of seeds can't be estimated"
        )
        lines += [
            "",
            f"The first two differ by {abs(first.mean - second.mean):.4f}; to detect that at the "
            f"5 % level with a power of 80 %: {verdict}.",
        ]
    return lines


def write_csv(path: Path, results: list[TrialResult], metric: str) -> None:
    """Write a row per trial: name, state, seconds, the metric, and every field of the points."""
    fields = list(dict.fromkeys(field for r in results for field in r.trial.point))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["trial", "state", "seconds", metric, *fields])
        for result in results:
            values = dict(config.fields(result.trial.cfg))
            row = [result.trial.name, result.state, result.seconds, result.value]
            writer.writerow([*row, *[values[field] for field in fields]])


def experiment_text(cfg: Config, about: str) -> str:
    """Return an experiment file that gives `cfg`, by its differences to base_config()."""
    changes = config.differences(Config(), cfg)
    body = "".join(f"    cfg.{name} = {value!r}\n" for name, _, value in changes)
    return (
        f'"""The best of a sweep: {about}."""\n\n'
        "from ml_collections import ConfigDict\n\n"
        "from nanojaxgpt.config import base_config\n\n\n"
        "def get_config() -> ConfigDict:\n"
        '    """Return the config."""\n'
        f"    cfg = base_config()\n{body}    return cfg\n"
    )
