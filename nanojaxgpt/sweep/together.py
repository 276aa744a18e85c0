"""In: jobs that share their programs. Out: all of them trained by one vectorized step.

The stacked trials are spread over the devices, by the mesh axis `trial` before those of
`sharding.AXES`: an axis that the config gives a size stays inside each trial, what is left (-1)
goes to the trials. The results agree with those of the runs alone up to rounding. A trial that
is no longer finite, or is at its last step, is frozen while the others continue.
"""

import functools
import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, redirect_stdout
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nanojaxgpt import checkpoint, memory, rundir, sharding
from nanojaxgpt.config.sections import Config
from nanojaxgpt.data.loader import fetch_ahead, prepare_data, resolve
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.hosts.process import StopRequest
from nanojaxgpt.model.parameters import Params, PyTree
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.recorder import Job, Recorder, due, train_ramp
from nanojaxgpt.reference import with_reference
from nanojaxgpt.rundir import own_run
from nanojaxgpt.step import OBJECTIVES, TrainState, make_hyper, make_train_step
from nanojaxgpt.trainable import merge_params
from nanojaxgpt.training import begin_run, first_start, make_job, start_state

MEASURED_STEPS = 5


def open_group(cfg: Config, report: Callable[[str], None]) -> Job:
    """Return the job of one trial on the first devices, as many as one trial takes.

    Raises ConfigError, DataError.
    """
    if cfg.objective.kind == "policy":
        raise ConfigError("trials whose steps sample can't share one step: use --mode=map")
    sizes = {axis: 1 if size == -1 else size for axis, size in cfg.mesh.given().items()}
    devices, count = jax.devices(), math.prod(sizes.values())
    if len(devices) % count:
        raise ConfigError(
            f"{len(devices)} devices can't be divided among trials of {count} devices each"
        )
    data = prepare_data(cfg, report)
    return make_job(resolve(cfg, data), data, sharding.make_mesh(sizes, devices[:count]))


class Stack:
    """Trees of many trials as one, spread over the devices by the mesh axis `trial`.

    Where the trials don't fill the axis, copies of the last one do, which are never looked at.
    """

    def __init__(self, job: Job, count: int) -> None:
        names, shape = job.mesh.axis_names, job.mesh.devices.shape
        devices = np.array(jax.devices()).reshape(-1, *shape)
        kinds = (AxisType.Auto,) * (1 + len(names))
        self.job, self.mesh = job, Mesh(devices, ("trial", *names), axis_types=kinds)
        self.states = jax.tree.map(self.spread, job.shardings)
        self.frozen = jax.tree.map(lambda leaf: self.spread(leaf.sharding), job.frozen)
        self.batches = self.spread(sharding.batch_sharding(job.mesh))
        self.numbers = self.spread(NamedSharding(job.mesh, PartitionSpec()))
        self.copies = -count % len(devices)
        copies = (count + self.copies) // len(devices)
        memory.check_state(job.cfg, job.mesh, job.abstract, job.frozen, copies)

    def spread(self, one: NamedSharding) -> NamedSharding:
        """Return the layout of many trials' arrays that each have the layout `one`."""
        return NamedSharding(self.mesh, PartitionSpec("trial", *one.spec))

    def place(self, trees: list[PyTree], layout: PyTree) -> PyTree:
        """Return one tree, whose leaves have a leading axis of trials, on the devices."""
        trees = jax.device_get([*trees, *[trees[-1]] * self.copies])
        return jax.device_put(jax.tree.map(lambda *leaves: np.stack(leaves), *trees), layout)

    def take(self, states: PyTree, index: int) -> tuple[TrainState, Params]:
        """Return the state and the frozen parameters of one trial, where its job has them.

        It is read from the devices that hold it: to index a stacked array is a collective of all
        devices for each leaf, and so many at once can exceed XLA's timeout on a busy CPU.
        """

        def one(stacked: jax.Array) -> np.ndarray:
            leaf = np.empty(stacked.shape[1:], stacked.dtype)
            for shard in stacked.addressable_shards:
                trials, *place = shard.index
                at = index - (trials.start or 0)
                if 0 <= at < len(shard.data):
                    leaf[tuple(place)] = np.asarray(shard.data)[at]
            return leaf

        frozen = jax.tree.map(lambda leaf: leaf.sharding, self.job.frozen)
        return jax.device_put(jax.tree.map(one, states), (self.job.shardings, frozen))

    def make_step(self) -> Callable:
        """Return step(states, batches, hypers, frozen, going) -> states, metrics, going.

        It compiles late. `going` [trials] tells who trains; one ends at its last step, or where it
        leaves out too many.
        """
        shape = self.job.cfg.train
        model = Transformer(self.job.cfg.model)
        loss = OBJECTIVES[self.job.cfg.objective.kind](model, self.job.cfg)
        alone = make_train_step(loss, self.job.cfg.optim, model.cfg, shape.accumulation_steps)

        def step(
            states: TrainState, batches: PyTree, hypers: PyTree, frozen: Params, going: jax.Array
        ) -> tuple:
            every = jax.vmap(alone, spmd_axis_name="trial")
            after, numbers = every(states, batches, hypers, frozen)

            def chosen(new: jax.Array, old: jax.Array) -> jax.Array:
                return jnp.where(going.reshape(-1, *[1] * (new.ndim - 1)), new, old)

            states = jax.tree.map(chosen, after, states)
            going &= numbers["skipped"] <= hypers["max_skipped_steps"]
            return states, numbers, going & (states.step < hypers["num_steps"])

        layouts = self.states, self.numbers, self.numbers
        compiled = jax.jit(step, donate_argnums=0, out_shardings=layouts)

        def run_step(*arguments: PyTree) -> tuple:
            with jax.set_mesh(self.mesh):
                return compiled(*arguments)

        return run_step


