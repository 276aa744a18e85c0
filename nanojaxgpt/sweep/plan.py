"""From an experiment file to the trials of its sweep, checked against every field of the config.

No jax before `describe`: a wrong field is answered before a backend starts.
"""

import inspect
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from nanojaxgpt import config
from nanojaxgpt.config import sections
from nanojaxgpt.config.sections import Config
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.rundir import write_text
from nanojaxgpt.sweep.space import Point, Space, Tpe, choice, draws

SEED = "train.seed"
EXAMPLES = 16  # points of a search that are checked ahead
PLAN_FILE = "sweep.json"


class Trial(NamedTuple):
    """One run of a sweep: `name` is the hash of `cfg` (in a paper that of arm and point).

    `point` is what the sweep sets in the config.
    """

    name: str
    point: Point
    cfg: Config


class Plan(NamedTuple):
    """What a sweep tries: `trials`, or what `tpe` draws of `base` as it goes, these for example."""

    base: Config
    trials: list[Trial]
    tpe: Tpe | None


def load_plan(experiment: str, overrides: dict[str, str]) -> Plan:
    """Return the points that the sweep of an experiment tries, in order, each once.

    `overrides` (from the command line) change every trial. Raises ConfigError, naming the
    point that does not fit the config; of a `tpe` some random points are looked at.
    """
    base = config.typed(config.load_config(experiment, overrides))
    found = load_sweep(experiment)
    if isinstance(found, Tpe):
        tpe, points = found, draws(found.space, EXAMPLES, found.seed).points()
    else:
        tpe, points = None, found.points()
    if not points:
        raise ConfigError(f"the sweep of {experiment} is an empty space")
    if twice := overrides.keys() & {field for point in points for field in point}:
        raise ConfigError(f"{', '.join(sorted(twice))} is both swept and set on the command line")
    trials: dict[str, Trial] = {}
    for number, point in enumerate(points, 1):
        try:
            trial = make_trial(base, point)
        except ConfigError as error:
            raise ConfigError(f"point {number} {error}") from None
        trials.setdefault(trial.name, trial)
    return Plan(base, list(trials.values()), tpe)


def save_plan(folder: Path, plan: Plan, experiment: str, overrides: dict[str, str]) -> None:
    """Write the plan into the sweep's folder, for `read_plan`. Raises ConfigError."""
    search = plan.tpe._asdict() if plan.tpe else {}
    search.pop("space", None)  # functions; what was drawn of it is in the journal
    written = dict(
        experiment=experiment,
        overrides=overrides,
        base=config.to_dict(plan.base),
        trials=[] if plan.tpe else [dict(name=t.name, point=t.point) for t in plan.trials],
        search=search,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / PLAN_FILE, json.dumps(written, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"can't write to the sweep's folder {folder}: {error}") from error


# What a damaged plan raises as it is read.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


def read_plan(folder: Path) -> Plan:
    """Return the plan that was last run in a sweep's folder. Raises ConfigError.

    The trials of a search, and the space that they are drawn from, are not in it.
    """
    path = folder / PLAN_FILE
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no {PLAN_FILE}, which `sweep run` writes; correct --dir, or name the "
            "experiment by --config"
        )
    try:
        written = json.loads(path.read_text())
        base = config.from_json(json.dumps(written["base"]), str(path))
        # A later version may have more fields, and so another hash: the name stays.
        named = [(entry["name"], make_trial(base, entry["point"])) for entry in written["trials"]]
        search = written["search"]
        tpe = Tpe(space=choice(SEED), **search) if search else None
    except UNREADABLE as error:
        raise ConfigError(f"{path} can't be read: {error!r}; name --config") from error
    return Plan(base, [trial._replace(name=name) for name, trial in named], tpe)


def load_trials(experiment: str, overrides: dict[str, str]) -> list[Trial]:
    """Return the trials of an experiment's sweep. Raises what `load_plan` raises."""
    return load_plan(experiment, overrides).trials


def load_sweep(experiment: str) -> Space | Tpe:
    """Return the result of a file's `sweep()` or `sweep(variant)`. Raises ConfigError."""
    path, _, variant = experiment.partition(":")
    module = config.load_module(path)
    if not callable(getattr(module, "sweep", None)):
        raise ConfigError(f"{path} has no function sweep() -> Space; docs/sweeps.md shows one")
    with config.running(path, "sweep()"):
        takes_variant = variant and inspect.signature(module.sweep).parameters
        found = module.sweep(variant) if takes_variant else module.sweep()
    if not isinstance(found, Space | Tpe):
        raise ConfigError(f"{path}: sweep returns a {type(found).__name__}, not a Space")
    return found


