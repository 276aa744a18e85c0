"""In: a paper file and a folder. Out: its runs, and a report of published against measured."""

import functools
import importlib.metadata
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from nanojaxgpt import config, extras, metrics, rundir, sharding
from nanojaxgpt.adapters import load_run_params
from nanojaxgpt.data.loader import prepare_data, resolve
from nanojaxgpt.data.rows import Batch, Rows
from nanojaxgpt.errors import DataError, NonFiniteError
from nanojaxgpt.model.config import complete
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.papers.paper import FAIL, NOT_RUN, PASS, Arm, Claim, Paper, Plot, Run, Runs, verdict
from nanojaxgpt.recorder import Job
from nanojaxgpt.sweep.claims import read_outcome, run_path
from nanojaxgpt.sweep.plan import Trial, set_point, show_point
from nanojaxgpt.sweep.plots import draw_band, fit_axis, make_band
from nanojaxgpt.sweep.run import run_trials
from nanojaxgpt.trainable import merge_params
from nanojaxgpt.training import make_job

Report = Callable[[str], None]


class ClaimResult(NamedTuple):
    """What came out for a claim; `measured` is by seed, or by "" without arms."""

    claim: Claim
    measured: dict[int | str, float]
    verdict: str
    reason: str = ""  # of NOT-RUN

    @property
    def mean(self) -> float:
        """The mean over the seeds; NaN where nothing was measured."""
        return statistics.fmean(self.measured.values()) if self.measured else math.nan

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds, of a sample; NaN for fewer than two."""
        return statistics.stdev(self.measured.values()) if len(self.measured) > 1 else math.nan


class Reproduction(NamedTuple):
    """A paper with what came out: the results in the order of its claims, the runs by arm."""

    paper: Paper
    results: list[ClaimResult]
    runs: dict[str, list[Runs]]  # of each arm by seed
    seconds: float  # of this call: runs that were finished before count little


def reproduce(paper: Paper, folder: Path, report: Report = print) -> Reproduction:
    """Train the arms of `paper` in `folder`, as far as they are not yet, and measure its claims.

    What needs data or hardware that is not there is NOT-RUN. Raises a UserError for anything else
    that the user can mend, Stopped after a signal; the same call then resumes.
    """
    extras.require_package("matplotlib", "plots", "a report has figures")
    began = time.monotonic()
    missing = find_missing(paper, folder, {}, report)
    for branched in (False, True):  # branches need the runs that they begin in
        if branched:
            missing = find_missing(paper, folder, missing, report, tuned_only=True)
        arms = [arm for arm in paper.arms if arm.name not in missing]
        trials = [
            trial
            for arm in arms
            if bool(arm.branch_of) == branched
            for seed in arm.seeds
            for trial in arm_trials(paper, arm, seed, folder)
            if not (branched and diverged(Path(trial.cfg.init.from_run)))
        ]
        try:
            run_trials(folder, trials, mode="map", width=1, report=report)
        except NonFiniteError as error:
            report(str(error))  # that every run diverges is a result, too
    runs = {arm.name: [find_runs(arm, seed, folder) for seed in arm.seeds] for arm in arms}
    results = []
    for claim in paper.claims:
        results.append(measure_claim(claim, runs, missing))
        report(f"{claim.name}: {format_number(results[-1].mean)}, {results[-1].verdict}")
    return Reproduction(paper, results, runs, time.monotonic() - began)


def find_missing(
    paper: Paper, folder: Path, known: dict[str, str], report: Report, tuned_only: bool = False
) -> dict[str, str]:
    """Return by name why arms can't be run here, `known` included, and report what is new.

    An arm that fine-tunes is checked in full once its origin has run, for it has its tokenizer.
    """
    missing = dict(known)
    for arm in paper.arms:
        if arm.name in missing or (tuned_only and not arm.tunes):
            continue
        try:
            check_arm(paper, arm, folder)
        except DataError as error:
            missing[arm.name] = str(error)
            report(f"{arm.name}: {NOT_RUN}: {error}")
    origins = {arm.name: arm.branch_of for arm in paper.arms if arm.branch_of in missing}
    return {name: missing[origin] for name, origin in origins.items()} | missing


def check_arm(paper: Paper, arm: Arm, folder: Path) -> None:
    """Raise DataError where an arm can't be run here, ConfigError where `folder` has other runs.

    Its corpus must be there, and be the one that the arm or the paper names, if one does.
    """
    if paper.needs and jax.default_backend() == "cpu":
        raise DataError(f"it needs {paper.needs}, and only a CPU is available")
    trials = [t for seed in arm.seeds for t in arm_trials(paper, arm, seed, folder)]
    if arm.tunes and not (Path(trials[0].cfg.init.from_run) / "identity.json").exists():
        return  # the tokenizer is that of a run which is not there yet
    data = prepare_data(trials[0].cfg if arm.tunes else arm.config, lambda _: None)
    tokens = [part["tokens"] for part in data.identity.get("parts", [])]
    wanted = (arm.tokens or paper.tokens).split()
    if wanted and tokens != wanted:
        named = ", ".join(arm.config.data.mixture) or arm.config.data.source
        raise DataError(
            f"{named} is not the corpus of this paper: its tokens are not those of hash "
            f"{' '.join(wanted)}"
        )
    for trial in trials:
        run = run_path(folder, trial.name)
        if (run / "config.json").exists():
            rundir.enter_run(run, resolve(trial.cfg, data))
            rundir.check_identity(run, data.identity)


def arm_trials(paper: Paper, arm: Arm, seed: int, folder: Path) -> list[Trial]:
    """Return the runs of a seed as they are trained in `folder`: branches name their origins."""
    trials = arm.trials(seed)
    if not arm.branch_of:
        return trials
    origin = next(other for other in paper.arms if other.name == arm.branch_of)
    found = []
    for trial in trials:
        path = run_path(folder, origin.origin(trial).name).resolve()
        point = {"init.from_run": str(path), "init.state": "params" if arm.tunes else "all"}
        found.append(trial._replace(cfg=set_point(trial.cfg, point)))
    return found


def diverged(run: Path) -> bool:
    """Return whether the run of a trial ended at a loss that is not finite."""
    return read_outcome(run.parents[1], run.name).get("state") == "non-finite"


def find_runs(arm: Arm, seed: int, folder: Path) -> Runs:
    """Return an arm's runs with this seed, which have ended: one, or one for each point.

    A branch of a run that diverged was never begun, and counts as diverged.
    """
    found = []
    for trial in arm.trials(seed):
        path = run_path(folder, trial.name)
        if read_outcome(folder, trial.name):
            cfg, records = rundir.load_run(path), metrics.read_metrics(path)
            found.append(Run(path, cfg, records, diverged(path)))
        else:
            found.append(Run(path, config.editable(trial.cfg), [], diverged=True))
    return found if arm.space else found[0]


def listed(runs: Runs) -> list[Run]:
    """Return the runs of one seed as a list."""
    return runs if isinstance(runs, list) else [runs]


def measure_claim(
    claim: Claim, runs: dict[str, list[Runs]], missing: dict[str, str]
) -> ClaimResult:
    """Return a claim's figures and verdict; NOT-RUN with the reason where its data is missing."""
    for name in claim.arms:
        if name in missing:
            return ClaimResult(claim, {}, NOT_RUN, missing[name])
    try:
        if not claim.arms:
            measured: dict[int | str, float] = {"": claim.measure()}
        else:
            by_seed = zip(*(runs[name] for name in claim.arms), strict=True)
            measured = {listed(row[0])[0].cfg.train.seed: claim.measure(*row) for row in by_seed}
    except DataError as error:
        return ClaimResult(claim, {}, NOT_RUN, str(error))
    return ClaimResult(claim, measured, verdict(claim, list(measured.values())))


