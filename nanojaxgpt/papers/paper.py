"""In: what a file in experiments/papers/ states. Out: claims, arms, and the verdict on a claim.

No jax here: a paper without a criterion is refused before anything runs.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nanojaxgpt import config
from nanojaxgpt.config import sections
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.names import unknown_name
from nanojaxgpt.sweep.plan import SEED, Trial, set_point, show_point
from nanojaxgpt.sweep.space import Space

PASS, FAIL, NOT_RUN = "PASS", "FAIL", "NOT-RUN"


@dataclass(frozen=True)
class Run:
    """A finished run of one arm and seed; `records` are those of its metrics.jsonl.

    `cfg` is a copy, which a measure may change. A run that ended at a loss that is not finite is
    `diverged`.
    """

    path: Path
    cfg: ConfigDict
    records: list[dict[str, Any]]
    diverged: bool = False

    def at(self, step: int, name: str = "validation_loss") -> float:
        """Return a logged number; NaN where it was never logged, which no criterion accepts."""
        found = [r[name] for r in self.records if r["step"] == step and name in r]
        return found[-1] if found else math.nan


# What a measure gets of an arm for one seed: its run, or one at each point of its space.
Runs = Run | list[Run]


@dataclass(frozen=True)
class Arm:
    """One recipe, run once for each seed, at each point of `space` where it has one.

    The seed takes the place of train.seed. With `branch_of`, the name of another arm, its runs
    begin at step init.step of that arm's runs, each of the one with its seed and its values of the
    fields that are swept there (init.state=all). With `tunes` they take its parameters alone, as
    fine-tuning does; the config then has a init.from_run, which is replaced.
    """

    name: str
    config: ConfigDict
    seeds: tuple[int, ...] = (0,)
    space: Space | None = None
    branch_of: str = ""
    tunes: bool = False
    tokens: str = ""  # as Paper.tokens, where it has a corpus of its own

    def points(self) -> list[dict[str, Any]]:
        """Return what is set in the config: nothing, once, where there is no space."""
        return self.space.points() if self.space else [{}]

    def trials(self, seed: int) -> list[Trial]:
        """Return the runs of a seed, in the order of the points. Raises ConfigError."""
        trials = []
        for point in self.points():
            parts = [self.name, *([show_point(point)] if point else []), str(seed)]
            name = re.sub(r"[^\w=.+-]+", "-", "-".join(parts))
            cfg = set_point(config.typed(self.config), point | {SEED: seed})
            trials.append(Trial(name, point | {SEED: seed}, cfg))
        return trials

    def origin(self, trial: Trial) -> Trial:
        """Return the run of this arm from which a trial of another arm branches.

        Raises ConfigError where that is not exactly one, or does not keep the trial's init.step.
        """
        values, step = dict(config.fields(trial.cfg)), trial.cfg.init.step
        found = [
            one
            for one in self.trials(trial.cfg.train.seed)
            if all(values[field] == value for field, value in one.point.items())
        ]
        if len(found) != 1:
            raise ConfigError(f"{trial.name} matches {len(found)} runs of {self.name!r}, not one")
        kept, last = self.config.checkpoint, found[0].cfg.train.num_steps
        saved = kept.every_steps and kept.keep_every_steps
        if not (0 < step <= last) or (
            step != last and (not saved or step % kept.every_steps or step % kept.keep_every_steps)
        ):
            raise ConfigError(
                f"{trial.name} begins at init.step={step}, and {self.name!r} keeps no checkpoint "
                "of it; set its checkpoint.every_steps and keep_every_steps"
            )
        return found[0]


UNSTATED = (math.nan, math.nan)


@dataclass(frozen=True)
class Claim:
    """A figure, where it was published, how it is measured, and what is accepted.

    `measure` is called for each seed with that seed's run of each of `arms`, in their order, or
    with a list of runs where an arm has a space; without arms once, with nothing. The verdict is
    on the mean over the seeds, or on every seed. `accept` is an interval with its ends, and has
    to be stated before the run.
    """

    name: str
    published: float | str  # in words where the paper gives no number
    source: str
    measure: Callable[..., float]
    accept: tuple[float, float] = UNSTATED
    arms: tuple[str, ...] = ()
    every_seed: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure of the report: `draw(figure, *arms)` fills an empty figure of matplotlib.

    Of each of `arms` it gets a list over seeds of what a measure would get.
    """

    file: str
    caption: str
    draw: Callable[..., None]
    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Paper:
    """What one file reproduces."""

    title: str
    claims: tuple[Claim, ...]
    arms: tuple[Arm, ...] = ()
    scaled_down: str = ""  # how it is smaller than the paper's own experiment; "": it is not
    # Hash of the corpus's tokens, as in identity.json: no other one will do. Of a mixture those of
    # all its sources, separated by spaces.
    tokens: str = ""
    needs: str = ""  # hardware, in words, where a CPU is not enough: there its arms are not run
    plots: tuple[Plot, ...] = ()