def stacked_batches(jobs: list[Job], starts: list[int], stack: Stack) -> Callable[[int], PyTree]:
    """Return batches(number) -> every trial's batch, so many steps after its start, stacked.

    What has the same seed and start, and begins with the same parameters, is read once.
    """
    keys = [
        (job.cfg.train.seed, start, job.cfg.init if job.cfg.objective.has_reference else "")
        for job, start in zip(jobs, starts, strict=True)
    ]
    fetches = {key: job.train_batch for key, job in zip(keys, jobs, strict=True)}

    def batches(number: int) -> PyTree:
        found = {key: fetch(key[1] + number) for key, fetch in fetches.items()}
        return stack.place([found[key] for key in keys], stack.batches)

    return batches


def measure_alone(job: Job, width: int) -> float:
    """Return the seconds of one step of `width` trials one after the other, without compiling."""
    with memory.training_explained(job.cfg, job.mesh), jax.set_mesh(job.mesh):
        (state, frozen), batch = job.init(jax.random.key(0)), job.train_batch(0)
        hyper, seconds = make_hyper(job.cfg), []
        for _ in range(1 + MEASURED_STEPS):
            began = time.perf_counter()
            state, numbers = job.train_step(state, batch, hyper, frozen)
            jax.block_until_ready(numbers)
            seconds.append(time.perf_counter() - began)
    return width * min(seconds[1:])


def measure_together(job: Job, width: int) -> float:
    """Return the seconds of one vectorized step of `width` trials, compiling left out."""
    with memory.training_explained(job.cfg, job.mesh):
        return time_stack(job, Stack(job, width), width)


def time_stack(job: Job, stack: Stack, width: int) -> float:
    """Return the seconds of one step of `width` copies of a job in `stack`."""
    seconds = []
    with jax.set_mesh(job.mesh):
        first = [job.init(jax.random.key(0))] * width
        states, frozen = stack.place(first, (stack.states, stack.frozen))
        batches = stack.place([job.train_batch(0)] * width, stack.batches)
    hypers = stack.place([make_hyper(job.cfg)] * width, stack.numbers)
    going, step = stack.place([np.True_] * width, stack.numbers), stack.make_step()
    for _ in range(1 + MEASURED_STEPS):
        began = time.perf_counter()
        states, numbers, _ = step(states, batches, hypers, frozen, going)
        jax.block_until_ready(numbers)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


