"""In: the arguments after a command. Out: its options, and the config that they name."""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from nanojaxgpt import config, rundir
from nanojaxgpt.checks import range_problem, read_float, read_int, show
from nanojaxgpt.config.sections import Config, Sample
from nanojaxgpt.console import explain
from nanojaxgpt.errors import Answered, ConfigError
from nanojaxgpt.names import unknown_option

if TYPE_CHECKING:
    from nanojaxgpt.hosts.team import Team

MAX_INT = 2**31 - 1  # as for the fields of the config
MODEL = ("MODEL", "a run directory, a Hugging Face folder, a .gguf file, or hf:OWNER/NAME")
HELP = {
    "prompt": "the text to continue; empty for a new document",
    "stop": "a string to stop before; repeat the option for several, empty for none",
    "end_ids": "token ids to stop at, besides the tokenizer's end token, as in 5,6",
}


class Command(NamedTuple):
    """A command of the command line, and its line in `nanojaxgpt --help`."""

    run: Callable[[list[str]], None]
    usage: str  # the arguments, without the command's name
    about: str
    order: int  # of the line
    writes_files: bool = False  # its results: it goes on where its output can't be written


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ConfigErrors."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of leaving the process."""
        start = message if len(message) <= 300 else f"{message[:300]}..."
        raise ConfigError(f"{start}; see nanojaxgpt {self.prog.split()[-1]} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Raise Answered, which tells --help from an experiment that calls sys.exit."""
        raise Answered(status)


def integer(low: int, high: int = MAX_INT) -> Callable[[str], int]:
    """Return a `type` for an option: an integer from `low` to `high`."""
    return lambda text: in_range(text, read_int, low, high)


def number(low: float, high: float) -> Callable[[str], float]:
    """Return a `type` for an option: a number from `low` to `high`."""
    return lambda text: in_range(text, read_float, low, high)


DRAFTING: dict[str, dict[str, Any]] = {  # of the commands with an engine
    "lookahead": {"default": 0, "type": integer(0, 15), "help": "tokens that are guessed and "
                  "verified at once: from the text before, which is faster where answers copy, or "
                  "by --draft; default with that: 4"},
    "draft": {"default": "", "metavar": "MODEL", "help": "a smaller model with the same tokenizer, "
              "which guesses these tokens"},
}  # fmt: skip


def integers(low: int) -> Callable[[str], list[int]]:
    """Return a `type` for an option: comma-separated integers, each at least `low`."""
    return lambda text: [in_range(part, read_int, low, MAX_INT) for part in text.split(",")]


def in_range(text: str, read: Callable[[str], Any], low: float, high: float) -> Any:
    """Return the number in `text`. Raises ArgumentTypeError where it is none, or out of range."""
    try:
        value = read(text)
    except ValueError as error:
        kind = "an integer" if read is read_int else "a number"
        raise argparse.ArgumentTypeError(f"{show(text)} is not {kind}") from error
    if problem := range_problem(value, low, high):
        raise argparse.ArgumentTypeError(f"{show(value)} {problem}")
    return value


TEAM: dict[str, dict[str, Any]] = {  # the options of a command that several processes run as one
    "multihost": {"default": False, "action": "store_true",
                  "help": "run with other processes; see docs/hosts.md"},
    "coordinator": {"default": "", "help": "HOST:PORT of process 0; default: detected"},
    "num_processes": {"default": -1, "type": integer(1),
                      "help": "processes on all hosts; default: detected"},
    "process_id": {"default": -1, "type": integer(0),
                   "help": "its index, from 0; default: detected"},
    "join_seconds": {"default": 300.0, "type": number(1, 1e6),
                     "help": "seconds to wait for the other processes; default: 300"},
}  # fmt: skip


def split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the other arguments, and {field: text} of each --config.FIELD=VALUE."""
    others, overrides, waiting = [], {}, list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not argument.startswith("--config."):
            others.append(argument)
            continue
        name, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            if not waiting:
                raise ConfigError(f"{argument} has no value; write {argument}=VALUE")
            text = waiting.pop(0)
        overrides[name] = text
    return others, overrides


def parse(
    command: str,
    about: str | None,
    arguments: list[str],
    options: dict[str, dict[str, Any]],
    path: tuple[str, str] = ("RUN", "the run directory"),
    more: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> Any:
    """Return the parsed arguments of a command: RUN or --run, its options, and the overrides.

    The first line of `about` heads the command's --help; `path` is the name and the help of the
    positional argument, and `more` has the settings of those after it. Raises ConfigError.
    """
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise ConfigError(f"the argument {show(argument)} is not valid UTF-8") from None
        if "\0" in argument:
            raise ConfigError(f"the argument {show(argument)} contains a NUL character")
    prog, first = f"nanojaxgpt {command}", (about or "").split("\n")[0]  # python -OO drops it
    parser = Parser(prog=prog, description=first, allow_abbrev=False)
    parser.add_argument("path", metavar=path[0], nargs="?", help=path[1])
    for name, settings in more.items():
        given: dict[str, Any] = {"nargs": "?", **settings}
        parser.add_argument(name, **given)
    parser.add_argument("--run", default="", help="the same as the positional argument")
    shown = "show the warnings of XLA, Orbax and other libraries"
    parser.add_argument("--verbose", action="store_true", help=shown)
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    own, overrides = split_overrides(arguments)
    parsed, unknown = parser.parse_known_args(own)
    if unknown and unknown[0].startswith("-"):
        flags = [flag for action in parser._actions for flag in action.option_strings]
        known = [name for name, _ in config.fields(config.base_config())]
        raise ConfigError(unknown_option(unknown[0], flags, known))
    if unknown:
        raise ConfigError(f"unexpected argument {show(unknown[0])} after {show(parsed.path)}")
    if parsed.run and parsed.path:
        raise ConfigError(f"two runs given: {parsed.path} and --run={parsed.run}; give one")
    parsed.run = parsed.run or parsed.path
    parsed.overrides = overrides
    return parsed


def open_experiment(
    command: str, about: str | None, arguments: list[str], options: dict[str, dict[str, Any]]
) -> tuple[argparse.Namespace, Config]:
    """Return the parsed arguments of a command that takes --config or a RUN, and the config."""
    settings = {"default": "", "help": "the experiment: FILE.py or FILE.py:VARIANT"}
    parsed = parse(command, about, arguments, {"config": settings} | options)
    if is_experiment(parsed.path):
        raise ConfigError(
            f"{parsed.path} is an experiment file, not a run directory; write "
            f"nanojaxgpt {command} --config={parsed.path}"
        )
    if parsed.config:
        cfg = config.typed(config.load_config(parsed.config, parsed.overrides))
        cfg = adopt(cfg, run_folder(parsed))
    elif parsed.run:
        cfg = config.override_config(rundir.read_config(Path(parsed.run)), parsed.overrides)
    else:
        raise ConfigError(
            f"{command} needs --config=FILE.py, such as experiments/quickstart.py, or a RUN"
        )
    rundir.check_folder("data.cache_dir", config.cache_dir(cfg))
    return parsed, cfg


def run_folder(parsed: argparse.Namespace) -> Path:
    """Return the run directory of a command with --config: RUN, or runs/EXPERIMENT[-VARIANT]."""
    name, _, variant = parsed.config.partition(":")
    return Path(parsed.run or Path("runs") / (Path(name).stem + (f"-{variant}" if variant else "")))


def adopt(cfg: Config, run: Path) -> Config:
    """Return the config with the section `model` of init.from_model; see `adopt_model`."""
    if not cfg.init.from_model:
        return cfg
    from nanojaxgpt.interchange.opening import adopt_model

    return adopt_model(cfg, run)


def check_team(parsed: argparse.Namespace) -> None:
    """Raise ConfigError where other options of TEAM stand without --multihost."""
    given = parsed.coordinator, parsed.num_processes, parsed.process_id
    if not parsed.multihost and given != ("", -1, -1):
        raise ConfigError("--coordinator, --num_processes and --process_id need --multihost")


@contextmanager
def open_team(parsed: argparse.Namespace) -> Iterator["Team"]:
    """Give the team of this process by the options TEAM; without --multihost it is alone."""
    from nanojaxgpt.hosts.joining import joined
    from nanojaxgpt.hosts.team import ALONE

    if not parsed.multihost:
        yield ALONE
        return
    given = parsed.coordinator, parsed.num_processes, parsed.process_id
    with joined(*given, parsed.join_seconds, explain) as team:
        yield team


def is_experiment(path: str | None) -> bool:
    """Return whether a path that should be a run directory is a Python file, `FILE.py:VARIANT`."""
    return (path or "").partition(":")[0].endswith(".py")


def open_model_config(
    command: str,
    about: str | None,
    arguments: list[str],
    options: dict[str, dict[str, Any]],
    more: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> tuple[argparse.Namespace, Config]:
    """Return the parsed arguments of a command that reads a MODEL, and the config of that.

    `parsed.source` is the run directory, or the opened model of another format. `parsed.mesh` holds
    the sizes of the mesh where they are given, else None: one device.
    """
    step = {"default": "", "help": "step of a checkpoint, or best; default: the newest"}
    parsed = parse(command, about, arguments, options | {"step": step}, MODEL, more)
    if not parsed.run:
        raise ConfigError(f"{command} needs a model: nanojaxgpt {command} MODEL, a run directory, "
                          "a Hugging Face folder, a .gguf file or hf:OWNER/NAME")  # fmt: skip
    if is_experiment(parsed.run):
        run = Path("runs") / Path(parsed.run.partition(":")[0]).stem
        raise ConfigError(
            f"{parsed.run} is an experiment file, not a run directory; train it with nanojaxgpt "
            f"train --config={parsed.run}, then nanojaxgpt {command} {run}"
        )
    if parsed.step not in ("", "best"):
        try:
            in_range(parsed.step, read_int, 1, MAX_INT)
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"--step: {error}; give the step of a checkpoint, or best") from None
    from nanojaxgpt.interchange.opening import config_of, find_model

    parsed.source = find_model(parsed.run)
    if parsed.step and not isinstance(parsed.source, Path):
        raise ConfigError(f"--step: {parsed.run} has no checkpoints; leave it out")
    cfg = config.override_config(config_of(parsed.source), parsed.overrides)
    has_mesh = any(name.startswith("mesh.") for name in parsed.overrides)
    parsed.mesh = cfg.mesh.given() if has_mesh else None
    return parsed, cfg


def open_for_sampling(
    command: str,
    about: str | None,
    arguments: list[str],
    options: dict[str, dict[str, Any]] | None = None,
    more: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    without: Sequence[str] = (),
) -> tuple[argparse.Namespace, Config]:
    """As `open_model_config`, with each field of the section `sample` as an option too.

    But for those of `without`.
    """
    names = [name for name in Sample().rules() if name not in without]
    fields: dict[str, dict[str, Any]] = {
        name: {"default": None, "help": HELP.get(name, f"overrides the config's sample.{name}")}
        for name in names
    }
    fields["stop"]["action"] = "append"
    parsed, cfg = open_model_config(command, about, arguments, fields | (options or {}), more)
    if parsed.stop is not None:
        parsed.stop = repr(tuple(filter(None, parsed.stop)))
    given = {f"sample.{name}": getattr(parsed, name) for name in names}
    cfg = config.override_config(cfg, {k: v for k, v in given.items() if v is not None})
    return parsed, cfg


def chosen_step(parsed: argparse.Namespace) -> int:
    """Return the checkpoint's step that --step names; 0 for the newest, or a model without any."""
    run, text = parsed.source, parsed.step
    if text != "best":
        return read_int(text) if text else 0
    from nanojaxgpt.metrics import validation_losses

    saved = rundir.saved_steps(run / "checkpoints")
    losses = {step: loss for step, loss in validation_losses(run).items() if step in saved}
    if not losses:
        raise ConfigError(f"no checkpoint of {run} has a validation loss; leave out --step=best")
    return min(losses, key=lambda step: losses[step])
