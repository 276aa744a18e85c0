"""In: the arguments of `nanojaxgpt sweep`. Out: a plan, the runs, how they stand, or a report."""

import argparse
import functools
import shlex
import sys
from pathlib import Path
from typing import Any

from nanojaxgpt import rundir
from nanojaxgpt.arguments import Command, integer, parse
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.names import unknown_name
from nanojaxgpt.sweep.plan import (
    Plan,
    Trial,
    default_folder,
    describe_plan,
    load_plan,
    read_plan,
    save_plan,
)

ACTIONS = ("plan", "run", "status", "resume", "report")
READERS = ("status", "report")  # which need no more than the sweep's folder
MODES = ("map", "vmap", "auto")
OPTIONS: dict[str, dict[str, Any]] = {
    "config": {"default": "", "help": "the experiment: FILE.py or FILE.py:VARIANT"},
    "dir": {"default": "", "help": "the sweep's folder; default: sweeps/EXPERIMENT"},
    "workers": {"default": 1, "type": integer(1), "help": "parallel processes; default: 1"},
    "mode": {
        "default": "",
        "choices": ("", *MODES),
        "help": f"{', '.join(MODES)}; see docs/sweeps.md",
    },
    "width": {"default": 16, "type": integer(1), "help": "trials per vmapped step; default: 16"},
    "metric": {"default": "", "help": "metric of the report; default: tpe's, or validation_loss"},
    "maximize": {"action": "store_true", "help": "the metric is better when larger"},
    "slurm": {"default": 0, "type": integer(0), "help": "workers to submit as a SLURM array"},
    "slurm_options": {"default": "", "help": "partition=gpu,time=240,gpus_per_node=1,..."},
    "dry_run": {"action": "store_true", "help": "with --slurm: print the batch script"},
}


def sweep(arguments: list[str]) -> None:
    """Plan, run, watch or report the runs that an experiment's sweep() declares.

    `resume` is `run`: both run what is missing, however many processes do so at once.
    """
    parsed = parse("sweep", sweep.__doc__, arguments, OPTIONS, ("ACTION", ", ".join(ACTIONS)))
    if parsed.run not in ACTIONS:
        known = unknown_name("action", parsed.run or "", list(ACTIONS))
        raise ConfigError(f"{known}; nanojaxgpt sweep {'|'.join(ACTIONS)} --config=EXPERIMENT.py")
    stored = parsed.run in READERS and parsed.dir and not parsed.config
    if not parsed.config and not stored:
        enough = ", or the --dir of a sweep" if parsed.run in READERS else ""
        raise ConfigError(f"sweep {parsed.run} needs --config=EXPERIMENT.py{enough}")
    if stored and parsed.overrides:
        raise ConfigError("--config.FIELD=VALUE needs --config")
    if not parsed.slurm and (parsed.dry_run or parsed.slurm_options):
        raise ConfigError("--slurm_options and --dry_run need --slurm=WORKERS")
    folder = Path(parsed.dir) if parsed.dir else default_folder(parsed.config)
    rundir.check_folder("--dir", folder)
    plan = read_plan(folder) if stored else load_plan(parsed.config, parsed.overrides)
    if parsed.run == "plan":
        lines = plan_lines(parsed, plan, folder)
    else:
        search = open_search(plan, folder)
        if parsed.run not in READERS and not parsed.slurm:
            save_plan(folder, plan, parsed.config, parsed.overrides)
        trials = search.trials() if search else plan.trials
        lines = {"status": status, "report": report}.get(parsed.run, run_missing)(
            parsed, arguments, folder, trials, search
        )
    for line in lines:
        print(line)


def open_search(plan: Plan, folder: Path) -> Any:
    """Return the search of a plan that has one, else None. Raises ConfigError without Optuna."""
    if not plan.tpe:
        return None
    from nanojaxgpt.sweep.search import Search

    return Search(folder, plan.base, plan.tpe)


def plan_lines(parsed: argparse.Namespace, plan: Plan, folder: Path) -> list[str]:
    """Return what a sweep would do, and the command that does it."""
    lines = describe_plan(plan.trials, functools.partial(print, file=sys.stderr, flush=True))
    if tpe := plan.tpe:
        every, last = plan.base.eval.every_steps, plan.base.train.num_steps
        rungs = [every * tpe.reduction**rung for rung in range(9)] if tpe.reduction else []
        rungs = [str(step) for step in rungs if 0 < step < last]
        pruned = f"; ASHA keeps 1 in {tpe.reduction} at steps {', '.join(rungs)}"
        lines = [
            f"{tpe.num} trials, chosen as it goes by TPE for the "
            f"{'highest' if tpe.maximize else 'lowest'} {tpe.metric}{pruned if rungs else ''}",
            "",
            f"{len(plan.trials)} random points as an example, all of them valid:",
            *lines,
        ]
    command = [f"--config={parsed.config}", f"--dir={folder}"]
    command += [f"--config.{field}={text}" for field, text in parsed.overrides.items()]
    lines += ["", "run this on any number of machines that share the folder:"]
    return [*lines, f"  nanojaxgpt sweep run {shlex.join(command)}"]


def status(
    parsed: argparse.Namespace, arguments: list[str], folder: Path, trials: list[Trial], search: Any
) -> list[str]:
    """Return how the trials stand, and how many a search has still to draw."""
    from nanojaxgpt.sweep.report import status_lines

    lines = status_lines(folder, trials)
    return [*lines, f"{search.left()} of {search.tpe.num} to be drawn"] if search else lines


def report(
    parsed: argparse.Namespace, arguments: list[str], folder: Path, trials: list[Trial], search: Any
) -> list[str]:
    """Write the report; return its text."""
    from nanojaxgpt.sweep.report import write_report

    metric = parsed.metric or (search.tpe.metric if search else "validation_loss")
    maximize = parsed.maximize or bool(search and search.tpe.maximize)
    return write_report(folder, trials, metric, maximize)


def run_missing(
    parsed: argparse.Namespace, arguments: list[str], folder: Path, trials: list[Trial], search: Any
) -> list[str]:
    """Run what is missing here, in as many processes as were asked for, or by SLURM."""
    if parsed.slurm:
        from nanojaxgpt.sweep.slurm import submit_workers

        command = ["sweep", *(a for a in arguments if a != "--dry_run"), "--slurm=0"]
        command += ["--slurm_options="]
        return submit_workers(
            command, parsed.slurm, parsed.slurm_options, folder / "slurm", parsed.dry_run
        )
    if parsed.workers > 1:
        from nanojaxgpt.sweep.launch import launch_workers

        command = [sys.executable, "-m", "nanojaxgpt", "sweep", *arguments, "--workers=1"]
        launch_workers(command, parsed.workers)
        return []
    from nanojaxgpt.sweep.run import run_trials

    say = functools.partial(print, flush=True)
    run_trials(folder, trials, parsed.mode, parsed.width, say, search)
    return []


COMMANDS = {
    "sweep": Command(
        sweep,
        "plan|run|status|resume|report --config=...",
        "many runs from one experiment, and a report",
        order=10,
        writes_files=True,
    )
}
