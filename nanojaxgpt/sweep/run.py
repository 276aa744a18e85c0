"""In: the trials of a sweep and their folder. Out: every trial done once, whoever runs it."""

import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import jax

from nanojaxgpt import metrics
from nanojaxgpt.errors import NonFiniteError
from nanojaxgpt.hosts.process import StopRequest, stop_signals
from nanojaxgpt.rundir import own_run
from nanojaxgpt.sweep.claims import Claims, read_outcome, run_path, write_outcome
from nanojaxgpt.sweep.plan import Trial, count, group_trials, show_point
from nanojaxgpt.sweep.together import measure_modes, obstacle, train_together
from nanojaxgpt.train import Job, open_job, resolve, share_job, train_job

WAIT_SECONDS = 1.0


class Sweep(NamedTuple):
    """What the functions here share: where the trials live, who holds them, what may stop it."""

    folder: Path
    trials: list[Trial]
    claims: Claims
    stop: StopRequest
    report: Callable[[str], None]

    def missing(self) -> list[Trial]:
        """Return the trials that nobody has finished yet."""
        return [t for t in self.trials if not read_outcome(self.folder, t.name)]

    def claim(self, trial: Trial) -> bool:
        """Return whether this process is to run the trial now."""
        if not self.claims.take(trial.name):
            return False
        if read_outcome(self.folder, trial.name):  # finished between the look and the claim
            self.claims.release(trial.name)
            return False
        return True

    def finish(self, trial: Trial, seconds: float, message: str) -> None:
        """Write how a trial ended, give it free, and say so; `message` is of a non-finite one."""
        state = "non-finite" if message else "finished"
        outcome = {"state": state, "seconds": round(seconds, 3), "message": message}
        write_outcome(self.folder, trial.name, {"point": trial.point} | outcome)
        self.claims.release(trial.name)
        done = len(self.trials) - len(self.missing())
        losses = metrics.validation_losses(run_path(self.folder, trial.name))
        loss = f", validation loss {losses[max(losses)]:.4f}" if losses else ""
        self.report(
            f"{done}/{len(self.trials)} {trial.name} {state}{loss}, "
            f"{metrics.duration(seconds)}: {show_point(trial.point)}"
        )


def run_trials(
    folder: Path, trials: list[Trial], mode: str, width: int, report: Callable[[str], None]
) -> None:
    """Run what is missing of the trials, until all are done by this process or by others.

    `mode` is map, vmap, auto or "" (map on a CPU, else auto), `width` how many trials vmap takes
    into one step. Raises Stopped after a signal, NonFiniteError where not one trial is finite,
    and what opening a job raises.
    """
    with stop_signals() as stop, Claims(folder) as claims:
        sweep, waiting = Sweep(folder, trials, claims, stop, report), False
        while missing := sweep.missing():
            ran = [run_group(sweep, group, mode, width) for group in group_trials(missing)]
            if not any(ran):
                if not waiting:
                    report(f"{count(len(missing), 'trial')} still run elsewhere; waiting for them")
                waiting = True
                time.sleep(WAIT_SECONDS)
    outcomes = [read_outcome(folder, trial.name) for trial in trials]
    if outcomes and all(outcome["state"] == "non-finite" for outcome in outcomes):
        raise NonFiniteError(f"every trial became non-finite; the first: {outcomes[0]['message']}")


def run_group(sweep: Sweep, group: list[Trial], mode: str, width: int) -> int:
    """Run the trials that share their programs and that nobody else runs; return how many."""
    job, ran = None, 0
    waiting = list(group)
    while waiting:
        first = waiting.pop(0)
        if not sweep.claim(first):
            continue
        job = job or open_job(first.cfg, report=sweep.report)
        if mode in ("", "auto"):
            mode = choose_mode(job, mode, min(width, 1 + len(waiting)), sweep.report)
        taken = [first]
        while mode == "vmap" and waiting and len(taken) < width:
            trial = waiting.pop(0)
            taken += [trial] if sweep.claim(trial) else []
        if mode == "vmap":
            run_together(sweep, job, taken)
        else:
            run_alone(sweep, job, first)
        ran += len(taken)
    return ran


def choose_mode(job: Job, mode: str, width: int, report: Callable[[str], None]) -> str:
    """Return map or vmap for `width` trials: map on a CPU unless asked, else the faster one."""
    if width == 1 or (mode == "" and jax.default_backend() == "cpu"):
        return "map"
    if why := obstacle([job]):
        report(f"mode map: {why}")
        return "map"
    seconds = measure_modes(job, width)
    best = min(seconds, key=seconds.get)
    figures = ", ".join(f"{name} {1e3 * time:.1f} ms" for name, time in seconds.items())
    report(f"mode {best}: a step of {count(width, 'trial')} takes {figures}")
    return best


def run_alone(sweep: Sweep, job: Job, trial: Trial) -> None:
    """Train one trial as `nanojaxgpt train` would, with the programs that are there already."""
    run, began, message = run_path(sweep.folder, trial.name), time.monotonic(), ""
    own = share_job(job, resolve(trial.cfg, job.data))
    with own_run(run), open(run / "log.txt", "a", buffering=1) as log, redirect_stdout(log):
        try:
            train_job(own, run, sweep.stop, print)
        except NonFiniteError as error:
            message = str(error)
    sweep.finish(trial, time.monotonic() - began, message)


def run_together(sweep: Sweep, job: Job, trials: list[Trial]) -> None:
    """Train several trials in one vectorized step."""
    began = time.monotonic()
    jobs = [share_job(job, resolve(trial.cfg, job.data)) for trial in trials]
    runs = [run_path(sweep.folder, trial.name) for trial in trials]
    messages = train_together(jobs, runs)
    for trial, message in zip(trials, messages, strict=True):
        sweep.finish(trial, (time.monotonic() - began) / len(trials), message)