def load_job(run: Run, step: int = 0) -> tuple[Job, Params]:
    """Return a run's job on one device and its parameters, the last ones or those of `step`.

    For measures that ask for more than the records hold. Raises DataError, CheckpointError.
    """
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    job = make_job(complete(run.cfg), prepare_data(run.cfg, lambda _: None), mesh)
    with jax.set_mesh(mesh):
        params = load_run_params(run.path, job.cfg.model, mesh, step)[1]
    return job, params


def first_rows(rows: Rows, count: int) -> Batch:
    """Return the first rows of a table as a batch, fewer where it has not as many."""
    index_B = np.arange(min(count, rows.count), dtype=np.uint64)
    return rows.read(index_B, np.zeros_like(index_B))


def initial_loss(run: Run) -> float:
    """Return the validation loss of a run's parameters before its first step, as `open_run`."""
    job, _ = load_job(run)
    with jax.set_mesh(job.mesh):
        state, frozen = job.init(jax.random.key(run.cfg.train.seed))
        return job.evaluate(merge_params(state.params, frozen))["loss"]


def format_number(value: float | str) -> str:
    """Return a figure for a table: whole numbers in full, others to five digits."""
    if isinstance(value, str):
        return value
    if math.isfinite(value) and abs(value) >= 1000 and value == int(value):
        return f"{int(value):,}"
    return "" if math.isnan(value) else f"{value:.5g}"


