"""The loop around the step: reads batches, writes metrics, saves, evaluates, ends at a signal."""

import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from nanojaxgpt import checkpoint, console, flops, metrics
from nanojaxgpt.data.loader import Data, fetch_ahead
from nanojaxgpt.data.rows import Batch, Ramp, make_ramp
from nanojaxgpt.errors import CheckpointError, NonFiniteError
from nanojaxgpt.hosts.process import StopRequest
from nanojaxgpt.hosts.team import ALONE, Team
from nanojaxgpt.hosts.watchdog import Watchdog
from nanojaxgpt.model.config import ModelConfig
from nanojaxgpt.optim import is_average
from nanojaxgpt.step import TrainState, make_hyper

STEP = "the training step"  # what is compiled


def ignore(step: int) -> None:
    """Do nothing after an evaluation."""


class Job(NamedTuple):
    """What one run needs, built from its config; `shardings` and `abstract` describe the state.

    `evaluated` is called with the step of each evaluation that was written; what it raises ends
    the training.
    """

    cfg: ConfigDict
    mesh: Mesh
    data: Data
    shardings: TrainState
    abstract: TrainState
    init: Callable[..., TrainState]
    train_step: Callable
    train_batch: Callable[[int], Batch]
    evaluate: Callable[..., dict[str, float]]
    evaluated: Callable[[int], None] = ignore