def make_trial(base: Config, point: Point) -> Trial:
    """Return the trial of a point. Raises ConfigError, which names the point."""
    try:
        cfg = set_point(base, point)
    except ConfigError as error:
        raise ConfigError(f"({show_point(point)}): {error}") from None
    values = dict(config.fields(cfg))
    return Trial(config.config_hash(cfg), {field: values[field] for field in point}, cfg)


def set_point(base: Config, point: Point) -> Config:
    """Return a copy of `base` with the values of a point, checked. Raises ConfigError."""
    known = dict(config.fields(base))
    plain = {name: plain_value(value, known.get(name)) for name, value in point.items()}
    return config.with_fields(base, plain)


def plain_value(value: Any, default: Any) -> Any:
    """Return a value of a point as the config holds it: no numpy scalars, no lists, 1.0 for 1."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, list):
        return tuple(value)
    if type(value) is int and isinstance(default, float):
        return float(value)
    return value


def show_point(point: Point) -> str:
    """Return a point as people read it: `learning_rate=0.001 seed=0`."""
    return " ".join(f"{field.split('.')[-1]}={value}" for field, value in point.items()) or "as is"


def program_key(cfg: Config) -> str:
    """Return the hash of all that is compiled: trials with the same key share their programs."""
    rules, values = sections.rules(), dict(config.fields(cfg))
    compiled = {n: v for n, v in values.items() if not (rules[n].traced or rules[n].host_only)}
    # Of these a part is compiled: whether there is an average or a KL term, and the patterns.
    compiled["optim.ema_decay"] = float(cfg.optim.ema_decay > 0)
    compiled["objective.kl"] = float(cfg.objective.kl > 0)
    patterns = (entry.rpartition("=")[0] for entry in cfg.optim.rate_multipliers)
    compiled["optim.rate_multipliers"] = tuple(patterns)
    return config.hash_fields(compiled)


def group_trials(trials: Iterable[Trial]) -> list[list[Trial]]:
    """Return the trials by the programs they share, in order of appearance."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(program_key(trial.cfg), []).append(trial)
    return list(groups.values())


def swept_fields(trials: Iterable[Trial]) -> list[str]:
    """Return the fields that differ between the trials, in the order of the points."""
    values: dict[str, set] = {}
    for trial in trials:
        for field, value in trial.point.items():
            values.setdefault(field, set()).add(value)
    return [field for field, found in values.items() if len(found) > 1]


def default_folder(experiment: str) -> Path:
    """Return the folder of an experiment's sweep: sweeps/EXPERIMENT[-VARIANT]."""
    path, _, variant = experiment.partition(":")
    return Path("sweeps") / (Path(path).stem + (f"-{variant}" if variant else ""))


def describe_plan(trials: list[Trial], report: Callable[[str], None]) -> list[str]:
    """Return the plan in lines: the programs, parameters and FLOPs, and every point.

    The data is opened for its vocabulary, and made where it is not there yet.
    """
    from nanojaxgpt.data.loader import prepare_data, resolve
    from nanojaxgpt.flops import train_flops
    from nanojaxgpt.model.parameters import count_params
    from nanojaxgpt.recorder import train_ramp

    groups, lines, total, data = group_trials(trials), [], 0, {}
    for number, group in enumerate(groups, 1):
        first = group[0].cfg
        key = first.data, first.init.from_run, first.init.from_model
        if key not in data:
            data[key] = prepare_data(first, report)
        model_cfg = resolve(first, data[key]).model
        ramp = train_ramp(first)
        rows = sum(ramp.before(trial.cfg.train.num_steps) for trial in group)
        flops = train_flops(model_cfg, model_cfg.seq_len) * rows
        total += flops
        lines.append(
            f"program {number}: {count(len(group), 'trial')}, "
            f"{count_params(model_cfg):,} parameters, {flops:.3g} FLOPs"
        )
        lines += [f"  {trial.name}  {show_point(trial.point)}" for trial in group]
    programs = count(len(groups), "program")
    return [f"{count(len(trials), 'trial')} in {programs}, {total:.3g} FLOPs", *lines]


def count(number: int, noun: str) -> str:
    """Return `1 trial`, `2 trials`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")
