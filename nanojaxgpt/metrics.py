"""The record of a run, `metrics.jsonl`: written, read, plotted."""

import json
import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from nanojaxgpt import config, rundir
from nanojaxgpt.config.sections import Config
from nanojaxgpt.errors import CheckpointError, ConfigError
from nanojaxgpt.extras import plots_advice
from nanojaxgpt.trackers import close_all, open_trackers

TASK = "task_"  # what the names of the benchmarks' numbers begin with


def read_metrics(run: Path, report: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl; lines that are none are left out.

    `report` is told how many were damaged; a last line torn by a crash does not count. Raises
    ConfigError where the file can't be read.
    """
    path, records, damaged = Path(run) / "metrics.jsonl", [], 0
    if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe would wait
        if report:
            report(f"WARNING: {path} is damaged and was skipped: it is not a regular file")
        return []
    try:
        content = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from error
    *lines, last = content.split(b"\n")
    for line in lines:
        record = parse_record(line)
        damaged += record is None
        records += [] if record is None else [record]
    if record := parse_record(last):
        records.append(record)
    if damaged and report:
        report(f"WARNING: {damaged} of {len(lines)} lines of {path} are damaged and were skipped")
    return records


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Return {"step": an integer, name: number, ...}, or None where the line is something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # ValueError: no JSON, no UTF-8, too many digits
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    numbers = all(type(value) in (int, float) for value in record.values())
    return record if numbers and record["step"] >= 0 else None


def validation_losses(run: Path) -> dict[int, float]:
    """Return the validation loss by step."""
    records = read_metrics(run)
    return {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}


class MetricsWriter:
    """Writes records to `metrics.jsonl` and to trackers; what a resumed run redoes is dropped.

    The file is written at once, record by record: resuming, sweeps and reports read it.
    """

    def __init__(
        self,
        run: Path,
        start_step: int,
        cfg: Config,
        report: Callable[[str], None] = print,
    ) -> None:
        self.run, self.identity = Path(run), rundir.identify(Path(run))
        self.path, self.report = self.run / "metrics.jsonl", report
        with rundir.writing(self.run, ConfigError):
            kept = [r for r in read_metrics(run, report) if r["step"] <= start_step]
            rundir.write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
            self.file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
            names = cfg.train.trackers
            self.trackers = open_trackers(names, self.run, config.to_dict(cfg), start_step, report)

    def write(self, step: int, **values: float) -> None:
        """Write one record. Raises CheckpointError where the run directory can't be written."""
        rundir.check_present(self.run, self.identity)
        line = json.dumps({"step": step, **values}).encode() + b"\n"
        with rundir.writing(self.run, CheckpointError):
            self._restore()
            while line:  # a nearly full disk takes a part
                line = line[self.file.write(line) :]
        for tracker in self.trackers:
            tracker.log(step, values)

    def write_confusion(self, counts: list[list[int]]) -> None:
        """Write examples by label and by prediction as confusion.json, and as a picture."""
        with rundir.writing(self.run, CheckpointError):
            rundir.write_text(self.run / "confusion.json", json.dumps(counts) + "\n")
            if not plots_advice():
                plot_confusion(counts, self.run / "confusion.png", self.run.name)

    def _restore(self) -> None:
        """Write the file again, from the handle, where it is no longer the one that is open."""
        if rundir.identify(self.path) == rundir.identify(self.file.fileno()):
            return
        self.file.seek(0)  # what was deleted stays readable for as long as it is open
        rundir.write_text(self.path, self.file.readall().decode(errors="replace"))
        lost, self.file = self.file, open(self.path, "a+b", buffering=0)  # noqa: SIM115
        lost.close()
        self.report(
            f"WARNING: {self.path} was deleted or replaced during training; it was written again"
        )

    def close(self) -> None:
        """Close the file and the trackers; one that is slow is not waited for."""
        with suppress(OSError):  # a deleted folder or a full disk was reported
            if rundir.identify(self.run) == self.identity:
                self._restore()
        self.file.close()
        close_all(self.trackers)


class NoMetrics:
    """Stands for the writer and the progress where another process has them."""

    began = 0.0

    def write(self, step: int, **values: float) -> None:
        """Write nothing."""

    def write_confusion(self, counts: list[list[int]]) -> None:
        """Write nothing."""

    def step(self, step: int, values: dict[str, float]) -> None:
        """Show nothing."""

    def advance(self, step: int) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Print nothing."""

    def compiling(self, what: str) -> AbstractContextManager[None]:
        """Report nothing."""
        return nullcontext()

    def close(self) -> None:
        """Close nothing."""


def plot_losses(records: Iterable[dict[str, Any]], path: Path, title: str) -> None:
    """Write the training and validation loss against the step as a PNG."""
    from matplotlib.figure import Figure

    records = list(records)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (
        ("loss", "training", {"linewidth": 1, "alpha": 0.6}),
        ("validation_loss", "validation", {"marker": "o", "markersize": 3}),
    ):
        points = [(r["step"], r[name]) for r in records if math.isfinite(r.get(name, math.nan))]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss in nats per token", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)


def task_curves(records: Iterable[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return the (step, value) of each number of a benchmark, by its name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name.startswith(TASK):
                found.setdefault(name, []).append((record["step"], value))
    return found


def plot_tasks(curves: dict[str, list[tuple[int, float]]], path: Path, title: str) -> None:
    """Write the numbers of benchmarks against the step as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name.removeprefix(TASK), marker="o",
                  markersize=3)  # fmt: skip
    axes.set(xlabel="step", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def plot_confusion(counts: list[list[int]], path: Path, title: str) -> None:
    """Write how many examples of each label (a row) were taken for which, as a PNG."""
    from matplotlib.figure import Figure

    size = len(counts)
    inches = 2.5 + 0.5 * min(size, 20)
    figure = Figure(figsize=(inches, inches), layout="constrained")
    axes = figure.subplots()
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if size <= 20:
        axes.set(xticks=range(size), yticks=range(size))
        for label, row in enumerate(counts):
            for found, count in enumerate(row):
                color = "white" if shares[label][found] > 0.5 else "black"
                axes.text(found, label, f"{count:,}", ha="center", va="center", color=color)
    axes.set(xlabel="prediction", ylabel="label", title=title)
    figure.savefig(path, dpi=120)
