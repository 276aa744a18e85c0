"""In: the trials of a sweep and their folder. Out: every trial done once, whoever runs it."""

import math
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple, Protocol

import jax

from nanojaxgpt import console, metrics
from nanojaxgpt.config.sections import Config
from nanojaxgpt.data.loader import resolve
from nanojaxgpt.errors import ConfigError, MemoryExceeded, NonFiniteError
from nanojaxgpt.hosts.process import StopRequest, stop_signals
from nanojaxgpt.recorder import Job
from nanojaxgpt.rundir import own_run
from nanojaxgpt.sweep.claims import Claims, read_outcome, run_path, write_outcome
from nanojaxgpt.sweep.plan import Trial, count, group_trials, program_key, show_point
from nanojaxgpt.sweep.together import measure_alone, measure_together, open_group, train_together
from nanojaxgpt.training import open_job, share_job, train_job

WAIT_SECONDS = 1.0
MEASURES = {"map": measure_alone, "vmap": measure_together}


class Pruned(Exception):
    """A trial is not worth continuing; the text says why."""


class Search(Protocol):
    """Draws trials as the sweep goes (sweep/search.py, which needs Optuna)."""

    def trials(self) -> list[Trial]:
        """Return the trials drawn so far."""
        ...

    def left(self) -> int:
        """Return how many points are still to be drawn."""
        ...

    def draw(self, claims: Claims) -> bool:
        """Draw one more point, unless another process is drawing; return whether."""
        ...

    def settle(self) -> None:
        """Take note of how trials ended."""

    def watch(self, trial: Trial) -> Callable[[int], None]:
        """Return the function to call after each evaluation of a trial; it raises Pruned."""
        ...


class Sweep(NamedTuple):
    """What the functions here share: where the trials live, who holds them, what may stop it."""

    folder: Path
    plan: list[Trial]
    claims: Claims
    stop: StopRequest
    report: Callable[[str], None]
    search: Search | None
    jobs: dict[str, tuple[str, Job]]  # by mode the last that was opened, and its program

    def trials(self) -> list[Trial]:
        """Return the trials that are known by now."""
        return self.search.trials() if self.search else self.plan

    def missing(self) -> list[Trial]:
        """Return the trials that nobody has finished yet."""
        return [t for t in self.trials() if not read_outcome(self.folder, t.name)]

    def claim(self, trial: Trial) -> bool:
        """Return whether this process is to run the trial now."""
        if not self.claims.take(trial.name):
            return False
        if read_outcome(self.folder, trial.name):  # finished between the look and the claim
            self.claims.release(trial.name)
            return False
        return True

    def open(self, cfg: Config, mode: str) -> Job:
        """Return the job of a config; its programs are kept until others are needed."""
        key = program_key(cfg)
        if mode not in self.jobs or self.jobs[mode][0] != key:
            self.jobs.pop(mode, None)  # before the next takes its memory
            open_one = open_group if mode == "vmap" else open_job
            self.jobs[mode] = key, open_one(cfg, report=self.report)
        return self.jobs[mode][1]

    def finish(self, trial: Trial, seconds: float, state: str, message: str = "") -> None:
        """Write how a trial ended, give it free, and say so."""
        outcome = {"state": state, "seconds": round(seconds, 3), "message": message}
        write_outcome(self.folder, trial.name, {"point": trial.point} | outcome)
        self.claims.release(trial.name)
        known, left = len(self.trials()), self.search.left() if self.search else 0
        losses = metrics.validation_losses(run_path(self.folder, trial.name))
        loss = f", validation loss {losses[max(losses)]:.4f}" if losses else ""
        self.report(
            f"{known - len(self.missing())}/{known + left} {trial.name} {state}{loss}, "
            f"{console.duration(seconds)}: {show_point(trial.point)}"
        )


