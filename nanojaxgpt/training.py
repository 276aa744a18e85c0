"""From a config to a trained run: its data, its job, where it starts, and the end."""

import functools
import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from nanojaxgpt import checkpoint, finish, memory, rundir, sharding
from nanojaxgpt.adapters import base_identity, frozen_base, place_adapters, read_start
from nanojaxgpt.batches import make_train_batch
from nanojaxgpt.branch import branch_state
from nanojaxgpt.config import AnyConfig, typed
from nanojaxgpt.config.sections import Config
from nanojaxgpt.data.loader import RunData, prepare_data, resolve
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.evals.monitor import make_benchmarks
from nanojaxgpt.horizon import warmup_warning
from nanojaxgpt.hosts.joining import preflight
from nanojaxgpt.hosts.process import StopRequest, stop_signals
from nanojaxgpt.hosts.team import ALONE, Team
from nanojaxgpt.interchange.opening import adopt_model, inherited_provenance, inherited_template
from nanojaxgpt.interchange.provenance import save_provenance
from nanojaxgpt.interchange.templates import save_template
from nanojaxgpt.loop import Loop
from nanojaxgpt.model.config import JobConfig
from nanojaxgpt.model.parameters import Params, count_params, parameters
from nanojaxgpt.model.transformer import Transformer, init_params
from nanojaxgpt.objectives import Loss
from nanojaxgpt.recorder import Job, train_ramp
from nanojaxgpt.reference import with_reference
from nanojaxgpt.rollout import with_rollouts
from nanojaxgpt.rundir import enter_run, own_run, write_identity
from nanojaxgpt.step import (
    TrainState,
    first_state,
    make_hyper,
    make_step,
    open_state,
)
from nanojaxgpt.teacher import load_teacher
from nanojaxgpt.trackers import check_installed
from nanojaxgpt.trainable import (
    HEAD,
    TEACHER,
    merge_params,
    split_lines,
    trained_patterns,
    without_teacher,
)
from nanojaxgpt.validation import make_evaluation


def prepare_together(
    cfg: Config, report: Callable[[str], None], team: Team, run: Path | None = None
) -> RunData:
    """Return the data, prepared by process 0 before the others open it, or make their own copy.

    Raises DataError on all hosts where one has other data.
    """
    data = team.first_then_all(lambda: prepare_data(cfg, report, run), "to prepare the data")
    if others := team.differing(data.identity):
        raise DataError(f"the corpus or its tokenizer on {others} differs from that of host 0")
    return data


def make_job(cfg: JobConfig, data: RunData, mesh: Mesh, loss_fn: Loss | None = None) -> Job:
    """Return everything the loop needs; allocates nothing.

    Raises ConfigError, DataError, and MemoryExceeded where the state alone does not fit.
    """
    step, train_batch = make_step(cfg, mesh, loss_fn), make_train_batch(cfg, data, mesh)
    memory.check_state(cfg, mesh, step.abstract, step.frozen)
    lower = functools.partial(memory.suggestions, cfg, mesh)
    train_step = memory.checked(step.train_step, mesh, "a training step", lower)
    step = step._replace(train_step=train_step)
    params = merge_params(step.abstract.params, step.frozen)
    held = {"parameters": params, "optimizer state": step.abstract.opt_state}
    job_eval = make_evaluation(cfg, data, mesh, Transformer(cfg.model), held)
    job = Job(cfg, mesh, data, *step, train_batch, job_eval)
    if cfg.eval.tasks:
        job = job._replace(benchmarks=make_benchmarks(cfg, data, mesh))
    return share_job(job, cfg)


def share_job(job: Job, cfg: JobConfig) -> Job:
    """Return the job of another config with the programs of `job`, so that nothing recompiles.

    The configs must agree in all that is compiled: see `sweep.plan.program_key`.
    """
    return job._replace(
        cfg=cfg,
        init=functools.partial(job.init, scale=np.float32(cfg.init.scale)),
        train_batch=make_train_batch(cfg, job.data, job.mesh),
        evaluate=functools.partial(job.evaluate, hyper=make_hyper(cfg)),
    )