def load_paper(path: str, overrides: dict[str, str] | None = None) -> Paper:
    """Return the checked paper of a file, its arms' configs overridden. Raises ConfigError."""
    module = config.load_module(path)
    if not callable(getattr(module, "get_paper", None)):
        raise ConfigError(f"{path} has no function get_paper() -> Paper")
    with config.running(path, "get_paper()"):
        paper = module.get_paper()
    if not isinstance(paper, Paper):
        raise ConfigError(f"{path}: get_paper returns a {type(paper).__name__}, not a Paper")
    # The command line may set the location of the data and the devices, never the recipe.
    places = {name for name, rule in sections.rules().items() if rule.place}
    fixed = [name for name in overrides or {} if name not in places]
    if fixed:
        raise ConfigError(
            f"{fixed[0]} is part of the recipe in {path}; only the location of the data and the "
            "devices can be set here. For another recipe, copy the file and state its criteria"
        )
    if problems := paper_problems(paper):
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    arms = [
        replace(arm, config=config.override_config(arm.config, overrides or {}))
        for arm in paper.arms
    ]
    return replace(paper, arms=tuple(arms))


def first_seeds(paper: Paper, count: int) -> Paper:
    """Return the paper with the first `count` seeds of each arm, labelled so. Raises ConfigError.

    0 leaves all of them.
    """
    if count < 0:
        raise ConfigError(f"--seeds={count} must be at least 1, or 0 for all that the file states")
    most = max((len(arm.seeds) for arm in paper.arms), default=0)
    if not 0 < count < most:
        return paper
    arms = tuple(replace(arm, seeds=arm.seeds[:count]) for arm in paper.arms)
    label = f"{paper.scaled_down} Only {count} of the {most} seeds that the file states.".strip()
    return replace(paper, arms=arms, scaled_down=label)


def paper_problems(paper: Paper) -> list[str]:
    """Return what is missing or does not fit together, each with what to add."""
    problems = [] if paper.claims else ["it claims nothing; add a Claim with its criterion"]
    seeds = {arm.name: arm.seeds for arm in paper.arms}
    if len(seeds) < len(paper.arms):
        problems.append("two arms have the same name")
    for arm in paper.arms:
        problems += arm_problems(arm) or branch_problems(arm, paper.arms)
    for plot in paper.plots:
        problems += unknown_arms(f"plot {plot.file!r}", plot.arms, list(seeds))
    for claim in paper.claims:
        if claim.accept is UNSTATED:
            problems.append(f"claim {claim.name!r} has no criterion; add accept=(low, high)")
        elif not claim.accept[0] <= claim.accept[1]:  # NaN fails this too
            problems.append(f"claim {claim.name!r}: accept={claim.accept} accepts nothing")
        if not claim.source:
            problems.append(f"claim {claim.name!r} has no source; add where it was published")
        problems += unknown_arms(f"claim {claim.name!r}", claim.arms, list(seeds))
        if len({seeds[name] for name in claim.arms if name in seeds}) > 1:
            problems.append(f"claim {claim.name!r} compares arms with different seeds")
    used = {name for claim in paper.claims for name in claim.arms}
    problems += [f"no claim is about the arm {name!r}" for name in seeds if name not in used]
    return problems


def arm_problems(arm: Arm) -> list[str]:
    """Return what is wrong with an arm's seeds, or with the points of its space."""
    if not arm.seeds:
        return [f"arm {arm.name!r} has no seeds"]
    try:
        points = arm.points()
        if any(SEED in point for point in points):
            return [f"arm {arm.name!r} sweeps {SEED}; name the seeds by seeds=(0, 1)"]
        names = {trial.name for trial in arm.trials(arm.seeds[0])}
    except ConfigError as error:
        return [f"arm {arm.name!r}: {error}"]
    if not points:
        return [f"arm {arm.name!r} has an empty space"]
    return [] if len(names) == len(points) else [f"arm {arm.name!r} has two points of one name"]


def branch_problems(arm: Arm, arms: tuple[Arm, ...]) -> list[str]:
    """Return what is wrong with the arm that an arm branches from, if it does."""
    known = {other.name: other for other in arms if other.name != arm.name}
    if not arm.branch_of:
        return []
    if arm.branch_of not in known:
        return unknown_arms(f"arm {arm.name!r}", (arm.branch_of,), list(known))
    origin = known[arm.branch_of]
    if origin.branch_of:
        return [f"arm {arm.name!r} branches from {origin.name!r}, which is a branch itself"]
    if not set(arm.seeds) <= set(origin.seeds):
        return [f"arm {arm.name!r} has seeds that {origin.name!r} does not have"]
    try:
        for trial in arm.trials(arm.seeds[0]):
            origin.origin(trial)
    except ConfigError as error:
        return [f"arm {arm.name!r}: {error}"]
    return []


def unknown_arms(what: str, named: tuple[str, ...], known: list[str]) -> list[str]:
    """Return a sentence for each arm that `what` names and that is not there."""
    return [
        f"{what}: {unknown_name('arm', name, known)}; "
        f"add an Arm, or name one of {', '.join(known) or 'none'}"
        for name in named
        if name not in known
    ]


def verdict(claim: Claim, measured: list[float]) -> str:
    """Return PASS or FAIL by the claim's criterion; NaN fails, and no figure is NOT-RUN."""
    if not measured:
        return NOT_RUN
    low, high = claim.accept
    held = measured if claim.every_seed else [sum(measured) / len(measured)]
    return PASS if all(low <= value <= high for value in held) else FAIL
