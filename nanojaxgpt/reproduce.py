"""In: a paper file and a folder. Out: its runs, and a report of published against measured."""

import importlib.metadata
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from nanojaxgpt import checkpoint, metrics, rundir, sharding
from nanojaxgpt.errors import DataError, NonFiniteError
from nanojaxgpt.model import ModelConfig
from nanojaxgpt.paper import FAIL, NOT_RUN, PASS, Arm, Claim, Paper, Run, verdict
from nanojaxgpt.train import Job, fit, make_job, prepare_data

Report = Callable[[str], None]


class Result(NamedTuple):
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
    results: list[Result]
    runs: dict[str, list[Run]]
    seconds: float  # of this call: runs that were finished before count little


def reproduce(paper: Paper, folder: Path, report: Report = print) -> Reproduction:
    """Train the arms of `paper` in `folder`, as far as they are not yet, and measure its claims.

    What needs data that is not there is NOT-RUN. Raises a UserError for anything else that the
    user can mend, Stopped after a signal; the same call then goes on.
    """
    began, runs, missing = time.monotonic(), {}, {}
    for arm in paper.arms:
        try:
            check_corpus(paper, arm.config)
            runs[arm.name] = [train_arm(arm, seed, folder, report) for seed in arm.seeds]
        except DataError as error:
            missing[arm.name] = str(error)
            report(f"{arm.name}: {NOT_RUN}: {error}")
    results = []
    for claim in paper.claims:
        results.append(measure(claim, runs, missing))
        report(f"{claim.name}: {number(results[-1].mean)}, {results[-1].verdict}")
    return Reproduction(paper, results, runs, time.monotonic() - began)


def check_corpus(paper: Paper, cfg: ConfigDict) -> None:
    """Raise DataError where the corpus is missing, or is not the one that the paper names."""
    if not paper.tokens:
        return
    parts = prepare_data(cfg, lambda _: None).identity.get("parts", [])
    if [part["tokens"] for part in parts] != [paper.tokens]:
        raise DataError(
            f"{cfg.data.source} is not the corpus of this paper: its tokens are not those of hash "
            f"{paper.tokens}"
        )


def train_arm(arm: Arm, seed: int, folder: Path, report: Report) -> Run:
    """Return an arm's run with this seed, trained to its end or until its loss is not finite."""
    cfg = arm.config.copy_and_resolve_references().unlock()
    cfg.train.seed = seed
    path, diverged = folder / f"{arm.name}-{seed}", False
    try:
        fit(cfg.lock(), path, report=report)
    except NonFiniteError as error:
        report(f"{path}: {error}")
        diverged = True
    return Run(path, rundir.load_run(path), metrics.read_metrics(path), diverged)


def measure(claim: Claim, runs: dict[str, list[Run]], missing: dict[str, str]) -> Result:
    """Return a claim's figures and verdict; NOT-RUN with the reason where its data is missing."""
    for name in claim.arms:
        if name in missing:
            return Result(claim, {}, NOT_RUN, missing[name])
    try:
        if not claim.arms:
            measured = {"": claim.measure()}
        else:
            by_seed = zip(*(runs[name] for name in claim.arms), strict=True)
            measured = {row[0].cfg.train.seed: claim.measure(*row) for row in by_seed}
    except DataError as error:
        return Result(claim, {}, NOT_RUN, str(error))
    return Result(claim, measured, verdict(claim, list(measured.values())))


def open_run(run: Run) -> tuple[Job, Any]:
    """Return a run's job on one device and its last parameters.

    For measures that ask for more than the records hold. Raises DataError, CheckpointError.
    """
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    job = make_job(run.cfg, prepare_data(run.cfg, lambda _: None), mesh)
    with jax.set_mesh(mesh):
        params = checkpoint.load_params(run.path, ModelConfig(**run.cfg.model), mesh)[1]
    return job, params


def number(value: float | str) -> str:
    """Return a figure for a table: whole numbers in full, others to five digits."""
    if isinstance(value, str):
        return value
    if math.isfinite(value) and abs(value) >= 1000 and value == int(value):
        return f"{int(value):,}"
    return "" if math.isnan(value) else f"{value:.5g}"


def interval(claim: Claim) -> str:
    """Return what a claim accepts, in words."""
    low, high = map(number, claim.accept)
    text = f"{low} to {high}"
    if math.inf in claim.accept:
        text = f"at least {low}"
    elif -math.inf in claim.accept:
        text = f"at most {high}"
    elif low == high:
        text = low
    return f"{text}, every seed" if claim.every_seed else text


def difference(result: Result) -> float:
    """Return measured less published; NaN where one of them is no number."""
    published = result.claim.published
    return math.nan if isinstance(published, str) else result.mean - published


def to_json(found: Reproduction) -> str:
    """Return the report as JSON; what is not finite is null."""

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


def to_markdown(found: Reproduction, command: str) -> Iterator[str]:
    """Yield the lines of the report; `command` makes it again."""
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
            f"{number(claim.published)} [{sources.index(claim.source) + 1}]",
            number(result.mean) if result.measured else "",
            number(difference(result)),
            number(result.spread),
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
    if found.runs:
        yield from ("", "![validation loss of every arm](curves.png)")


def plot_arms(runs: dict[str, list[Run]], path: Path, title: str) -> None:
    """Write the validation loss of every arm against the step as a PNG, a line for each seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for index, (name, seeds) in enumerate(runs.items()):
        for run in seeds:
            points = [(r["step"], r["validation_loss"]) for r in run.records
                      if math.isfinite(r.get("validation_loss", math.nan))]  # fmt: skip
            label = name if run is seeds[0] else None
            steps, losses = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, losses, f"C{index % 10}", marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="validation loss in nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def save(found: Reproduction, folder: Path, command: str) -> Path:
    """Write report.md, report.json and, where something was trained, curves.png into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rundir.write_text(folder / "report.json", to_json(found))
    if found.runs:
        plot_arms(found.runs, folder / "curves.png", found.paper.title)
    rundir.write_text(folder / "report.md", "\n".join(to_markdown(found, command)) + "\n")
    return folder / "report.md"
