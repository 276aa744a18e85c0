"""In: the arguments of `nanojaxgpt train`. Out: a run, trained or resumed."""

from pathlib import Path

from nanojaxgpt import rundir
from nanojaxgpt.arguments import (
    TEAM,
    Command,
    check_team,
    open_experiment,
    open_team,
    run_folder,
)
from nanojaxgpt.data.loader import check_data
from nanojaxgpt.trackers import check_installed


def train(arguments: list[str]) -> None:
    """Train an experiment, or resume a run that was stopped.

    Without --config, use RUN's own config; without RUN, use runs/EXPERIMENT[-VARIANT].
    """
    parsed, cfg = open_experiment("train", train.__doc__, arguments, TEAM)
    run = run_folder(parsed) if parsed.config else Path(parsed.run)
    check_team(parsed)
    rundir.check_folder("--run", run)
    rundir.check_start(cfg, run)
    check_installed(cfg.train.trackers)
    if not parsed.multihost:  # several hosts could see a shared file system differently
        from nanojaxgpt import finish

        if finish.is_finished(cfg, run, print):
            finish.report_end(run, print)
            return
    check_data(cfg.data)
    from nanojaxgpt.training import fit

    if not parsed.multihost:
        fit(cfg, run)
        return
    with open_team(parsed) as team:
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
