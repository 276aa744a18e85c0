"""From a config to a trained run: the state, the pure step, and the loop around it."""

import functools
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from nanojaxgpt import checkpoint, metrics, optim, sharding
from nanojaxgpt.config import cache_dir
from nanojaxgpt.data.loader import Data, fetch_ahead, open_data
from nanojaxgpt.data.rows import Batch, ReadRows, make_eval_batches, make_train_rows
from nanojaxgpt.data.sources import DataConfig
from nanojaxgpt.errors import ConfigError, DataError, NonFiniteError
from nanojaxgpt.evaluate import evaluate, make_eval_step
from nanojaxgpt.hosts.joining import preflight
from nanojaxgpt.hosts.process import StopRequest, stop_signals
from nanojaxgpt.hosts.team import ALONE, Team
from nanojaxgpt.hosts.watchdog import Watchdog
from nanojaxgpt.loss import loss_sum
from nanojaxgpt.model import ModelConfig, Transformer, init_params
from nanojaxgpt.optim import Hyper
from nanojaxgpt.rundir import enter_run, own_run, write_identity

LossFn = Callable[[Any, Batch, Hyper, jax.Array], jax.Array]


class TrainState(NamedTuple):
    """All that training carries from step to step; `step` counts the updates done."""

    step: jax.Array
    params: Any
    opt_state: Any


def make_loss(model: Transformer, loss_chunks: int) -> LossFn:
    """Return loss(params, batch, hyper, rng) -> the sum of weighted token losses in nats."""

    def loss(params: Any, batch: Batch, hyper: Hyper, rng: jax.Array) -> jax.Array:
        (x_BTD, head), _ = model.apply(
            {"params": params}, batch.tokens_BT, batch.positions_BT, batch.segments_BT,
            deterministic=model.cfg.dropout == 0, logits=False, rngs={"dropout": rng},
        )  # fmt: skip
        return loss_sum(
            head, x_BTD, batch.targets_BT, batch.weights_BT, hyper["z_loss"], loss_chunks
        )

    return loss


def make_hyper(cfg: ConfigDict) -> dict[str, np.ndarray]:
    """Return the numbers that the step takes as arguments: other values don't recompile it."""
    numbers = {k: v for k, v in cfg.optim.items() if isinstance(v, int | float)}
    numbers |= {"num_steps": cfg.train.num_steps, "z_loss": cfg.train.z_loss}
    hyper = {name: np.float32(value) for name, value in numbers.items()}
    return hyper | {"seed": np.uint32(cfg.train.seed)}


def make_init(cfg: ConfigDict) -> Callable[[jax.Array], TrainState]:
    """Return init(rng) -> the state at step 0, its leaves boxed with their logical axes."""
    model_cfg = ModelConfig(**cfg.model)
    optimizer = optim.make_optimizer(cfg.optim.optimizer, make_hyper(cfg), 0.0, "")

    def init(rng: jax.Array) -> TrainState:
        params = init_params(model_cfg, rng)
        return TrainState(jnp.int32(0), params, optimizer.init(params))

    return init


def make_train_step(
    loss_fn: LossFn, optim_cfg: ConfigDict, accumulation_steps: int = 1, width: float = 1.0
) -> Callable[[TrainState, Batch, Hyper], tuple[TrainState, dict[str, jax.Array]]]:
    """Return the pure train_step(state, batch, hyper) -> (state, metrics).

    An update that is not finite is left out: the state keeps its numbers, and `skipped` is 1.
    `width` is muP's, see optim.rate_multipliers.
    """
    name, schedule = optim_cfg.optimizer, optim_cfg.schedule
    decay_pattern = optim_cfg.decay_pattern
    multipliers = optim.rate_multipliers(optim_cfg.rate_multipliers, name, width)

    def train_step(
        state: TrainState, batch: Batch, hyper: Hyper
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(hyper["seed"]), state.step)
        loss, grads = accumulate(loss_fn, state.params, batch, hyper, rng, accumulation_steps)
        grads = optim.frozen_gradients(grads, multipliers)
        weight = jnp.maximum(jnp.sum(batch.weights_BT), 1e-9)
        norm = optax.global_norm(grads) / weight
        scale = optim.clip_factor(norm, hyper["clip_norm"]) / weight
        grads = jax.tree.map(lambda grad: grad * scale.astype(grad.dtype), grads)
        rate = optim.learning_rate(schedule, state.step, hyper)
        optimizer = optim.make_optimizer(name, hyper, rate, decay_pattern, multipliers)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        checks = [jnp.isfinite(x).all() for x in (loss, norm, *jax.tree.leaves(params))]
        finite = functools.reduce(jnp.logical_and, checks)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        numbers = {"loss": loss / weight, "grad_norm": norm, "learning_rate": rate}
        numbers["skipped"] = 1 - finite.astype(jnp.float32)
        return TrainState(state.step + 1, params, opt_state), numbers

    return train_step


