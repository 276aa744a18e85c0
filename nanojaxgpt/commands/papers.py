"""In: the arguments of `coordcheck` and `reproduce`. Out: a paper's figures, measured here."""

from pathlib import Path

from nanojaxgpt import rundir
from nanojaxgpt.arguments import Command, integer, integers, open_experiment, parse
from nanojaxgpt.console import warn
from nanojaxgpt.data.loader import check_data
from nanojaxgpt.errors import ConfigError


def coordcheck(arguments: list[str]) -> None:
    """Train an experiment at several widths; print how activations grow, with and without muP.

    The numbers and a plot are written to RUN (default: runs/coordcheck).
    """
    options = {
        "widths": {
            "default": "64,128,256,512",
            "type": integers(1),
            "help": "comma-separated; default: 64,128,256,512",
        },
        "steps": {"default": 4, "type": integer(0), "help": "training steps; default: 4"},
    }
    parsed, cfg = open_experiment("coordcheck", coordcheck.__doc__, arguments, options)
    folder = Path(parsed.run or "runs/coordcheck")
    rundir.check_folder("--run", folder)
    check_data(cfg.data)
    from nanojaxgpt.papers.coordcheck import check_coordinates, save_coordinates, table

    result = check_coordinates(cfg, parsed.widths, parsed.steps, warn)
    for line in table(result):
        print(line)
    print(save_coordinates(result, folder))


def reproduce(arguments: list[str]) -> None:
    """Run the experiments of a paper's file; report published figures beside measured ones.

    Resumes where it was stopped. --config.FIELD=VALUE may say where the data are, no more.
    """
    options = {
        "dir": {"default": "", "help": "folder of the runs and the report; default: runs/NAME"},
        "seeds": {
            "default": 0,
            "type": integer(0),
            "help": "use only the first N seeds; default: all",
        },
    }
    place = ("PAPER.py", "a file that states claims and criteria")
    parsed = parse("reproduce", reproduce.__doc__, arguments, options, place)
    if not parsed.run:
        raise ConfigError("name a paper: nanojaxgpt reproduce experiments/papers/NAME.py")
    folder = Path(parsed.dir or Path("runs") / Path(parsed.run).stem)
    rundir.check_folder("--dir", folder)
    from nanojaxgpt.papers.paper import first_seeds, load_paper

    paper = first_seeds(load_paper(parsed.run, parsed.overrides), parsed.seeds)
    from nanojaxgpt.papers.reproduce import reproduce as run_paper
    from nanojaxgpt.papers.reproduce import save_report

    seeds = f" --seeds={parsed.seeds}" if parsed.seeds else ""
    command = f"nanojaxgpt reproduce {parsed.run}{seeds}"
    path = save_report(run_paper(paper, folder, warn), folder, command)
    print(path.read_text() + str(path))


COMMANDS = {
    "coordcheck": Command(
        coordcheck,
        "--config=EXPERIMENT.py",
        "activations over widths, to check muP",
        order=8,
        writes_files=True,
    ),
    "reproduce": Command(
        reproduce,
        "experiments/papers/NAME.py [--dir=DIR]",
        "a paper's figures beside measured ones",
        order=11,
        writes_files=True,
    ),
}
