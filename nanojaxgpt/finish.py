"""The end of a run: its plot and summary, and how a finished run is recognised without jax."""

import math
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nanojaxgpt import config, metrics, rundir
from nanojaxgpt.data.loader import prepare_data, resolve
from nanojaxgpt.errors import CheckpointError

PLOT = "loss.png"


def end_run(run: Path, report: Callable[[str], None]) -> None:
    """Plot the losses of a run that is at its last step, and report how it ended.

    Raises CheckpointError where the plot can't be written.
    """
    with rundir.writing(run, CheckpointError):
        metrics.plot_losses(metrics.read_metrics(run), run / PLOT, run.name)
    report_end(run, report)


def report_end(run: Path, report: Callable[[str], None]) -> None:
    """Report how a run ended, and the commands that use it."""
    saved = rundir.saved_steps(run / "checkpoints")
    report(f"{run} is finished at step {saved[-1]}")
    for line in summary(run, metrics.read_metrics(run), saved):
        report(line)


def is_finished(cfg: ConfigDict, run: Path, report: Callable[[str], None]) -> bool:
    """Return whether the run of this very config is at its last step, untouched since it ended.

    The plot is written when all else is saved: a checkpoint that was changed later has to be
    read. Raises as training would where another process trains in `run`, or the corpus changed.
    """
    if not (run / "config.json").is_file() or not (run / PLOT).is_file():
        return False
    with rundir.own_run(run):
        last = run / "checkpoints" / str(cfg.train.num_steps)
        saved = rundir.saved_steps(run / "checkpoints")
        if not saved or saved[-1] != cfg.train.num_steps or is_newer(last, run / PLOT):
            return False
        data = prepare_data(cfg, report, run)
        changes = config.differences(rundir.load_run(run), resolve(cfg, data))
        if not all(config.FREE_ON_RESUME.fullmatch(name) for name, _, _ in changes):
            return False
        rundir.check_data(run, data.identity, report)
        return True


def is_newer(folder: Path, file: Path) -> bool:
    """Return whether anything in `folder` was changed, added or removed after `file`."""
    written = file.stat().st_mtime_ns
    return any(path.stat().st_mtime_ns > written for path in (folder, *folder.rglob("*")))


def summary(run: Path, records: list[dict[str, Any]], saved: list[int]) -> Iterator[str]:
    """Yield the lines that end a run: its losses, its checkpoint, the commands that use it.

    `records` are those of metrics.jsonl, `saved` the steps of its checkpoints.
    """
    training = [(r["step"], r["loss"]) for r in records if "loss" in r]
    found = [(r["step"], r["validation_loss"]) for r in records if "validation_loss" in r]
    if training:
        yield "  training loss    {1:.4f} at step {0}".format(*training[-1])
    if found:
        best = min(found, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])
        kept = "" if best[0] in saved else ", not kept as a checkpoint"
        yield "  validation loss  {1:.4f} at step {0}".format(*found[-1])
        yield "  best             {1:.4f} at step {0}{2}".format(*best, kept)
    if saved:
        yield f"  checkpoint       {run}/checkpoints/{saved[-1]}"
    if (run / "loss.png").exists():
        yield f"  plot             {run}/loss.png"
    yield "next:"
    yield f"  nanojaxgpt eval {shlex.quote(str(run))}"
    yield f"  nanojaxgpt sample {shlex.quote(str(run))} --prompt=TEXT"