def interval(claim: Claim) -> str:
    """Return a claim's criterion in words."""
    low, high = map(format_number, claim.accept)
    text = f"{low} to {high}"
    if math.inf in claim.accept:
        text = f"at least {low}"
    elif -math.inf in claim.accept:
        text = f"at most {high}"
    elif low == high:
        text = low
    return f"{text}, every seed" if claim.every_seed else text


def difference(result: ClaimResult) -> float:
    """Return measured less published; NaN where one of them is no number."""
    published = result.claim.published
    return math.nan if isinstance(published, str) else result.mean - published


def report_json(found: Reproduction) -> str:
    """Return the report as JSON, with null for numbers that are not finite."""

    def finite(value: float | str) -> float | str | None:
        return value if isinstance(value, str) or math.isfinite(value) else None

    claims = [
        {
            "name": result.claim.name,
            "published": result.claim.published,
            "source": result.claim.source,
            "accept": [finite(end) for end in result.claim.accept],
            "judged": "every seed" if result.claim.every_seed else "mean",
            "measured": {str(seed): finite(v) for seed, v in result.measured.items()},
            "mean": finite(result.mean),
            "difference": finite(difference(result)),
            "spread": finite(result.spread),
            "verdict": result.verdict,
            "reason": result.reason,
        }
        for result in found.results
    ]
    devices = sorted({device.device_kind for device in jax.devices()})
    identity = {
        "code": rundir.code_hash(),
        "packages": {name: importlib.metadata.version(name) for name in rundir.PACKAGES},
        "devices": devices,
        "seconds": round(found.seconds, 1),
    }
    head = {"title": found.paper.title, "scaled_down": found.paper.scaled_down}
    return json.dumps(head | identity | {"claims": claims}, indent=2) + "\n"


def to_markdown(found: Reproduction, command: str, plots: Sequence[Plot] = ()) -> Iterator[str]:
    """Yield the lines of the report; `command` makes it again, `plots` are the figures drawn."""
    paper, results = found.paper, found.results
    verdicts = [result.verdict for result in results]
    counts = [f"{verdicts.count(v)} {v}" for v in (PASS, FAIL, NOT_RUN) if v in verdicts]
    yield from (f"# {paper.title}", "", f"    {command}", "")
    if paper.scaled_down:
        yield from (f"**Scaled down, not the paper's own experiment:** {paper.scaled_down}", "")
    yield from (f"{', '.join(counts)}, by criteria stated before the run.", "")
    yield "| claim | published | measured | difference | spread | accepted | verdict |"
    yield "|---|---|---|---|---|---|---|"
    sources = list(dict.fromkeys(result.claim.source for result in results))
    for result in results:
        claim = result.claim
        cells = [
            claim.name,
            f"{format_number(claim.published)} [{sources.index(claim.source) + 1}]",
            format_number(result.mean) if result.measured else "",
            format_number(difference(result)),
            format_number(result.spread),
            interval(claim),
            result.verdict,
        ]
        yield "| " + " | ".join(cells) + " |"
    yield ""
    if len(next(iter(found.runs.values()), ())) > 1:
        yield from ("Measured is the mean over seeds, spread their standard deviation.", "")
    reasons = dict.fromkeys(result.reason for result in results if result.reason)
    yield from (f"{NOT_RUN}: {reason}\n" for reason in reasons)
    yield from (f"{index}. {source}" for index, source in enumerate(sources, 1))
    for plot in plots:
        yield from ("", f"![{plot.caption}]({plot.file})")


