"""In: a sweep's `tpe` and its folder. Out: points that Optuna chooses by what the others gave.

FOLDER/optuna.journal holds the points, their losses, and what Optuna makes of them. Who runs a
trial and how it ended is told by the claims and trial.json alone; what the journal says of it
follows them, so a worker may be killed at any moment.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanojaxgpt import config
from nanojaxgpt.config.sections import Config
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.sweep.claims import Claims, read_outcome, run_path
from nanojaxgpt.sweep.plan import Trial, make_trial
from nanojaxgpt.sweep.results import read_curves
from nanojaxgpt.sweep.run import Pruned
from nanojaxgpt.sweep.space import Range, Tpe

try:
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
except ImportError:
    raise ConfigError("a tpe sweep needs Optuna: pip install 'nanojaxgpt[sweep]'") from None
from optuna.trial import FrozenTrial, TrialState

# What Optuna raises at a line that is no JSON, or no entry of a journal.
DAMAGED = (ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError)
DRAWING = "drawing"  # the claim of who draws; trials are named by hashes


class Lock(JournalFileSymlinkLock):
    """Optuna's lock of a journal; who has it finds no line that a killed process left torn."""

    def acquire(self) -> bool:
        """Wait for the lock, cut off what follows the last whole line, and return True."""
        super().acquire()
        with open(self._lock_target_file, "r+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 2**20))
            tail = file.read()
            file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)
        return True


class Journal(JournalFileBackend):
    """Optuna's journal, which knows the number of the line that is being read."""

    line = 0

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        """Yield the entries from this number on, counted from 0."""
        self.line = log_number_from + 1
        for entry in super().read_logs(log_number_from):
            yield entry
            self.line += 1


class Suggestions:
    """Draws a point by what Optuna suggests for a trial of its own."""

    def __init__(self, trial: optuna.Trial, prefix: str = "") -> None:
        self.trial, self.prefix = trial, prefix

    def suggest(self, name: str, how: Callable, *arguments: Any, **options: Any) -> Any:
        """Return Optuna's suggestion under a name. Raises ConfigError where it can't."""
        name = self.prefix + name
        if name in self.trial.params:
            raise ConfigError(f"tpe can't tell two parts of the space apart, both named {name}")
        try:
            return how(name, *arguments, **options)
        except ValueError as error:
            raise ConfigError(
                f"{name}: {error}; a space that has changed needs another --dir"
            ) from error

    def number(self, field: str, numbers: Range) -> float:
        """Return a number of the range."""
        low, high, log, whole = numbers
        if whole:
            return self.suggest(field, self.trial.suggest_int, round(low), round(high), log=log)
        return numbers.tidy(self.suggest(field, self.trial.suggest_float, low, high, log=log))

    def pick(self, name: str, labels: Sequence[str]) -> int:
        """Return the index of one of the labels."""
        return labels.index(self.suggest(name, self.trial.suggest_categorical, labels))

    def within(self, branch: str) -> "Suggestions":
        """Return suggestions under the names of a branch."""
        return Suggestions(self.trial, f"{self.prefix}{branch}: ")