def accumulate(
    loss_fn: LossFn, params: Any, batch: Batch, hyper: Hyper, rng: jax.Array, parts: int
) -> tuple[jax.Array, Any]:
    """Return loss and gradient sums over the batch, made in `parts` micro-batches."""
    value_and_grad = jax.value_and_grad(loss_fn)
    if parts == 1:
        return value_and_grad(params, batch, hyper, rng)

    def split(x: jax.Array) -> jax.Array:
        # Rows are dealt out like cards, so that each device's rows stay on that device.
        micro = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
        return sharding.constrain(micro, None, "batch", "sequence")

    def add(total: tuple, part: tuple) -> tuple[tuple, None]:
        micro, index = part
        found = value_and_grad(params, micro, hyper, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, total, found), None

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(add, zero, (jax.tree.map(split, batch), jnp.arange(parts)))[0]


class Job(NamedTuple):
    """What one run needs, built from its config; `shardings` and `abstract` describe the state."""

    cfg: ConfigDict
    mesh: Mesh
    data: Data
    shardings: TrainState
    abstract: TrainState
    init: Callable[[jax.Array], TrainState]
    train_step: Callable
    train_batch: Callable[[int], Batch]
    evaluate: Callable[..., dict[str, float]]


def resolve(cfg: ConfigDict, data: Data) -> ConfigDict:
    """Return the config with the vocabulary that the tokenizer gives. Raises ConfigError."""
    cfg, size = cfg.copy_and_resolve_references(), data.tokenizer.vocab_size
    if 0 < cfg.model.vocab_size < size:
        raise ConfigError(f"model.vocab_size={cfg.model.vocab_size}, but the tokenizer has {size}")
    cfg.model.vocab_size = cfg.model.vocab_size or size
    return cfg.lock()


def prepare_data(cfg: ConfigDict, report: Callable[[str], None]) -> Data:
    """Return the data of the config, tokenized now where it is not there yet."""
    return open_data(DataConfig(**cfg.data), cache_dir(cfg), report)


def prepare_together(cfg: ConfigDict, report: Callable[[str], None], team: Team) -> Data:
    """Return the data, prepared by process 0 before the others open it, or make their own copy.

    Raises DataError on all hosts where one has other data.
    """
    data = team.first_then_all(lambda: prepare_data(cfg, report), "to prepare the data")
    if others := team.differing(data.identity):
        raise DataError(f"the corpus or its tokenizer is another one on {others} than on host 0")
    return data


class Step(NamedTuple):
    """The jitted train_step of a config on a mesh, and the state that it takes, without arrays."""

    shardings: TrainState
    abstract: TrainState
    init: Callable[[jax.Array], TrainState]
    train_step: Callable


def make_step(cfg: ConfigDict, mesh: Mesh, loss_fn: LossFn | None = None) -> Step:
    """Return the step on a mesh, whose devices need not be here. Raises ConfigError."""
    shape = cfg.train
    sharding.check_batch(
        "train.batch_size", shape.batch_size, shape.accumulation_steps, cfg.model.seq_len, mesh
    )
    model = Transformer(ModelConfig(**cfg.model))
    # The key is made in the trace, too: a device that is not here can make none.
    boxed = jax.eval_shape(lambda: make_init(cfg)(jax.random.key(0)))
    shardings, plain = sharding.tree_shardings(boxed, mesh), sharding.unbox(boxed)
    optim.path_mask(plain.params, cfg.optim.decay_pattern, "optim.decay_pattern")
    for pattern, _ in optim.rate_multipliers(cfg.optim.rate_multipliers, cfg.optim.optimizer, 1):
        optim.path_mask(plain.params, pattern, "optim.rate_multipliers")
    abstract = checkpoint.with_shardings(plain, shardings)
    loss_fn = loss_fn or make_loss(model, shape.loss_chunks)
    init = jax.jit(lambda rng: sharding.unbox(make_init(cfg)(rng)), out_shardings=shardings)
    train_step = jax.jit(
        make_train_step(loss_fn, cfg.optim, shape.accumulation_steps, model.cfg.width),
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
    )
    return Step(shardings, abstract, init, train_step)