def run_trials(
    folder: Path,
    trials: list[Trial],
    mode: str,
    width: int,
    report: Callable[[str], None],
    search: Search | None = None,
) -> None:
    """Run the missing trials, until all are done by this process or by others.

    `mode` is map, vmap, auto or "" (map on a CPU, else auto), `width` how many trials vmap takes
    into one step. With a `search` the trials are those that it draws, one after the other.
    Raises Stopped after a signal, NonFiniteError where not one trial is finite, and what opening
    a job raises.
    """
    if search and mode == "vmap":
        raise ConfigError("tpe draws each trial from the results of the others: use --mode=map")
    mode = "map" if search else mode
    with stop_signals() as stop, Claims(folder) as claims:
        sweep, waiting = Sweep(folder, trials, claims, stop, report, search, {}), False
        while True:
            if search:
                search.settle()
            missing = sweep.missing()
            ran = [run_group(sweep, group, mode, width) for group in group_trials(missing)]
            if any(ran):
                continue
            if search and search.draw(claims):
                continue
            if not missing and not (search and search.left()):
                break
            if missing and not waiting:
                report(f"{count(len(missing), 'trial')} still run elsewhere; waiting for them")
                waiting = True
            time.sleep(WAIT_SECONDS)
        outcomes = [read_outcome(folder, trial.name) for trial in sweep.trials()]
    if outcomes and all(outcome["state"] == "non-finite" for outcome in outcomes):
        raise NonFiniteError(f"every trial became non-finite; the first: {outcomes[0]['message']}")


def run_group(sweep: Sweep, group: list[Trial], mode: str, width: int) -> int:
    """Run the trials that share their programs and that nobody else runs; return how many."""
    waiting, ran = list(group), 0
    while waiting:
        first = waiting.pop(0)
        if not sweep.claim(first):
            continue
        if mode in ("", "auto"):
            mode = choose_mode(sweep, first.cfg, mode, min(width, 1 + len(waiting)))
        taken = [first]
        while mode == "vmap" and waiting and len(taken) < width:
            trial = waiting.pop(0)
            taken += [trial] if sweep.claim(trial) else []
        if mode == "vmap":
            run_together(sweep, taken)
        else:
            run_alone(sweep, first)
        ran += len(taken)
    return ran


def choose_mode(sweep: Sweep, cfg: Config, mode: str, width: int) -> str:
    """Return map or vmap for `width` trials: map on a CPU unless asked, else the faster one."""
    if width == 1 or (mode == "" and jax.default_backend() == "cpu"):
        return "map"
    seconds = {name: measured(sweep, cfg, name, width) for name in MEASURES}
    best = min(seconds, key=lambda name: seconds[name])
    figures = ", ".join(f"{name} {1e3 * time:.1f} ms" for name, time in seconds.items())
    sweep.report(f"mode {best}: a step of {count(width, 'trial')} takes {figures}")
    return best


def measured(sweep: Sweep, cfg: Config, mode: str, width: int) -> float:
    """Return the seconds of a step of `width` trials; infinity where they don't fit together."""
    try:
        return MEASURES[mode](sweep.open(cfg, mode), width)
    except MemoryExceeded:
        if mode == "map":
            raise
        return math.inf


def run_alone(sweep: Sweep, trial: Trial) -> None:
    """Train one trial as `nanojaxgpt train` would, with the programs that are there already."""
    run, began, state, message = run_path(sweep.folder, trial.name), time.monotonic(), "", ""
    job = sweep.open(trial.cfg, "map")
    own = share_job(job, resolve(trial.cfg, job.data))
    if sweep.search:
        own = own._replace(evaluated=sweep.search.watch(trial))
    with own_run(run), open(run / "log.txt", "a", buffering=1) as log, redirect_stdout(log):
        try:
            train_job(own, run, sweep.stop, print)
        except NonFiniteError as error:
            state, message = "non-finite", str(error)
        except Pruned as error:
            state, message = "pruned", str(error)
            print(f"pruned at {message}")
    sweep.finish(trial, time.monotonic() - began, state or "finished", message)


def run_together(sweep: Sweep, trials: list[Trial]) -> None:
    """Train several trials in one vectorized step."""
    began, job = time.monotonic(), sweep.open(trials[0].cfg, "vmap")
    jobs = [share_job(job, resolve(trial.cfg, job.data)) for trial in trials]
    runs = [run_path(sweep.folder, trial.name) for trial in trials]
    messages = train_together(jobs, runs, sweep.stop)
    for trial, message in zip(trials, messages, strict=True):
        state = "non-finite" if message else "finished"
        sweep.finish(trial, (time.monotonic() - began) / len(trials), state, message)
