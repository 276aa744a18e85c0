"""In: jobs that share their programs. Out: all of them trained by one vectorized step.

The results agree with those of the runs alone up to rounding. A trial that is no longer finite,
or is at its last step, is frozen while its neighbours go on. Only the last step is saved, so
what was stopped begins again.
"""

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nanojaxgpt import checkpoint, metrics
from nanojaxgpt.data.loader import fetch_ahead
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.loop import Job, due, train_ramp, why_left_out
from nanojaxgpt.model import ModelConfig, Transformer
from nanojaxgpt.rundir import own_run
from nanojaxgpt.step import TrainState, make_hyper, make_loss, make_train_step
from nanojaxgpt.train import begin_run

MEASURED_STEPS = 5


def stack(trees: list[Any]) -> Any:
    """Return one tree whose leaves have a leading axis of trials."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def take(tree: Any, index: int) -> Any:
    """Return the tree of one trial."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def make_step(job: Job) -> Callable:
    """Return step(states, batches, hypers, going) -> states, metrics, going; compiled at first use.

    `going` [trials] tells who trains; one ends at its last step, or where it leaves out too many.
    """
    shape = job.cfg.train
    model = Transformer(ModelConfig(**job.cfg.model))
    loss = make_loss(model, shape.loss_chunks)
    alone = make_train_step(loss, job.cfg.optim, shape.accumulation_steps, model.cfg.width)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(states: TrainState, batches: Any, hypers: Any, going: jax.Array) -> tuple:
        after, numbers = jax.vmap(alone)(states, batches, hypers)

        def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(going.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        states = jax.tree.map(chosen, after, states)
        going &= numbers["skipped"] <= hypers["max_skipped_steps"]
        return states, numbers, going & (states.step < hypers["num_steps"])

    return step


def make_batches(jobs: list[Job]) -> Callable[[int], Any]:
    """Return batches(step) -> the batch of every trial, stacked; read once for equal seeds."""
    seeds = [job.cfg.train.seed for job in jobs]

    def batches(step: int) -> Any:
        found = {
            seed: job.train_batch(step) for seed, job in dict(zip(seeds, jobs, strict=True)).items()
        }
        return stack([found[seed] for seed in seeds])

    return batches


def obstacle(jobs: list[Job]) -> str:
    """Return why these jobs can't be stacked; "" where they can."""
    if jobs[0].mesh.size > 1:
        return "vmap takes one device per process, by mesh.data=1 or --workers"
    if any(job.cfg.init.from_run for job in jobs):
        return "vmap begins from scratch, not from init.from_run"
    return ""


def start_states(jobs: list[Job]) -> TrainState:
    """Return the states at step 0, each as its run alone would begin. Raises ConfigError."""
    if why := obstacle(jobs):
        raise ConfigError(f"{why}; or choose --mode=map")
    return stack([job.init(jax.random.key(job.cfg.train.seed)) for job in jobs])


def measure_modes(job: Job, width: int) -> dict[str, float]:
    """Return the seconds of one step of `width` trials by map and by vmap, compiling left out."""
    with jax.set_mesh(job.mesh):
        batch, hyper = job.train_batch(0), make_hyper(job.cfg)
        state, states = job.init(jax.random.key(0)), start_states([job] * width)
        batches, hypers, going = (
            stack([batch] * width),
            stack([hyper] * width),
            jnp.ones(width, bool),
        )
        step, seconds = make_step(job), {}
        for number in range(-1, MEASURED_STEPS):  # the first of each compiles
            began = time.perf_counter()
            state, numbers = job.train_step(state, batch, hyper)
            jax.block_until_ready(numbers)
            middle = time.perf_counter()
            states, numbers, _ = step(states, batches, hypers, going)
            jax.block_until_ready(numbers)
            if number >= 0:
                took = {"map": width * (middle - began), "vmap": time.perf_counter() - middle}
                seconds = {name: min(t, seconds.get(name, t)) for name, t in took.items()}
    return seconds


class Follower:
    """The run directory of one trial among others: its metrics, its last checkpoint, its end."""

    def __init__(self, job: Job, run: Path) -> None:
        self.job, self.run, self.message = job, run, ""
        self.ended = False
        checkpoint.set_aside(run / "checkpoints", 0)
        with open(run / "log.txt", "a") as log, redirect_stdout(log):
            begin_run(job, run, print)
        self.writer = metrics.MetricsWriter(run, 0)

    def read(self, step: int, numbers: dict[str, float], tokens_per_second: float) -> None:
        """Write the numbers of a step; one left out too many ends the trial."""
        train = self.job.cfg.train
        skipped, why = numbers.pop("skipped"), why_left_out(numbers, numbers.pop("norm_limit"))
        if skipped > self.job.cfg.optim.max_skipped_steps:
            self.message = (
                f"step {step}: {why}; loss {numbers['loss']}, gradient norm "
                f"{numbers['grad_norm']}, at learning rate {numbers['learning_rate']:.2e}; "
                "frozen there, not saved"
            )
            self.close()
        elif skipped:
            with open(self.run / "log.txt", "a") as log:
                print(f"step {step}: {why}; its update was left out", file=log)
        elif due(step, train.log_every_steps) or step == train.num_steps:
            self.writer.write(step, **numbers, tokens_per_second=round(tokens_per_second, 1))

    def between(self, step: int, state: Callable[[], TrainState]) -> None:
        """Evaluate where it is time; at the last step save too."""
        last = step == self.job.cfg.train.num_steps
        if not last and not due(step, self.job.cfg.eval.every_steps):
            return
        found, losses = self.job.evaluate(state().params), {}
        if found["tokens"]:
            losses[step] = found["loss"]
            self.writer.write(
                step,
                validation_loss=found["loss"],
                validation_bits_per_byte=found["bits_per_byte"],
            )
        if last:
            keep = checkpoint.Keep(1, 0, 1, lambda: losses)
            saving = checkpoint.Checkpoints(self.run / "checkpoints", keep)
            saving.save(step, state().items())
            saving.close()
            self.close()

    def close(self) -> None:
        """End the trial."""
        self.ended = True
        self.writer.close()


def train_together(jobs: list[Job], runs: list[Path]) -> list[str]:
    """Train the jobs in their run directories; return why each ended early, "" where it did not."""
    with ExitStack() as owned, jax.set_mesh(jobs[0].mesh):
        for run in runs:
            owned.enter_context(own_run(run))
        states, step = start_states(jobs), make_step(jobs[0])
        followers = [Follower(job, run) for job, run in zip(jobs, runs, strict=True)]
        hypers, going = stack([make_hyper(job.cfg) for job in jobs]), jnp.ones(len(jobs), bool)
        last = max(job.cfg.train.num_steps for job in jobs)
        cfg, began, ramp = jobs[0].cfg, 0.0, train_ramp(jobs[0].cfg)
        ahead = cfg.data.prefetch_batches
        for number, batches in enumerate(fetch_ahead(make_batches(jobs), 0, last, ahead), 1):
            states, numbers, going = step(states, batches, hypers, going)
            read = {name: np.asarray(values).tolist() for name, values in numbers.items()}
            began = time.monotonic() if number == 1 else began  # what compiling took is no measure
            tokens = (ramp.before(number) - ramp.before(1)) * cfg.model.seq_len
            rate = tokens / max(time.monotonic() - began, 1e-9)
            for index, follower in enumerate(followers):
                if not follower.ended:
                    follower.read(number, {name: v[index] for name, v in read.items()}, rate)
                if not follower.ended:
                    follower.between(number, functools.partial(take, states, index))
            if all(follower.ended for follower in followers):
                break
        return [follower.message for follower in followers]