def make_job(cfg: ConfigDict, data: Data, mesh: Mesh, loss_fn: LossFn | None = None) -> Job:
    """Return everything the loop needs. Raises ConfigError or DataError; allocates nothing."""
    step, train_batch = make_step(cfg, mesh, loss_fn), make_train_batch(cfg, data, mesh)
    job_eval = make_evaluation(cfg, data, mesh, Transformer(ModelConfig(**cfg.model)))
    return Job(cfg, mesh, data, *step, train_batch, job_eval)


def share_job(job: Job, cfg: ConfigDict) -> Job:
    """Return the job of another config with the programs of `job`, so that nothing recompiles.

    The configs must agree in all that is compiled: see `sweep.plan.program_key`.
    """
    return job._replace(cfg=cfg, train_batch=make_train_batch(cfg, job.data, job.mesh))


def make_train_batch(cfg: ConfigDict, data: Data, mesh: Mesh) -> Callable[[int], Batch]:
    """Return batch(step) -> the global batch of a 0-based training step."""
    size, seq_len = cfg.train.batch_size, cfg.model.seq_len
    rows = make_train_rows(data.train(seq_len), size, cfg.train.seed)
    return make_batches(rows, size, seq_len, mesh)


def make_batches(
    rows: ReadRows, batch_size: int, seq_len: int, mesh: Mesh
) -> Callable[[int], Batch]:
    """Return batch(step) -> that step's batch as global arrays; a host reads its own rows alone."""
    return lambda step: sharding.global_batch(
        functools.partial(rows, int(step)), batch_size, seq_len, mesh
    )


def make_evaluation(
    cfg: ConfigDict, data: Data, mesh: Mesh, model: Transformer
) -> Callable[..., dict[str, float]]:
    """Return evaluate(params) -> the numbers over the validation split, or its first batches.

    A second argument is a function through which the batches go, a watchdog's say.
    """
    size, seq_len = cfg.eval.batch_size or cfg.train.batch_size, cfg.model.seq_len
    sharding.check_batch("eval.batch_size", size, 1, seq_len, mesh)
    count, rows = make_eval_batches(data.validation(seq_len), size)
    count = min(count, cfg.eval.num_batches or count)
    fetch, ahead = make_batches(rows, size, seq_len, mesh), cfg.data.prefetch_batches
    eval_step = make_eval_step(model, data.tokenizer.token_bytes(), cfg.train.loss_chunks)

    def run_evaluation(
        params: Any, each: Callable[[Iterable[Batch]], Iterable[Batch]] = iter
    ) -> dict[str, float]:
        return evaluate(eval_step, params, each(fetch_ahead(fetch, 0, count, ahead)))

    return run_evaluation


def start_state(
    job: Job, run: Path, report: Callable[[str], None], team: Team = ALONE
) -> TrainState:
    """Return the state to go on from.

    1. This run's newest good checkpoint. 2. The parameters of another run (init.from_run).
    3. Pretrained weights, when there is a reader for them. 4. From scratch, by train.seed.
    """
    folder, wanted = Path(run) / "checkpoints", job.abstract._asdict()
    del wanted["step"]
    found = checkpoint.restore(folder, wanted, report=report, team=team)
    if found:
        step, items = found
        team.decide(lambda: checkpoint.set_aside(folder, step))
        report(f"going on from step {step}")
        return TrainState(jax.device_put(np.int32(step), job.shardings.step), **items)
    state = job.init(jax.random.key(job.cfg.train.seed))
    if job.cfg.init.from_run:
        other, model_cfg = Path(job.cfg.init.from_run), ModelConfig(**job.cfg.model)
        step, params = checkpoint.load_params(
            other, model_cfg, job.mesh, job.cfg.init.step, report, team
        )
        report(f"starting from the parameters of {other}, step {step}")
        state = state._replace(params=params)
    return state


def fit(
    cfg: ConfigDict,
    run: Path,
    loss_fn: LossFn | None = None,
    report: Callable[[str], None] = print,
    team: Team = ALONE,
) -> TrainState:
    """Train `cfg` in the run directory `run`, from where it stands to its last step.

    Of several processes, a `team`, the first alone decides, writes and reports. Raises a
    UserError for what the user can mend, Stopped after a signal (the state is saved).
    """
    run = Path(run)
    if not team.first:
        report = ignore
    with stop_signals() as stop, own_run(run) if team.first else nullcontext():
        preflight(team, cfg, run)
        state = train_job(open_job(cfg, loss_fn, report, team), run, stop, report, team)
        if team.first:
            metrics.plot_losses(metrics.read_metrics(run), run / "loss.png", run.name)
        return state


def ignore(text: str) -> None:
    """Report nothing."""