class Search:
    """The points of a `tpe` that were drawn so far, and the next one."""

    def __init__(self, folder: Path, base: Config, tpe: Tpe) -> None:
        self.folder, self.base, self.tpe = folder, base, tpe
        self.journal = folder / "optuna.journal"
        self.made: dict[int, Trial] = {}

    @functools.cached_property
    def study(self) -> optuna.Study:
        """Return Optuna's study of this base config; another one has another study.

        Raises DataError where the journal is damaged.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        direction = "maximize" if self.tpe.maximize else "minimize"
        pruner, first = optuna.pruners.NopPruner(), self.base.eval.every_steps
        if self.tpe.reduction and first:
            pruner = optuna.pruners.SuccessiveHalvingPruner(first, self.tpe.reduction)
        journal = Journal(str(self.journal), Lock(str(self.journal)))
        try:
            self.storage = optuna.storages.JournalStorage(journal)
            return optuna.create_study(
                study_name=f"{config.config_hash(self.base)} {direction} {self.tpe.metric}",
                storage=self.storage, pruner=pruner, direction=direction, load_if_exists=True,
            )  # fmt: skip
        except DAMAGED as error:
            raise DataError(
                f"{self.journal}:{journal.line} is damaged ({type(error).__name__}); restore the "
                "file, or move it away: the search then starts again, from the same seed"
            ) from error

    def drawn(self) -> list[tuple[FrozenTrial, Trial]]:
        """Return the points drawn so far, as Optuna's trial and as ours, which may come twice."""
        if not self.journal.exists():
            return []
        found = [t for t in self.study.get_trials(deepcopy=False) if "point" in t.user_attrs]
        for trial in found:
            if trial.number not in self.made:
                self.made[trial.number] = make_trial(self.base, trial.user_attrs["point"])
        return [(trial, self.made[trial.number]) for trial in found]

    def trials(self) -> list[Trial]:
        """Return the trials drawn so far, each point once."""
        return list({trial.name: trial for _, trial in self.drawn()}.values())

    def left(self) -> int:
        """Return how many points are still to be drawn."""
        return max(0, self.tpe.num - len(self.drawn()))

    def draw(self, claims: Claims) -> bool:
        """Draw one more point, unless all are or another process is drawing; return whether.

        The n-th point depends on the seed, n and what has ended alone. Raises ConfigError where
        it doesn't fit the config.
        """
        if not self.left() or not claims.take(DRAWING):
            return False
        try:
            self.settle()
            trials = self.study.get_trials(deepcopy=False)
            for trial in trials:
                if not trial.state.is_finished() and "point" not in trial.user_attrs:
                    self.study.tell(trial.number, state=TrialState.FAIL)  # killed as it drew
            if not self.left():
                return False
            seed = 1_000_003 * self.tpe.seed + len(trials)
            self.study.sampler = optuna.samplers.TPESampler(seed=seed)
            asked = self.study.ask()
            try:
                point = self.tpe.space.draw(Suggestions(asked))
                asked.set_user_attr("point", make_trial(self.base, point).point)
            except ConfigError:
                self.study.tell(asked, state=TrialState.FAIL)
                raise
            return True
        finally:
            claims.release(DRAWING)

    def settle(self) -> None:
        """Tell Optuna how trials ended. Raises ConfigError where they never logged the metric."""
        worst = -math.inf if self.tpe.maximize else math.inf
        for asked, trial in self.drawn():
            outcome = {} if asked.state.is_finished() else read_outcome(self.folder, trial.name)
            if not outcome:
                continue
            state, value = TrialState.COMPLETE, worst
            if outcome["state"] == "pruned":
                state, value = TrialState.PRUNED, None
            elif outcome["state"] == "finished":
                value = self.last_value(trial)
            if value != value:  # not a number, which Optuna would not take
                value = worst
            with suppress(optuna.exceptions.UpdateFinishedTrialError):  # by a faster worker
                self.study.tell(asked.number, value, state, skip_if_finished=True)

    def last_value(self, trial: Trial) -> float:
        """Return the metric's last number in a trial. Raises ConfigError where it has none."""
        (curve,) = read_curves([run_path(self.folder, trial.name)], self.tpe.metric)
        return curve[-1][1]

    def reopen(self, asked: FrozenTrial) -> optuna.Trial:
        """Return a trial that perhaps another process drew, to report to it."""
        study = self.study  # opens the storage, too
        study_id = self.storage.get_study_id_from_name(study.study_name)
        trial_id = self.storage.get_trial_id_from_study_id_trial_number(study_id, asked.number)
        return optuna.Trial(study, trial_id)

    def watch(self, trial: Trial) -> Callable[[int], None]:
        """Return the function to call after each evaluation of a trial; it raises Pruned.

        A trial that ended before, and whose outcome was lost, runs to its end.
        """
        asked = next(asked for asked, ours in self.drawn() if ours.name == trial.name)
        if asked.state.is_finished():
            return lambda step: None
        own, known = self.reopen(asked), set(asked.intermediate_values)

        def look(step: int) -> None:
            value = self.last_value(trial)
            if step not in known:  # a run that was resumed evaluates again, to the same bits
                own.report(value, step)
            if step < trial.cfg.train.num_steps and own.should_prune():
                raise Pruned(
                    f"step {step}: {self.tpe.metric} {value:.4f} is not among the best "
                    f"1/{self.tpe.reduction} so far"
                )

        return look