class Loop:
    """The steps of one run, with what happens between them: reading, saving, evaluating.

    The host reads the metrics of step N only after it has dispatched step N + 1, so that the
    device never waits for it.
    """

    def __init__(
        self, job: Job, run: Path, start: int, stop: StopRequest, team: Team = ALONE
    ) -> None:
        cfg = job.cfg
        self.job, self.run, self.start, self.stop = job, run, start, stop
        self.team = team
        self.writer = self.progress = metrics.NoMetrics()
        if team.first:
            self.progress = console.Progress(cfg.train.num_steps, start)
            self.writer = metrics.MetricsWriter(run, start, cfg, self.progress.say)
        self.losses = dict(team.decide(lambda: list(metrics.validation_losses(run).items())))
        kept = cfg.checkpoint
        keep = checkpoint.Keep(
            kept.keep_last, kept.keep_every_steps, kept.keep_best, lambda: self.losses
        )
        self.checkpoints = checkpoint.Checkpoints(run / "checkpoints", keep)
        self.saved = start
        model_cfg, seq_len = ModelConfig(**cfg.model), cfg.model.seq_len
        self.ramp = train_ramp(cfg)
        peak = flops.peak_flops(job.mesh.devices.flat[0].device_kind) * job.mesh.size
        self.mfu_per_token = flops.train_flops(model_cfg, seq_len) / seq_len / peak if peak else 0
        self.unread: tuple[int, dict[str, jax.Array]] | None = None
        self.clock, self.clock_step = 0.0, start

    def train(self, state: TrainState) -> TrainState:
        """Run the steps that are left; save at the end. Raises NonFiniteError, Stopped."""
        cfg = self.job.cfg
        last = cfg.train.num_steps
        hyper = jax.device_put(make_hyper(cfg), NamedSharding(self.job.mesh, PartitionSpec()))
        self.stop.deferred = True
        self.watchdog = Watchdog(cfg.train.hang_timeout_seconds)
        try:
            missed = self.start and due(self.start, cfg.eval.every_steps)
            if missed and self.start not in self.losses:
                self.validate(self.start, state)  # the run was stopped between saving and this
            ahead = cfg.data.prefetch_batches
            batches = fetch_ahead(self.job.train_batch, self.start, last, ahead)
            for step, batch in enumerate(self.watchdog.each(batches), self.start + 1):
                grows = step > self.start + 1 and self.ramp.size(step - 1) > self.ramp.size(
                    step - 2
                )
                if grows:
                    self.read()
                first = grows or step == self.start + 1
                with self.progress.compiling(STEP) if first else nullcontext():
                    state, numbers = self.job.train_step(state, batch, hyper)
                self.read()
                if grows:
                    self.progress.say(
                        f"step {step}: batches of {self.ramp.size(step - 1)} from here on"
                    )
                    self.reset_clock(step - 1)  # it was compiled, which is no measure
                self.unread = step, numbers
                self.between(step, state)
            if last not in self.losses:
                self.validate(last, state)
        except Exception:
            # What is being saved would be lost as the process ends; the first error is the cause.
            with suppress(CheckpointError):
                self.team.bounded(self.checkpoints.close)
            raise
        finally:
            self.stop.deferred = False
            self.watchdog.close()
            self.progress.close()
            self.writer.close()
        self.checkpoints.close()
        return state

    def between(self, step: int, state: TrainState) -> None:
        """Save and evaluate where it is time; end where a signal asks for it."""
        cfg = self.job.cfg
        last = step == cfg.train.num_steps
        signal = self.team.next_stop(step, self.stop.signal)
        stopping = bool(signal) and not last
        if last or stopping or due(step, cfg.checkpoint.every_steps):
            self.read()  # so that nothing non-finite is ever saved
            self.checkpoints.save(step, state.items())
            self.saved = step
            self.reset_clock(step)
        if stopping:
            self.watchdog.close()  # writing may take its time
            self.checkpoints.close()
            self.team.gather(None, "to save")
            self.stop.signal = signal
            raise self.stop.stopped(
                f"saved step {step} in {self.run}; rerun the same command to resume"
            )
        if not last and due(step, cfg.eval.every_steps):
            self.read()
            self.validate(step, state)
            self.reset_clock(step)

    def read(self) -> None:
        """Read the metrics of the last step that were not read yet, and show them."""
        if self.unread is None:
            return
        (step, numbers), self.unread = self.unread, None
        values = {name: float(value) for name, value in jax.device_get(numbers).items()}
        skipped, why = values.pop("skipped"), why_left_out(values, values.pop("norm_limit"))
        if skipped > self.job.cfg.optim.max_skipped_steps:
            kept = f"step {self.saved} is saved" if self.saved else "no step is saved yet"
            raise NonFiniteError(
                f"step {step}: {why}; loss {values['loss']}, gradient norm {values['grad_norm']}, "
                f"at learning rate {values['learning_rate']:.2e}; bad updates in a row: "
                f"{skipped:.0f}; {kept}. Lower optim.learning_rate, lengthen "
                "optim.warmup_steps, or set optim.clip_norm, in a new --run"
            )
        if skipped:
            self.progress.say(f"step {step}: {why}; its update was skipped")
            return
        self.progress.advance(step)
        now = time.monotonic()
        if not self.progress.began:
            self.progress.began = self.clock = now
            self.clock_step = step
        if due(step, self.job.cfg.train.log_every_steps) or step == self.job.cfg.train.num_steps:
            rows = self.ramp.before(step) - self.ramp.before(self.clock_step)
            tokens = rows * self.job.cfg.model.seq_len
            rate = tokens / (now - self.clock) if tokens else 0.0
            values["tokens_per_second"] = round(rate, 1)
            if self.mfu_per_token:
                values["mfu"] = rate * self.mfu_per_token
            self.checkpoints.check()
            self.writer.write(step, **values)
            self.progress.step(step, values)
            self.reset_clock(step)

    def reset_clock(self, step: int) -> None:
        """Begin a new stretch for tokens/s, so that saving and evaluating don't count in it."""
        if self.progress.began:
            self.clock, self.clock_step = time.monotonic(), step

    def validate(self, step: int, state: TrainState) -> None:
        """Evaluate, write the numbers and show them; nothing where there is no validation split."""
        found = self.job.evaluate(state.params, self.watchdog.each)
        if not found["tokens"]:
            return
        self.losses[step] = found["loss"]
        self.writer.write(
            step,
            validation_loss=found["loss"],
            validation_bits_per_byte=found["bits_per_byte"],
        )
        average = " of the average" if is_average(state.opt_state) else ""
        self.progress.say(
            f"step {step}: validation loss {found['loss']:.4f}{average}, "
            f"{found['bits_per_byte']:.4f} bits per byte over {found['tokens']:,} tokens"
        )
        self.job.evaluated(step)


def train_ramp(cfg: ConfigDict) -> Ramp:
    """Return the sizes of the training batches."""
    return make_ramp(cfg.train.batch_size, cfg.train.ramp_batch_size, cfg.train.ramp_steps)


def why_left_out(values: dict[str, float], norm_limit: float) -> str:
    """Return why the update with these numbers was left out, if it was."""
    if values["grad_norm"] > norm_limit:
        return (
            f"its gradient norm {values['grad_norm']:.3g} is over {norm_limit:.3g}, "
            "optim.spike_factor times the recent mean"
        )
    return "its update is not finite"


def due(step: int, every: int) -> bool:
    """Return whether something that happens every so many steps happens now; 0: never."""
    return every > 0 and step % every == 0
