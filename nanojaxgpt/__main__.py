"""The command line: `nanojaxgpt COMMAND ...`, or `python -m nanojaxgpt COMMAND ...`.

Commands import jax after they have checked the config, so that a mistake fails immediately.
"""

import sys

from nanojaxgpt.hosts import process

if __name__ == "__main__":
    process.end_at_signals()

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanojaxgpt import __version__, config, console, rundir
from nanojaxgpt.arguments import (
    chosen_step,
    integer,
    integers,
    number,
    open_experiment,
    open_run,
    parse,
)
from nanojaxgpt.commands.diff import diff
from nanojaxgpt.commands.sample import sample
from nanojaxgpt.config.sections import Data as DataConfig
from nanojaxgpt.console import explain, warn
from nanojaxgpt.data.loader import check_data
from nanojaxgpt.errors import OK, ConfigError, DataError, MemoryExceeded
from nanojaxgpt.sweep.verb import sweep
from nanojaxgpt.trackers import check_installed

USAGE = """\
nanojaxgpt COMMAND ...

  train  --config=EXPERIMENT.py[:VARIANT] [--run=RUN]   train, or resume RUN
  eval   RUN [--data=SOURCE]                            validation loss, bits per byte
  sample RUN --prompt=TEXT                              generate text from a prompt
  diff   RUN RUN [--step=N] [--check] [--json]          what differs between two runs
  prepare --config=EXPERIMENT.py[:VARIANT]              tokenize the corpus ahead of training
  inspect --config=EXPERIMENT.py [--step=N] [--rows=4]  print the batch of a step
  coordcheck --config=EXPERIMENT.py                     activations over widths, to check muP
  rehearse --config=EXPERIMENT.py --topology=v5e:4x4    memory and speed on hardware you don't have
  sweep  plan|run|status|resume|report --config=...     many runs from one experiment, and a report
  reproduce experiments/papers/NAME.py [--dir=DIR]      a paper's figures beside measured ones

--config.SECTION.FIELD=VALUE sets any field of the config, as in --config.optim.learning_rate=3e-4.
nanojaxgpt COMMAND --help lists a command's options.
"""


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
    name, _, variant = parsed.config.partition(":")
    run = Path(parsed.run or Path("runs") / (Path(name).stem + (f"-{variant}" if variant else "")))
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
    check_data(DataConfig(**cfg.data))
    from nanojaxgpt.hosts.joining import joined
    from nanojaxgpt.train import fit

    if not parsed.multihost:
        fit(cfg, run)
        return
    with joined(*given, parsed.join_seconds, explain) as team:
        fit(cfg, run, team=team)