def start_state(
    job: Job, run: Path, report: Callable[[str], None], team: Team = ALONE
) -> tuple[TrainState, Params]:
    """Return the state to start from, and the frozen parameters, a teacher's among them.

    It is that of this run's newest good checkpoint, or `first_start`.
    """
    folder = Path(run) / "checkpoints"
    abstract = job.abstract.items(job.cfg, job.frozen)
    found = checkpoint.restore(folder, abstract, report=report, team=team)
    if found:
        step, items = found
        team.decide(lambda: checkpoint.set_aside(folder, step))
        report(f"resuming from step {step}")
        step = jax.device_put(np.int32(step), job.shardings.step)
        state, frozen = open_state(job.cfg, step, items)
        if job.cfg.lora.rank:
            frozen = frozen_base(job.cfg, run, job.mesh, report, team)
    else:
        state, frozen = first_start(job, run, report, team)
    if job.cfg.objective.kind == "distill":
        tokenizer = job.data.tokenizer
        frozen = {**frozen, TEACHER: load_teacher(job.cfg, job.mesh, tokenizer, report, team)}
    return state, frozen


def first_start(
    job: Job, run: Path, report: Callable[[str], None], team: Team = ALONE
) -> tuple[TrainState, Params]:
    """Return the state of a run before its first step, and the frozen parameters.

    1. The whole state of another run (init.state=all). 2. The parameters of another run
    (init.from_run) or model (init.from_model). 3. From scratch, by train.seed.
    """
    init, adapted = job.cfg.init, job.cfg.lora.rank > 0
    if init.state == "all":
        return branch_state(job, report, team)
    if not (init.from_run or init.from_model):
        state, frozen = job.init(jax.random.key(job.cfg.train.seed))
        return state, without_teacher(frozen)
    step = team.decide(lambda: base_identity(job.cfg, run))["step"] if adapted else init.step
    origin, params = read_start(job.cfg, job.mesh, step, report, team)
    report(f"starting from the parameters of {origin}")
    labels, theirs = job.cfg.model.num_labels, len(params.get(HEAD, ()))
    if labels != theirs:
        params = with_new_head(job, params)
        report(f"a new head for labels: {labels} rows, where it has {theirs}")
    if adapted:
        key = jax.random.key(job.cfg.train.seed)
        params = place_adapters(job.cfg.model, params, key, job.mesh)
    first = functools.partial(first_state, job.cfg)
    frozen = jax.tree.map(lambda leaf: leaf.sharding, without_teacher(job.frozen))
    return jax.jit(first, out_shardings=(job.shardings, frozen), donate_argnums=0)(params)


def with_new_head(job: Job, params: Params) -> Params:
    """Return the parameters with the head for labels, if any, that a run from scratch has."""
    rest = {name: value for name, value in params.items() if name != HEAD}
    if not job.cfg.model.num_labels:
        return rest
    abstract = merge_params(job.abstract.params, job.frozen)[HEAD]
    make = jax.jit(
        lambda rng: init_params(job.cfg.model, rng)[HEAD], out_shardings=abstract.sharding
    )
    return {**rest, HEAD: make(jax.random.key(job.cfg.train.seed))}


def fit(
    cfg: AnyConfig,
    run: Path,
    loss_fn: Loss | None = None,
    report: Callable[[str], None] = print,
    team: Team = ALONE,
) -> TrainState:
    """Train `cfg` in the run directory `run`, from where it stands to its last step.

    Of several processes, a `team`, the first alone decides, writes and reports. Raises a
    UserError for what the user can mend, Stopped after a signal (the state is saved).
    """
    run = Path(run)
    cfg = adopt_model(typed(cfg), run)
    if not team.first:
        report = report_nothing
    with stop_signals() as stop, own_run(run) if team.first else nullcontext():
        preflight(team, cfg, run)
        job = open_job(cfg, loss_fn, report, team, run)
        state = train_job(job, run, stop, report, team)
        if team.first:
            finish.end_run(run, report)
        return state