def curve(run: Run) -> list[tuple[int, float]]:
    """Return the steps and validation losses of a run, without those that are not finite."""
    losses = [(r["step"], r.get("validation_loss", math.nan)) for r in run.records]
    return [(step, loss) for step, loss in losses if math.isfinite(loss)]


def draw_curves(arms: Sequence[Arm], figure: Any, *runs: list[Runs]) -> None:
    """Draw the validation loss against the step, a color for each arm, a line for each point.

    The point with the lowest loss at its end, by the mean over seeds, has the range of its seeds
    and is named; the other points of the arm are faint.
    """
    axes, drawn = figure.subplots(), []
    for index, (arm, seeds) in enumerate(zip(arms, runs, strict=True)):
        found = [*zip(*map(listed, seeds), strict=True)]  # by point the runs of all seeds
        bands = [make_band([curve(run) for run in same]) for same in found]
        ends = [
            math.inf if any(run.diverged for run in same) or not band.steps else band.mean[-1]
            for same, band in zip(found, bands, strict=True)
        ]
        best = ends.index(min(ends))
        for number, (point, band) in enumerate(zip(arm.points(), bands, strict=True)):
            color = f"C{index % 10}"
            if number == best:
                label = f"{arm.name}, {show_point(point)}" if point else arm.name
                draw_band(
                    axes, band, color=color, label=label, linewidth=2, marker="o", markersize=4
                )
            else:
                axes.plot(band.steps, band.mean, color=color, linewidth=0.8, alpha=0.45)
        drawn += bands
    fit_axis(axes, drawn)
    if any(arm.space for arm in arms):
        axes.set_title("thick: the best point of each arm; thin: the others", fontsize="small")
    axes.set(xlabel="step", ylabel="validation loss in nats per token")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw(plot: Plot, found: Reproduction, folder: Path) -> bool:
    """Write a figure as a PNG into `folder`; return whether what it shows was there."""
    from matplotlib.figure import Figure

    if not set(plot.arms) <= found.runs.keys():
        return False
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    try:
        plot.draw(figure, *(found.runs[name] for name in plot.arms))
    except DataError:
        return False
    figure.suptitle(found.paper.title)
    figure.savefig(folder / plot.file, dpi=120)
    return True


def save_report(found: Reproduction, folder: Path, command: str) -> Path:
    """Write report.md, report.json, the paper's figures, and curves where there are any."""
    folder.mkdir(parents=True, exist_ok=True)
    rundir.write_text(folder / "report.json", report_json(found))
    plots, arms = [*found.paper.plots], [a for a in found.paper.arms if a.name in found.runs]
    runs = [run for arm in found.runs.values() for same in arm for run in listed(same)]
    if any(len(curve(run)) > 1 for run in runs):
        curves, names = functools.partial(draw_curves, arms), tuple(arm.name for arm in arms)
        plots.append(Plot("curves.png", "validation loss of every arm", curves, names))
    drawn = [plot for plot in plots if draw(plot, found, folder)]
    rundir.write_text(folder / "report.md", "\n".join(to_markdown(found, command, drawn)) + "\n")
    return folder / "report.md"