def prepare(arguments: list[str]) -> None:
    """Tokenize the corpus of an experiment or a RUN ahead of training; print a summary.

    A preparation that was stopped is resumed; one that is complete is opened and checked.
    """
    parsed, cfg = open_experiment("prepare", prepare.__doc__, arguments, {})
    check_data(DataConfig(**cfg.data))
    from nanojaxgpt.data import store
    from nanojaxgpt.data.loader import inherited_tokenizer

    said: list[str] = []

    def report(line: str) -> None:
        said.append(line)
        warn(line)

    run = Path(parsed.run) if parsed.run else None
    inherited = inherited_tokenizer(cfg, warn, run)
    corpus = store.prepare(DataConfig(**cfg.data), config.cache_dir(cfg), report, inherited)
    print_table(store.describe(corpus))
    if not said:
        warn("everything was prepared already")


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print rows in columns: the first and the last to the left, the numbers to the right."""
    *widths, _ = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *numbers, last in rows:
        cells = [n.rjust(width) for n, width in zip(numbers, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells, last]))


def inspect(arguments: list[str]) -> None:
    """Print the batch of one step as the model sees it: text, segments, scored targets."""
    options = {
        "step": {"default": 1, "type": integer(1), "help": "step, as in the log; default: 1"},
        "rows": {"default": 4, "type": integer(0), "help": "rows to print in full; default: 4"},
        "split": {"default": "train", "choices": ("train", "validation"), "help": "default: train"},
    }
    parsed, cfg = open_experiment("inspect", inspect.__doc__, arguments, options)
    check_data(DataConfig(**cfg.data))
    from nanojaxgpt.data.loader import prepare_data
    from nanojaxgpt.data.rows import make_ramp
    from nanojaxgpt.data.show import show_step

    data = prepare_data(cfg, warn, Path(parsed.run) if parsed.run else None)
    train = cfg.train
    ramp = make_ramp(train.batch_size, train.ramp_batch_size, train.ramp_steps)
    if parsed.split == "validation":
        ramp = make_ramp(cfg.eval.batch_size or train.batch_size)
    lines = show_step(
        data, parsed.split, parsed.step, cfg.model.seq_len, ramp, train.seed, parsed.rows
    )
    for line in lines:
        print(line)


def rehearse(arguments: list[str]) -> None:
    """Compile the train step for hardware you don't have; print its memory, traffic and bounds.

    The chips: v4, v5e, v5p, v6e with a torus (v5e:16x16), a100, h100, h200, cpu with a number.
    Raises MemoryExceeded (exit 6) where the step does not fit.
    """
    options = {
        "topology": {"default": "", "help": "the hardware: v5e:16x16, v5p:4x4x4, h100:8, cpu:8"},
        "slices": {"default": 1, "type": integer(1), "help": "TPU slices; default: 1"},
        "mesh": {
            "default": "config",
            "choices": ("config", "auto"),
            "help": "auto: try meshes and remat policies; default: those of the config",
        },
        "json": {"default": "", "help": "also write the results to this file"},
    }
    parsed, cfg = open_experiment("rehearse", rehearse.__doc__, arguments, options)
    if parsed.json:
        rundir.check_file("--json", Path(parsed.json))
    from nanojaxgpt.rehearse.chips import parse_topology

    topology = parse_topology(parsed.topology, parsed.slices)
    from nanojaxgpt.data.loader import prepare_data, resolve
    from nanojaxgpt.rehearse import report, search, step, targets

    target = targets.open_target(topology)
    if not cfg.model.vocab_size:
        cfg = resolve(cfg, prepare_data(cfg, warn, Path(parsed.run) if parsed.run else None))
    name = parsed.config or parsed.run
    if parsed.mesh == "auto":
        found = search.search(cfg, target, warn)
        lines = report.search_lines(name, target, found)
    else:
        found = [step.rehearse_step(cfg, target)]
        lines = report.lines(name, target, found[0])
    print("\n".join(lines))
    if parsed.json:
        described = [report.to_dict(name, target, one) for one in found]
        rundir.write_text(Path(parsed.json), json.dumps(described, indent=2) + "\n")
    if not any(one.memory.fits for one in found):
        raise MemoryExceeded(f"the step does not fit the memory of {topology.name}")


def evaluate(arguments: list[str]) -> None:
    """Print the validation loss and bits per byte of a run's checkpoint, as JSON.

    With --data=SOURCE, evaluate on all of another source, with the run's own tokenizer.
    """
    about = "evaluate on this source, written as in data.source; default: the validation split"
    parsed, cfg = open_run("eval", evaluate.__doc__, arguments, {"data": {"help": about}})
    import jax

    from nanojaxgpt import memory, sharding
    from nanojaxgpt.checkpoint import abstract_params, load_params
    from nanojaxgpt.data.loader import prepare_data
    from nanojaxgpt.model.config import ModelConfig
    from nanojaxgpt.model.transformer import Transformer
    from nanojaxgpt.train import make_evaluation

    if parsed.data:
        cfg, data = open_other_data(cfg, parsed)
    else:
        data = prepare_data(cfg, warn, Path(parsed.run))
        rundir.check_data(Path(parsed.run), data.identity)
    try:
        mesh = sharding.make_mesh(cfg.mesh)
    except ConfigError:  # the run's mesh does not fit this machine: one device does
        mesh = sharding.make_mesh({}, jax.devices()[:1])
    run, model_cfg = Path(parsed.run), ModelConfig(**cfg.model)
    lower = memory.EVALUATION_ADVICE
    with memory.explained("the evaluation", mesh, lambda: lower), jax.set_mesh(mesh):
        memory.check_model("the evaluation", cfg, mesh, 0, lower)
        held = {"parameters": abstract_params(model_cfg, mesh)}
        run_evaluation = make_evaluation(cfg, data, mesh, Transformer(model_cfg), held)
        step, params = load_params(run, model_cfg, mesh, chosen_step(run, parsed.step), warn)
        found = run_evaluation(params)
    if not found["tokens"] and parsed.data:
        raise DataError(f"{parsed.data} has nothing to score: it is shorter than two tokens")
    if not found["tokens"]:
        raise DataError(
            f"{run} has no held-out data to validate on; set data.validation_fraction, "
            "data.validation_documents or data.validation_source (for a task: train_fraction), "
            "and train again"
        )
    source = {"source": parsed.data} if parsed.data else {}
    print(json.dumps({"step": step, **source, **found}))


def open_other_data(cfg: Any, parsed: Any) -> tuple[Any, Any]:
    """Return the config and the data to evaluate the source --data of `eval` on, all of it."""
    from nanojaxgpt.config.sections import Data as DataConfig
    from nanojaxgpt.data.loader import load_run_tokenizer, open_source

    # What the run's config says of its own source: which hash it has, how much is looked at.
    own = {"data.sha256": "", "eval.num_batches": "0"}
    cfg = config.override_config(cfg, own | parsed.overrides)
    tokenizer = load_run_tokenizer(Path(parsed.run), warn)
    data = DataConfig(**cfg.data)
    return cfg, open_source(parsed.data, tokenizer, data, config.cache_dir(cfg), warn)


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
    check_data(DataConfig(**cfg.data))
    from nanojaxgpt.coordcheck import check_coordinates, save, table

    result = check_coordinates(cfg, parsed.widths, parsed.steps, warn)
    for line in table(result):
        print(line)
    print(save(result, folder))


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
    from nanojaxgpt.paper import first_seeds, load_paper

    paper = first_seeds(load_paper(parsed.run, parsed.overrides), parsed.seeds)
    from nanojaxgpt.reproduce import reproduce as run_paper
    from nanojaxgpt.reproduce import save

    seeds = f" --seeds={parsed.seeds}" if parsed.seeds else ""
    command = f"nanojaxgpt reproduce {parsed.run}{seeds}"
    path = save(run_paper(paper, folder, warn), folder, command)
    print(path.read_text() + str(path))


VERBS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "eval": evaluate,
    "sample": sample,
    "diff": diff,
    "prepare": prepare,
    "inspect": inspect,
    "coordcheck": coordcheck,
    "sweep": sweep,
    "rehearse": rehearse,
    "reproduce": reproduce,
}


# The commands whose results are files: their output may be lost, the work continues.
WORKING = ("train", "prepare", "sweep", "reproduce", "coordcheck")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit code (see errors.py)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console.open_standard_streams()
    name = arguments[0] if arguments else ""
    if "--verbose" not in arguments:
        console.quiet_libraries()
    with process.ending_at_signals(), console.guarded_output(optional=name in WORKING):
        try:
            run_command(name, arguments[1:])
            console.LIBRARY_ERRORS.report()
            sys.stdout.flush()
            return OK if arguments else ConfigError.exit_code
        except BaseException as error:
            return explain(error)


def run_command(name: str, arguments: list[str]) -> None:
    """Run the command of this name, or print the help. Raises ConfigError for an unknown one."""
    if name in ("", "-h", "--help", "help"):
        print(USAGE, end="")
    elif name == "--version":
        print(__version__)
    elif name in VERBS:
        process.keep_freed_memory()
        VERBS[name](arguments)
    else:
        raise ConfigError(config.unknown_name("command", name, list(VERBS)))


if __name__ == "__main__":
    process.leave(main())
