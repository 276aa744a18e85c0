"""In: the arguments of `nanojaxgpt train`. Out: a run, trained or resumed."""

from pathlib import Path

from nanojaxgpt import rundir
from nanojaxgpt.arguments import Command, integer, number, open_experiment, run_folder
from nanojaxgpt.console import explain
from nanojaxgpt.data.loader import check_data
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.trackers import check_installed


def train(arguments: list[str]) -> None:
    """Train an experiment, or resume a run that was stopped.

    Without --config, use RUN's own config; without RUN, use runs/EXPERIMENT[-VARIANT].
    """
    options = {
        "multihost": {
            "action": "store_true",
            "help": "train with other processes; see docs/hosts.md",
        },
        "coordinator": {"default": "", "help": "HOST:PORT of process 0; default: detected"},
        "num_processes": {
            "default": -1,
            "type": integer(1),
            "help": "processes on all hosts; default: detected",
        },
        "process_id": {
            "default": -1,
            "type": integer(0),
            "help": "its index, from 0; default: detected",
        },
        "join_seconds": {
            "default": 300.0,
            "type": number(1, 1e6),
            "help": "seconds to wait for the other processes; default: 300",
        },
    }
    parsed, cfg = open_experiment("train", train.__doc__, arguments, options)
    run = run_folder(parsed) if parsed.config else Path(parsed.run)
    given = (parsed.coordinator, parsed.num_processes, parsed.process_id)
    if not parsed.multihost and given != ("", -1, -1):
        raise ConfigError("--coordinator, --num_processes and --process_id need --multihost")
    rundir.check_folder("--run", run)
    rundir.check_start(cfg, run)
    check_installed(cfg.train.trackers)
    if not parsed.multihost:  # several hosts could see a shared file system differently
        from nanojaxgpt import finish

        if finish.is_finished(cfg, run, print):
            finish.report_end(run, print)
            return
    check_data(cfg.data)
    from nanojaxgpt.hosts.joining import joined
    from nanojaxgpt.training import fit

    if not parsed.multihost:
        fit(cfg, run)
        return
    with joined(*given, parsed.join_seconds, explain) as team:
        fit(cfg, run, team=team)


COMMANDS = {
    "train": Command(
        train,
        "--config=EXPERIMENT.py[:VARIANT] [--run=RUN]",
        "train, or resume RUN",
        order=1,
        writes_files=True,
    )
}
