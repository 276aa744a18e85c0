"""The end of a run: its plot and summary, and how a finished run is recognised without jax."""

import hashlib
import json
import math
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nanojaxgpt import config, metrics, rundir
from nanojaxgpt.config.sections import Config
from nanojaxgpt.data.loader import prepare_data, resolve
from nanojaxgpt.errors import CheckpointError
from nanojaxgpt.extras import plots_advice

PLOT, TASKS_PLOT, RECORD = "loss.png", "tasks.png", "finished.json"
HASHED_BYTES = 8 * 2**30  # some ten seconds; a larger checkpoint is read by the next `train`


def end_run(run: Path, report: Callable[[str], None]) -> None:
    """Plot the losses of a run that is at its last step, record its checkpoint, report the end.

    Without matplotlib there is no plot, and `report` says so. Raises CheckpointError where the plot
    or the record can't be written.
    """
    with rundir.writing(run, CheckpointError):
        if missing := plots_advice():
            report(f"no {PLOT}: {missing}")
        else:
            records = metrics.read_metrics(run)
            metrics.plot_losses(records, run / PLOT, run.name)
            if curves := metrics.task_curves(records):
                metrics.plot_tasks(curves, run / TASKS_PLOT, run.name)
        (run / RECORD).unlink(missing_ok=True)
        if record := hash_checkpoint(run):
            rundir.write_text(run / RECORD, json.dumps(record, indent=2) + "\n")
    report_end(run, report)


def report_end(run: Path, report: Callable[[str], None]) -> None:
    """Report how a run ended, and the commands that use it."""
    saved = rundir.saved_steps(run / "checkpoints")
    report(f"{run} is finished at step {saved[-1]}")
    for line in summary(run, metrics.read_metrics(run), saved):
        report(line)


def is_finished(cfg: Config, run: Path, report: Callable[[str], None]) -> bool:
    """Return whether the run of this very config is at its last step, untouched since it ended.

    Where anything is in doubt it is not: then its checkpoint is read and checked as on resuming.
    Raises as training would where another process trains in `run`, or the corpus changed.
    """
    plotted = (run / PLOT).is_file() or plots_advice()
    if not (run / "config.json").is_file() or not plotted:
        return False
    with rundir.own_run(run):
        saved = rundir.saved_steps(run / "checkpoints")
        if not saved or saved[-1] != cfg.train.num_steps or not is_as_recorded(run):
            return False
        data = prepare_data(cfg, report, run)
        changes = config.differences(rundir.read_config(run), resolve(cfg, data))
        if not all(config.free_on_resume(name) for name, _, _ in changes):
            return False
        rundir.check_identity(run, data.identity, report)
        return True


def hash_checkpoint(run: Path) -> dict[str, Any]:
    """Return the newest checkpoint's step and the hash of each of its files; {} if it is large.

    Its `meta`, which holds the step that was saved, is among the files.
    """
    step = rundir.saved_steps(run / "checkpoints")[-1]
    folder = run / "checkpoints" / str(step)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    if sum(path.stat().st_size for path in paths) > HASHED_BYTES:
        return {}
    files = {}
    for path in paths:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        files[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return {"step": step, "files": files}


def is_as_recorded(run: Path) -> bool:
    """Return whether the newest checkpoint is, byte for byte, the one that ended the run."""
    try:
        return json.loads((run / RECORD).read_bytes()) == hash_checkpoint(run)
    except (OSError, ValueError, RecursionError):  # missing, damaged, unreadable
        return False


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
    for name, curve in metrics.task_curves(records).items():
        yield f"  {name.removeprefix(metrics.TASK)} {{1:.4f}} at step {{0}}".format(*curve[-1])
    if saved:
        yield f"  checkpoint       {run}/checkpoints/{saved[-1]}"
    for plot in (PLOT, TASKS_PLOT):
        if (run / plot).exists():
            yield f"  plot             {run}/{plot}"
    yield "next:"
    yield f"  nanojaxgpt eval {shlex.quote(str(run))}"
    yield f"  nanojaxgpt sample {shlex.quote(str(run))} --prompt=TEXT"
