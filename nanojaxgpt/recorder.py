"""The record of one run: reads its steps, saves and validates its states, writes the results.

The loop has one recorder; trials that train together have one each.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from nanojaxgpt import checkpoint, metrics
from nanojaxgpt.config.sections import Config
from nanojaxgpt.data.loader import RunData
from nanojaxgpt.data.rows import Batch, Ramp, make_ramp
from nanojaxgpt.hosts.team import ALONE, Team
from nanojaxgpt.model.config import JobConfig
from nanojaxgpt.model.parameters import Params, PyTree
from nanojaxgpt.optim import is_average
from nanojaxgpt.step import TrainState

# What a loss is the mean of.
UNITS = {"classify": "examples", "preference": "pairs", "reward": "pairs"}


def ignore(step: int) -> None:
    """Do nothing after an evaluation."""


def no_benchmarks(params: Params) -> dict[str, float]:
    """Return no numbers, where eval.tasks is empty."""
    return {}


class Job(NamedTuple):
    """Everything that one run needs, built from its config; step.Step has the state's part.

    `evaluated` is called with the step of each evaluation after it is written; an exception from
    it ends the training. `benchmarks` gives the numbers of eval.tasks.
    """

    cfg: JobConfig
    mesh: Mesh
    data: RunData
    shardings: TrainState
    abstract: TrainState
    frozen: Params
    init: Callable[..., tuple[TrainState, Params]]
    train_step: Callable
    train_batch: Callable[[int], Batch]
    evaluate: Callable[..., dict[str, Any]]
    evaluated: Callable[[int], None] = ignore
    benchmarks: Callable[[Params], dict[str, float]] = no_benchmarks


class Recorder:
    """Reads, saves, validates and writes one run, from the step `start` on.

    `say` prints a line of the log; only the first process of a team writes.
    """

    def __init__(
        self, job: Job, run: Path, start: int, say: Callable[[str], None], team: Team = ALONE
    ) -> None:
        self.job, self.run, self.say = job, run, say
        self.writer: metrics.MetricsWriter | metrics.NoMetrics = metrics.NoMetrics()
        if team.first:
            self.writer = metrics.MetricsWriter(run, start, job.cfg, say)
        self.losses = dict(team.decide(lambda: list(metrics.validation_losses(run).items())))
        kept = job.cfg.checkpoint
        keep = checkpoint.Keep(
            kept.keep_last, kept.keep_every_steps, kept.keep_best, lambda: self.losses
        )
        self.checkpoints = checkpoint.Checkpoints(run / "checkpoints", keep)
        self.saved, self.ramp = start, train_ramp(job.cfg)
        self.clock, self.clock_step = 0.0, start

    def read(
        self, step: int, numbers: dict[str, float], mfu_per_token: float = 0.0
    ) -> tuple[str, dict[str, float]]:
        """Write the numbers of a step if that is due.

        Returns (problem, numbers): the problem if more updates in a row were skipped than allowed,
        else ""; and the numbers written, if any.
        """
        train, values = self.job.cfg.train, dict(numbers)
        skipped, why = values.pop("skipped"), why_left_out(values, values.pop("norm_limit"))
        if skipped > self.job.cfg.optim.max_skipped_steps:
            return (
                f"step {step}: {why}; loss {values['loss']}, gradient norm {values['grad_norm']}, "
                f"at learning rate {values['learning_rate']:.2e}; bad updates in a row: "
                f"{skipped:.0f}"
            ), {}
        if skipped:
            self.say(f"step {step}: {why}; its update was skipped")
            return "", {}
        if not self.clock:  # compiling doesn't count
            self.clock, self.clock_step = time.monotonic(), step
        if not due(step, train.log_every_steps) and step != train.num_steps:
            return "", {}
        rows = self.ramp.before(step) - self.ramp.before(self.clock_step)
        tokens, seconds = rows * self.job.cfg.model.seq_len, time.monotonic() - self.clock
        rate = tokens / max(seconds, 1e-9) if tokens else 0.0
        values["tokens_per_second"] = round(rate, 1)
        if mfu_per_token:
            values["mfu"] = rate * mfu_per_token
        self.checkpoints.check()
        self.writer.write(step, **values)
        self.reset_clock(step)
        return "", values

    def reset_clock(self, step: int) -> None:
        """Restart the measure of tokens/s, so that saving and evaluating don't count."""
        if self.clock:
            self.clock, self.clock_step = time.monotonic(), step

    def save(self, step: int, state: TrainState, frozen: Params) -> None:
        """Start to save a state; its arrays may be donated as soon as this returns."""
        self.checkpoints.save(step, state.items(self.job.cfg, frozen))
        self.saved = step
        self.reset_clock(step)

    def evaluates_at(self, step: int) -> bool:
        """Return whether parameters are evaluated after this step, which is not the last."""
        cfg = self.job.cfg.eval
        return due(step, cfg.every_steps) or bool(cfg.tasks and due(step, cfg.tasks_every_steps))

    def validate(self, step: int, params: Params, opt_state: PyTree, *through: Callable) -> None:
        """Evaluate parameters and write the numbers, of benchmarks too where it is time.

        `through` are further arguments of the evaluation, see validation.make_evaluation.
        """
        cfg = self.job.cfg
        if step == cfg.train.num_steps or due(step, cfg.eval.tasks_every_steps):
            self.benchmark(step, params)
        found = self.job.evaluate(params, *through)
        if not (count := found.pop("tokens")):
            return
        self.losses[step] = found["loss"]
        confusion = found.pop("confusion", None)
        found.pop("perplexity", None)  # it follows from the loss
        self.writer.write(step, **{f"validation_{name}": value for name, value in found.items()})
        if confusion is not None:
            self.writer.write_confusion(confusion)
        average = " of the average" if is_average(opt_state) else ""
        loss, unit = found.pop("loss"), UNITS.get(self.job.cfg.objective.kind, "tokens")
        others = ", ".join(f"{value:.4f} {name.replace('_', ' ')}" for name, value in found.items())
        self.say(
            f"step {step}: validation loss {loss:.4f}{average}, {others} over {count:,} {unit}"
        )
        self.reset_clock(step)
        self.job.evaluated(step)

    def benchmark(self, step: int, params: Params) -> None:
        """Run the benchmarks, if there are any, and write their numbers."""
        if found := self.job.benchmarks(params):
            self.writer.write(step, **found)
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            self.say(f"step {step}: {numbers}")
            self.reset_clock(step)


def train_ramp(cfg: Config) -> Ramp:
    """Return the sizes of the training batches."""
    return make_ramp(cfg.train.batch_size, cfg.train.ramp_batch_size, cfg.train.ramp_steps)


def why_left_out(values: dict[str, float], norm_limit: float) -> str:
    """Return why the update with these numbers was skipped, if it was."""
    if values["grad_norm"] > norm_limit:
        return (
            f"its gradient norm {values['grad_norm']:.3g} is over {norm_limit:.3g}, "
            "optim.spike_factor times the recent mean"
        )
    return "its update is not finite"


def due(step: int, every: int) -> bool:
    """Return whether this step is one of every `every` steps; 0: never."""
    return every > 0 and step % every == 0
