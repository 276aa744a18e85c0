"""The loop around the step: reads batches, saves, evaluates, stops after a signal."""

from contextlib import closing, nullcontext, suppress
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from nanojaxgpt import console, flops, metrics
from nanojaxgpt.data.loader import fetch_ahead
from nanojaxgpt.errors import CheckpointError, NonFiniteError
from nanojaxgpt.hosts.garbage import collected_every
from nanojaxgpt.hosts.process import StopRequest
from nanojaxgpt.hosts.team import ALONE, Team
from nanojaxgpt.hosts.watchdog import Watchdog
from nanojaxgpt.model.parameters import Params
from nanojaxgpt.recorder import Job, Recorder, due
from nanojaxgpt.step import TrainState, make_hyper
from nanojaxgpt.trainable import merge_params

STEP = "the training step"  # in messages about compiling


class Loop:
    """The steps of one run, with what happens between them: reading, saving, evaluating.

    The host reads the metrics of step N only after it has dispatched step N + 1, so that the
    device never waits for it.
    """

    def __init__(
        self, job: Job, run: Path, start: int, stop: StopRequest, team: Team = ALONE
    ) -> None:
        self.job, self.run, self.start, self.stop = job, run, start, stop
        self.team = team
        self.progress: console.Progress | metrics.NoMetrics = metrics.NoMetrics()
        if team.first:
            self.progress = console.Progress(job.cfg.train.num_steps, start)
        self.recorder = Recorder(job, run, start, self.progress.say, team)
        model_cfg, seq_len = job.cfg.model, job.cfg.model.seq_len
        peak = flops.peak_flops(job.mesh.devices.flat[0].device_kind) * job.mesh.size
        self.mfu_per_token = flops.train_flops(model_cfg, seq_len) / seq_len / peak if peak else 0
        self.unread: tuple[int, dict[str, jax.Array]] | None = None

    def train(self, state: TrainState, frozen: Params) -> TrainState:
        """Run the remaining steps; save at the end. Raises NonFiniteError, Stopped."""
        cfg, ramp = self.job.cfg, self.recorder.ramp
        last = cfg.train.num_steps
        hyper = jax.device_put(make_hyper(cfg), NamedSharding(self.job.mesh, PartitionSpec()))
        self.frozen = frozen
        self.stop.deferred = True
        self.watchdog = Watchdog(cfg.train.hang_timeout_seconds)
        try:
            missed = self.start and self.recorder.evaluates_at(self.start)
            if missed and self.start not in self.recorder.losses:
                self.validate(self.start, state)  # the run was stopped between saving and this
            ahead = cfg.data.prefetch_batches
            with (
                closing(fetch_ahead(self.job.train_batch, self.start, last, ahead)) as batches,
                collected_every(cfg.train.gc_every_steps) as collect,
            ):
                for step, batch in enumerate(self.watchdog.each(batches), self.start + 1):
                    grows = step > self.start + 1 and ramp.size(step - 1) > ramp.size(step - 2)
                    if grows:
                        self.read()
                    first = grows or step == self.start + 1
                    with self.progress.compiling(STEP) if first else nullcontext():
                        state, numbers = self.job.train_step(state, batch, hyper, frozen)
                    collect(step)  # while the devices work on this step
                    self.read()
                    if grows:
                        rows = ramp.size(step - 1)
                        self.progress.say(f"step {step}: batches of {rows} from here on")
                        self.recorder.reset_clock(step - 1)  # compiling doesn't count
                    self.unread = step, numbers
                    self.between(step, state)
            if last not in self.recorder.losses:
                self.validate(last, state)
        except Exception:
            # Finish a save that is in progress; the first error is the one to report.
            with suppress(CheckpointError):
                self.team.bounded(self.recorder.checkpoints.close)
            raise
        finally:
            self.stop.deferred = False
            self.watchdog.close()
            self.progress.close()
            self.recorder.writer.close()
        self.recorder.checkpoints.close()
        return state

    def between(self, step: int, state: TrainState) -> None:
        """Save and evaluate if due; stop if a signal asks for it."""
        cfg = self.job.cfg
        last = step == cfg.train.num_steps
        signal = self.team.next_stop(step, self.stop.signal)
        stopping = bool(signal) and not last
        if last or stopping or due(step, cfg.checkpoint.every_steps):
            self.read()  # so that nothing non-finite is ever saved
            self.recorder.save(step, state, self.frozen)
        if stopping:
            self.watchdog.close()  # writing may take its time
            self.recorder.checkpoints.close()
            self.team.gather(None, "to save")
            self.stop.signal = signal
            raise self.stop.stopped(
                f"saved step {step} in {self.run}; rerun the same command to resume"
            )
        if not last and self.recorder.evaluates_at(step):
            self.read()
            self.validate(step, state)

    def read(self) -> None:
        """Read and show the last step's metrics, unless that is done."""
        if self.unread is None:
            return
        (step, numbers), self.unread = self.unread, None
        values = {name: float(value) for name, value in jax.device_get(numbers).items()}
        problem, written = self.recorder.read(step, values, self.mfu_per_token)
        if problem:
            saved = self.recorder.saved
            kept = f"step {saved} is saved" if saved else "no step is saved yet"
            raise NonFiniteError(
                f"{problem}; {kept}. Lower optim.learning_rate, lengthen "
                "optim.warmup_steps, or set optim.clip_norm, in a new --run"
            )
        if not values["skipped"]:
            self.progress.advance(step)
            self.progress.began = self.progress.began or self.recorder.clock
        if written:
            self.progress.step(step, written)

    def validate(self, step: int, state: TrainState) -> None:
        """Evaluate, write and show the numbers; do nothing without a validation split."""
        params = merge_params(state.params, self.frozen)
        self.recorder.validate(step, params, state.opt_state, self.watchdog.each)
