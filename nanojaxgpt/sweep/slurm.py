"""In: a sweep's command and how many workers. Out: a SLURM array of them, submitted by submitit."""

import inspect
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from nanojaxgpt.errors import PREEMPTED, ConfigError
from nanojaxgpt.names import unknown_name

# A worker that was stopped has saved its trial and ends with 75: it is queued again.
AGAIN = [
    "code=$?",
    f'if [ "$code" -eq {PREEMPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
    'exit "$code"',
]
# submitit asks for USR2 and lets TERM pass by; the worker's own handlers come after its, and
# turn TERM, from the time limit or a preemption, into a save.
SETTINGS: dict[str, Any] = {
    "time": 24 * 60,
    "stderr_to_stdout": True,
    "additional_parameters": {"signal": "TERM@120", "requeue": True},
    "teardown": AGAIN,
}


class Worker:
    """What an array's task calls: `nanojaxgpt` with these arguments, in this process."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments

    def __call__(self) -> None:
        """Run to the end. Raises SystemExit with the exit code, unless that is 0."""
        sys.argv = ["nanojaxgpt", *self.arguments]
        try:
            runpy.run_module("nanojaxgpt", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise


def parse_options(text: str, known: list[str]) -> dict[str, Any]:
    """Return the settings that `partition=gpu,time=60` gives. Raises ConfigError."""
    options = {}
    for part in text.split(",") if text else []:
        name, equals, value = part.partition("=")
        if not equals or name not in known:
            raise ConfigError(f"--slurm_options: {unknown_name('option', name, known)}")
        options[name] = int(value) if value.isdecimal() else value
    return options


def submit_workers(
    arguments: list[str], workers: int, options: str, folder: Path, dry_run: bool
) -> list[str]:
    """Submit as many workers of a command, logs under `folder`; return what to say about it.

    `options` are submitit's names of sbatch's (time in minutes). With `dry_run` the lines are the
    batch script. Raises ConfigError.
    """
    os.environ["SUBMITIT_LOG_LEVEL"] = "NOCONFIG"  # else it closes the log handlers of others
    try:
        from submitit.slurm import slurm
    except ImportError:
        raise ConfigError("--slurm needs submitit: pip install 'nanojaxgpt[slurm]'") from None
    folder = folder.absolute()
    known = list(inspect.signature(slurm._make_sbatch_string).parameters)
    free = [name for name in known if name not in ("command", "folder", "map_count", *SETTINGS)]
    settings: dict[str, Any] = SETTINGS | {"job_name": folder.parent.name}
    settings |= parse_options(options, ["time", *free])
    if dry_run:
        command = f"{sys.executable} -u -m submitit.core._submit {folder}"
        many: dict[str, Any] = {"map_count": workers} if workers > 1 else {}
        text = slurm._make_sbatch_string(command, folder, **many, **settings)
        return [text, f"# each of {workers}: nanojaxgpt {' '.join(arguments)}"]
    try:
        executor = slurm.SlurmExecutor(folder)
    except RuntimeError:
        raise ConfigError(
            "srun is not installed: submit from the cluster, or use --dry_run"
        ) from None
    executor.update_parameters(**settings)
    jobs = executor.map_array(Worker.__call__, [Worker(arguments)] * workers)
    job = jobs[0].job_id.split("_")[0]
    return [f"job {job}: {workers} workers, logs in {folder}; scancel {job} ends them for good"]