def report_nothing(text: str) -> None:
    """Report nothing."""


def open_job(
    cfg: Config,
    loss_fn: Loss | None = None,
    report: Callable[[str], None] = print,
    team: Team = ALONE,
    run: Path | None = None,
) -> Job:
    """Return the job of a config, its data and its mesh opened. Raises ConfigError, DataError.

    `run` is the run directory, where the job is for one alone.
    """
    if team.first:
        check_installed(cfg.train.trackers)
    data = prepare_together(cfg, report, team, run)
    return make_job(resolve(cfg, data), data, sharding.make_mesh(cfg.mesh.given()), loss_fn)


def begin_run(job: Job, run: Path, report: Callable[[str], None]) -> None:
    """Write the run's identity into its directory, or check it against the one there."""
    with rundir.writing(run, ConfigError):
        write_run(job, run, report)


def write_run(job: Job, run: Path, report: Callable[[str], None]) -> None:
    """Do the work of `begin_run`; raises OSError where it can't write."""
    newest = max(rundir.saved_steps(run / "checkpoints"), default=0)
    for name, old, new in enter_run(run, job.cfg, newest):
        report(f"changed since the run began: {name} {old!r} -> {new!r}")
    (run / "tokenizer").mkdir(exist_ok=True)
    job.data.tokenizer.save(run / "tokenizer")
    template = job.data.template or inherited_template(job.cfg.init, run)
    save_template(run / "tokenizer", template)
    save_provenance(run, inherited_provenance(job.cfg.init, run))
    devices = [device.device_kind for device in job.mesh.devices.flat]
    base = base_identity(job.cfg, run) if job.cfg.lora.rank else {}
    write_identity(run, job.cfg, job.data.identity, devices, report, base)
    num_params = count_params(job.cfg.model)
    report(f"{run}: {num_params:,} parameters, {job.data.size}, {len(devices)} x {devices[0]}")
    if trained_patterns(job.cfg):
        table = parameters(job.cfg.model)
        for line in split_lines(job.abstract.params, job.abstract.opt_state, table):
            report(line)
    if warning := warmup_warning(job.cfg):
        report(warning)
    ramp = train_ramp(job.cfg)
    if ramp.steps:
        sizes = ", ".join(f"{rows} from step {begin + 1}" for begin, rows in ramp.stages())
        report(f"sequences in a batch: {sizes}")


def check_space(job: Job, run: Path) -> None:
    """Raise ConfigError where the run directory's disk has too little space for a checkpoint."""
    leaves = jax.tree.leaves(job.abstract.items(job.cfg, job.frozen))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    if (free := shutil.disk_usage(run).free) < size:
        raise ConfigError(
            f"a checkpoint takes up to {size:,} bytes, and the disk of {run} has {free:,} bytes "
            "free; free some, or choose another --run"
        )


def train_job(
    job: Job, run: Path, stop: StopRequest, report: Callable[[str], None], team: Team = ALONE
) -> TrainState:
    """Train a job in the run directory that this process owns; raises what `fit` raises."""
    team.decide(lambda: begin_run(job, run, report))
    with memory.training_explained(job.cfg, job.mesh), jax.set_mesh(job.mesh):
        state, frozen = start_state(job, run, report, team)
        start = functools.partial(first_start, job, run, report, team)
        job = with_rollouts(with_reference(job, run, state, frozen, start, report, team), start)
        if state.step < job.cfg.train.num_steps:
            team.decide(lambda: check_space(job, run))
        return Loop(job, run, int(state.step), stop, team).train(state, frozen)
