"""In: the words after a verb. Out: what they ask for, and the config that they name."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from ml_collections import ConfigDict

from nanojaxgpt import config, rundir
from nanojaxgpt.errors import Answered, ConfigError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are ConfigErrors."""

    def error(self, message: str) -> None:
        """Raise ConfigError instead of leaving the process."""
        raise ConfigError(f"{message}; see nanojaxgpt {self.prog.split()[-1]} --help")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Raise Answered, which tells --help from an experiment that calls sys.exit."""
        raise Answered(status)


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
    verb: str,
    about: str | None,
    arguments: list[str],
    options: dict[str, dict[str, Any]],
    path: tuple[str, str] = ("RUN", "the run directory"),
) -> Any:
    """Return the parsed arguments of a verb: RUN or --run, its options, and the overrides.

    The first line of `about` heads the verb's --help; `path` is the name and the help of what
    stands without a flag.
    """
    prog, first = f"nanojaxgpt {verb}", (about or "").split("\n")[0]  # python -OO drops it
    parser = Parser(prog=prog, description=first, allow_abbrev=False)
    parser.add_argument("path", metavar=path[0], nargs="?", help=path[1])
    parser.add_argument("--run", default="", help="the same, as a flag")
    shown = "show the warnings of XLA, Orbax and other libraries"
    parser.add_argument("--verbose", action="store_true", help=shown)
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    others, overrides = split_overrides(arguments)
    parsed, unknown = parser.parse_known_args(others)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise ConfigError(config.unknown_name("option", unknown[0].split("=")[0], flags))
    if parsed.run and parsed.path:
        raise ConfigError(f"two runs given: {parsed.path} and --run={parsed.run}")
    parsed.run = parsed.run or parsed.path
    parsed.overrides = overrides
    return parsed


def open_experiment(
    verb: str, about: str | None, arguments: list[str], options: dict[str, dict[str, Any]]
) -> tuple[Any, ConfigDict]:
    """Return the parsed arguments of a verb that takes --config or a RUN, and the config."""
    settings = {"default": "", "help": "the experiment: FILE.py or FILE.py:VARIANT"}
    parsed = parse(verb, about, arguments, {"config": settings} | options)
    if parsed.config:
        return parsed, config.load_config(parsed.config, parsed.overrides)
    if parsed.run:
        return parsed, config.override_config(rundir.load_run(Path(parsed.run)), parsed.overrides)
    raise ConfigError(f"say what to {verb}: --config=experiments/quickstart.py, or a RUN")


def open_run(
    verb: str, about: str | None, arguments: list[str], options: dict[str, dict[str, Any]]
) -> tuple[Any, ConfigDict]:
    """Return the parsed arguments of a verb that reads a run, and the run's config."""
    step = {"default": "", "help": "a checkpoint's step, or best; default: the newest"}
    parsed = parse(verb, about, arguments, options | {"step": step})
    if not parsed.run:
        raise ConfigError(f"which run? nanojaxgpt {verb} RUN")
    if parsed.step not in ("", "best") and not parsed.step.isdecimal():
        raise ConfigError(f"--step={parsed.step} is neither a number nor best")
    return parsed, config.override_config(rundir.load_run(Path(parsed.run)), parsed.overrides)


def chosen_step(run: Path, text: str) -> int:
    """Return the checkpoint's step that --step names; 0 for the newest."""
    if text != "best":
        return int(text or 0)
    from nanojaxgpt.checkpoint import saved_steps
    from nanojaxgpt.metrics import validation_losses

    saved = saved_steps(run / "checkpoints")
    losses = {step: loss for step, loss in validation_losses(run).items() if step in saved}
    if not losses:
        raise ConfigError(f"no checkpoint of {run} has a validation loss; leave out --step=best")
    return min(losses, key=losses.get)