def open_job(
    cfg: ConfigDict,
    loss_fn: LossFn | None = None,
    report: Callable[[str], None] = print,
    team: Team = ALONE,
) -> Job:
    """Return the job of a config, its data and its mesh opened. Raises ConfigError, DataError."""
    data = prepare_together(cfg, report, team)
    return make_job(resolve(cfg, data), data, sharding.make_mesh(cfg.mesh), loss_fn)


def begin_run(job: Job, run: Path, report: Callable[[str], None]) -> None:
    """Write what identifies the run into its directory, or check it against what is there."""
    for name, old, new in enter_run(run, job.cfg):
        report(f"changed since the run began: {name} {old!r} -> {new!r}")
    (run / "tokenizer").mkdir(exist_ok=True)
    job.data.tokenizer.save(run / "tokenizer")
    devices = [device.device_kind for device in job.mesh.devices.flat]
    for change in write_identity(run, job.cfg, job.data.identity, devices):
        report(f"changed since the run began: {change}")
    num_params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(job.abstract.params))
    report(f"{run}: {num_params:,} parameters, {job.data.size}, {len(devices)} x {devices[0]}")


def train_job(
    job: Job, run: Path, stop: StopRequest, report: Callable[[str], None], team: Team = ALONE
) -> TrainState:
    """Train a job in the run directory that this process owns; raises what `fit` raises."""
    team.decide(lambda: begin_run(job, run, report))
    with jax.set_mesh(job.mesh):
        state = start_state(job, run, report, team)
        return Loop(job, run, int(state.step), stop, team).train(state)


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
            self.writer = metrics.MetricsWriter(run, start)
            self.progress = metrics.Progress(cfg.train.num_steps, start)
        self.losses = dict(team.decide(lambda: list(metrics.validation_losses(run).items())))
        kept = cfg.checkpoint
        keep = checkpoint.Keep(
            kept.keep_last, kept.keep_every_steps, kept.keep_best, lambda: self.losses
        )
        self.checkpoints = checkpoint.Checkpoints(run / "checkpoints", keep)
        self.saved = start
        model_cfg, seq_len = ModelConfig(**cfg.model), cfg.model.seq_len
        self.tokens_per_step = cfg.train.batch_size * seq_len
        peak = metrics.peak_flops(job.mesh.devices.flat[0].device_kind) * job.mesh.size
        self.mfu_per_token = metrics.train_flops(model_cfg, seq_len) / seq_len / peak if peak else 0
        self.skipped = 0  # updates left out in a row, up to the last step read
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
                state, numbers = self.job.train_step(state, batch, hyper)
                self.read()
                self.unread = step, numbers
                self.between(step, state)
            if last not in self.losses:
                self.validate(last, state)
        except Exception:
            # What is being saved would be lost as the process ends.
            self.team.bounded(self.checkpoints.close)
            raise
        finally:
            self.stop.deferred = False
            self.watchdog.close()
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
            self.checkpoints.save(step, state.params, state.opt_state)
            self.saved = step
            self.reset_clock(step)
        if stopping:
            self.watchdog.close()  # writing may take its time
            self.checkpoints.close()
            self.team.gather(None, "to save")
            self.stop.signal = signal
            raise self.stop.stopped(f"saved step {step} in {self.run}; the same command goes on")
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
        self.skipped = self.skipped + 1 if values.pop("skipped") else 0
        if self.skipped > self.job.cfg.optim.max_skipped_steps:
            kept = f"step {self.saved} is saved" if self.saved else "nothing was saved yet"
            raise NonFiniteError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}, at "
                f"learning rate {values['learning_rate']:.2e}; {kept}. Lower optim.learning_rate, "
                "lengthen optim.warmup_steps, or set optim.clip_norm, in a new --run"
            )
        if self.skipped:
            self.progress.say(f"step {step}: its update is not finite and was left out")
            return
        now = time.monotonic()
        if not self.progress.began:
            self.progress.began = self.clock = now
            self.clock_step = step
        if due(step, self.job.cfg.train.log_every_steps) or step == self.job.cfg.train.num_steps:
            steps = step - self.clock_step
            rate = steps * self.tokens_per_step / (now - self.clock) if steps else 0.0
            values["tokens_per_second"] = round(rate, 1)
            if self.mfu_per_token:
                values["mfu"] = rate * self.mfu_per_token
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
        self.progress.say(
            f"step {step}: validation loss {found['loss']:.4f}, "
            f"{found['bits_per_byte']:.4f} bits per byte over {found['tokens']:,} tokens"
        )


def due(step: int, every: int) -> bool:
    """Return whether something that happens every so many steps happens now; 0: never."""
    return every > 0 and step % every == 0