class Follower:
    """The run directory of one trial among others: its record, its end."""

    def __init__(self, job: Job, run: Path) -> None:
        self.job, self.run, self.message, self.ended = job, run, "", False
        with (
            open(run / "log.txt", "a", buffering=1) as log,
            redirect_stdout(log),
            jax.set_mesh(job.mesh),
        ):
            begin_run(job, run, print)
            first = start_state(job, run, print)
            start = functools.partial(first_start, job, run, print)
            self.job = job = with_reference(job, run, *first, start, print)
        self.first = jax.device_get(first)  # one device may not hold all of them
        self.start = int(first[0].step)
        self.recorder = Recorder(job, run, self.start, self.say)
        if self.start and self.start not in self.recorder.losses:  # stopped before evaluating
            self.validate(self.start, lambda: first)
        if self.start >= job.cfg.train.num_steps:
            self.close()

    def say(self, text: str) -> None:
        """Write a line to the trial's log."""
        with open(self.run / "log.txt", "a") as log:
            print(text, file=log)

    def read(self, step: int, numbers: dict[str, float]) -> None:
        """Write the numbers of a step; too many updates left out end the trial."""
        problem, _ = self.recorder.read(step, numbers)
        if problem:
            self.message = f"{problem}; frozen there, not saved"
            self.close()

    def between(
        self, step: int, state: Callable[[], tuple[TrainState, Params]], stopping: bool
    ) -> None:
        """Evaluate and save where it is time; end at the last step, or where all are stopping."""
        cfg = self.job.cfg
        last = step == cfg.train.num_steps
        state = functools.cache(state)
        self.validate(step, state)
        if last or stopping or due(step, cfg.checkpoint.every_steps):
            with jax.set_mesh(self.job.mesh):
                self.recorder.save(step, *state())
        if last or stopping:
            self.close()

    def validate(self, step: int, state: Callable[[], tuple[TrainState, Params]]) -> None:
        """Evaluate at the last step, and where it is time."""
        cfg = self.job.cfg
        if step < cfg.train.num_steps and not self.recorder.evaluates_at(step):
            return
        trained, frozen = state()
        with jax.set_mesh(self.job.mesh):
            params = merge_params(trained.params, frozen)
            self.recorder.validate(step, params, trained.opt_state)

    def close(self) -> None:
        """End the trial, after the checkpoints in progress."""
        if not self.ended:
            self.ended = True
            self.recorder.writer.close()
            self.recorder.checkpoints.close()


def align(jobs: list[Job], runs: list[Path]) -> None:
    """Set aside what was saved after the last step that all have, where batches grow.

    Then all must be at the same step; else each resumes from its own.
    """
    if train_ramp(jobs[0].cfg).steps:
        saved = [set(rundir.saved_steps(run / "checkpoints")) for run in runs]
        for run in runs:
            checkpoint.set_aside(run / "checkpoints", max({0} | set.intersection(*saved)))


def train_together(jobs: list[Job], runs: list[Path], stop: StopRequest) -> list[str]:
    """Train the jobs in their run directories; return why each ended early, "" where it did not.

    Each resumes from its own newest checkpoint. Raises Stopped after a signal, all saved.
    """
    first = jobs[0]
    with ExitStack() as owned:
        owned.enter_context(memory.training_explained(first.cfg, first.mesh))
        for run in runs:
            owned.enter_context(own_run(run))
        align(jobs, runs)
        followers = []
        for job, run in zip(jobs, runs, strict=True):
            followers.append(Follower(job, run))
            owned.callback(followers[-1].close)
        owned.callback(setattr, stop, "deferred", False)
        stop.deferred = True
        stack = Stack(first, len(jobs))
        first_states = [follower.first for follower in followers]
        states, frozen = stack.place(first_states, (stack.states, stack.frozen))
        hypers = stack.place([make_hyper(job.cfg) for job in jobs], stack.numbers)
        going = stack.place([np.bool_(not f.ended) for f in followers], stack.numbers)
        starts = [follower.start for follower in followers]
        rounds = max(
            job.cfg.train.num_steps - start for job, start in zip(jobs, starts, strict=True)
        )
        step = stack.make_step()
        fetch = stacked_batches([follower.job for follower in followers], starts, stack)
        ahead = first.cfg.data.prefetch_batches
        with closing(fetch_ahead(fetch, 0, rounds, ahead)) as fetched:
            for number, batches in enumerate(fetched, 1):
                states, numbers, going = step(states, batches, hypers, frozen, going)
                read = {name: np.asarray(values).tolist() for name, values in numbers.items()}
                stopping = bool(stop.signal)
                for index, follower in enumerate(followers):
                    own = follower.start + number
                    if not follower.ended:
                        follower.read(own, {name: v[index] for name, v in read.items()})
                    if not follower.ended:
                        take = functools.partial(stack.take, (states, frozen), index)
                        follower.between(own, take, stopping)
                if stopping:
                    raise stop.stopped(
                        "saved what was trained together; rerun the same command to resume"
                    )
                if all(follower.ended for follower in followers):
                    break
        return [follower.message for follower in followers]
