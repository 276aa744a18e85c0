"""The pure training step of a config: its state, its loss and its numbers, jitted on a mesh."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nanojaxgpt import checkpoint, optim, sharding
from nanojaxgpt.checks import parse_multiplier
from nanojaxgpt.config.sections import Config, Objective, Optim
from nanojaxgpt.horizon import decay_begin
from nanojaxgpt.model.config import MULTIPLIERS, JobConfig, ModelConfig, Multipliers
from nanojaxgpt.model.lora import check_targets
from nanojaxgpt.model.parameters import Params, PyTree, parameters
from nanojaxgpt.model.quantize import quantize_base, with_int8_rows
from nanojaxgpt.model.remat import check_offload
from nanojaxgpt.model.transformer import Transformer, init_params
from nanojaxgpt.objectives import (
    Loss,
    Metric,
    classify,
    distill,
    language,
    policy,
    preference,
    reward,
)
from nanojaxgpt.schedules import Hyper, learning_rate
from nanojaxgpt.teacher import teacher_config
from nanojaxgpt.trainable import (
    TEACHER,
    check_trainable,
    frozen_layers,
    merge_params,
    split_job_params,
    trained_patterns,
    without_teacher,
)

# Numbers of the section `objective` that the step takes as arguments.
TRACED = [name for name, rule in Objective.rules().items() if rule.traced]


class TrainState(NamedTuple):
    """The state that training carries from step to step; `step` counts the steps done.

    `params` are those that train; the frozen ones are an argument of the step. Together they are
    evaluated and sampled. If `params` are an average, the parameters that the optimizer moves are
    in its state, see optim.average; so is the float32 copy of parameters stored in less, see
    optim.Master.
    """

    step: jax.Array
    params: Params
    opt_state: PyTree
    recent: optim.Recent

    def items(self, cfg: Config, frozen: Params) -> dict[str, PyTree]:
        """Return the items of a checkpoint by name: all parameters, and the rest but the step.

        With adapters the frozen parameters stay where they came from, see adapters.py.
        """
        whole = merge_params(self.params, {} if cfg.lora.rank else without_teacher(frozen))
        return {"params": whole, "opt_state": self.opt_state, "recent": self.recent}


def open_state(
    cfg: JobConfig, step: jax.Array, items: dict[str, PyTree]
) -> tuple[TrainState, Params]:
    """Return the state and the frozen parameters from the items of a checkpoint."""
    params, frozen = split_job_params(items["params"], cfg)
    return TrainState(step, params, items["opt_state"], items["recent"]), frozen


def make_hyper(cfg: Config) -> dict[str, PyTree]:
    """Return the numbers that the step takes as arguments: other values don't recompile it.

    All are scalars, except `rate_multipliers`, a tuple of factors; their patterns are compiled.
    """
    numbers = {k: v for k, v in cfg.optim.given().items() if isinstance(v, int | float)}
    numbers |= {"num_steps": cfg.train.num_steps, "z_loss": cfg.train.z_loss}
    numbers |= {name: getattr(cfg.objective, name) for name in TRACED}
    numbers["decay_begin"] = decay_begin(cfg)
    numbers |= dict(zip(MULTIPLIERS, traced_multipliers(cfg), strict=True))
    hyper: dict[str, PyTree] = {name: np.float32(value) for name, value in numbers.items()}
    entries = optim.rate_multipliers(cfg.optim.rate_multipliers, cfg.optim.optimizer, 1, {})
    hyper["rate_multipliers"] = tuple(np.float32(factor) for _, factor in entries)
    return hyper | {"seed": np.uint32(cfg.train.seed)}


# The loss of each objective.kind.
OBJECTIVES: dict[str, Callable[[Transformer, Config], Loss]] = {
    "language": lambda model, cfg: language.make_loss(model, cfg.train.loss_chunks),
    "classify": lambda model, cfg: classify.make_loss(model),
    "preference": lambda model, cfg: preference.make_loss(
        model, cfg.train.loss_chunks, cfg.objective.loss
    ),
    "reward": lambda model, cfg: reward.make_loss(model),
    "distill": lambda model, cfg: distill.make_loss(
        model, Transformer(teacher_config(cfg)), cfg.train.loss_chunks
    ),
    "policy": lambda model, cfg: policy.make_loss(model, cfg.train.loss_chunks, cfg.objective),
}


def traced_multipliers(cfg: Config) -> Multipliers:
    """Return the model's multipliers as numbers that a jitted function takes as arguments."""
    sections = vars(cfg.model) | {"alpha": cfg.lora.alpha}
    return Multipliers(*(np.float32(sections[name]) for name in MULTIPLIERS))


def make_init(cfg: JobConfig) -> Callable[..., tuple[TrainState, Params]]:
    """Return init(rng, scale) -> (the state at step 0, the frozen parameters).

    `scale` (default: init.scale) multiplies the matrices, and may be traced.
    """
    matrices = frozenset(path for path, row in parameters(cfg.model).items() if row.is_matrix)

    def init(
        rng: jax.Array, scale: jax.Array | float = cfg.init.scale
    ) -> tuple[TrainState, Params]:
        params = optim.scale_paths(init_params(cfg.model, rng), [(matrices, scale)])
        state, frozen = first_state(cfg, params)
        if cfg.objective.kind == "distill":  # its place, until its own parameters are read
            frozen = {**frozen, TEACHER: init_params(teacher_config(cfg), rng)}
        return state, frozen

    return init


def first_state(cfg: JobConfig, params: Params) -> tuple[TrainState, Params]:
    """Return the state at step 0 of these parameters, and the frozen ones among them."""
    params, frozen = split_job_params(params, cfg)
    name, ema = cfg.optim.optimizer, cfg.optim.ema_decay > 0
    table = parameters(cfg.model)
    optimizer = optim.make_optimizer(name, table, make_hyper(cfg), 0.0, "", ema=ema)
    opt_state = optim.init_state(optimizer, params)
    state = TrainState(jnp.int32(0), params, opt_state, optim.init_recent())
    return state, quantize_base(cfg.model, frozen)


def make_train_step(
    loss_fn: Loss,
    optim_cfg: Optim,
    model_cfg: ModelConfig,
    accumulation_steps: int = 1,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """Return the pure train_step(state, batch, hyper, frozen) -> (state, metrics).

    An update is skipped if its loss or gradient is not finite, or if the gradient's norm exceeds
    `norm_limit`: the state keeps its numbers, and `skipped` counts such updates in a row. In an
    applied update, a number that would overflow keeps its value, so the state is always finite.
    """
    name, schedule, ema = optim_cfg.optimizer, optim_cfg.schedule, optim_cfg.ema_decay > 0
    decay_pattern, table = optim_cfg.decay_pattern, parameters(model_cfg)
    entries = optim.rate_multipliers(optim_cfg.rate_multipliers, name, model_cfg.width, table)

    def train_step(
        state: TrainState, batch: PyTree, hyper: Hyper, frozen: Params | None = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        rng = jax.random.fold_in(jax.random.key(hyper["seed"]), state.step)
        factors = hyper["rate_multipliers"]
        multipliers = [(pattern, f) for (pattern, _), f in zip(entries, factors, strict=False)]
        multipliers += entries[len(factors) :]  # muP's follow from the width
        point = optim.gradient_point(name, hyper, state.params, state.opt_state)
        loss, grads, weight, metrics = accumulate(
            loss_fn, point, frozen or {}, batch, hyper, rng, accumulation_steps
        )
        grads = optim.frozen_gradients(grads, multipliers)
        weight = jnp.maximum(weight, 1e-9)
        norm = optax.global_norm(grads) / weight
        scale = optim.clip_factor(norm, hyper["clip_norm"]) / weight
        grads = jax.tree.map(lambda grad: grad * scale, grads)
        rate = learning_rate(schedule, state.step, hyper)
        optimizer = optim.make_optimizer(name, table, hyper, rate, decay_pattern, multipliers, ema)
        weights, inner = optim.split_master(state.params, state.opt_state)
        updates, new_inner = optimizer.update(grads, inner, weights)
        new_weights = optax.apply_updates(weights, updates)
        limit = state.recent.norm_limit(hyper["spike_factor"])
        applied = jnp.isfinite(loss) & jnp.isfinite(norm) & (norm <= limit)

        # Number by number, within the update's own pass over the state: skipping the whole update
        # for one overflow took a second and a third pass (1.02x to 1.07x of a step on CPU).
        def keep_finite(new: jax.Array, old: jax.Array, stored: jax.Array) -> jax.Array:
            return jnp.where(applied & jnp.isfinite(new.astype(stored.dtype)), new, old)

        weights = jax.tree.map(keep_finite, new_weights, weights, state.params)
        inner = jax.tree.map(keep_finite, new_inner, inner, inner)
        params, opt_state = optim.join_master(weights, inner, state.params)
        recent = state.recent.remember(norm, applied)
        numbers = {"loss": loss / weight, "grad_norm": norm, "learning_rate": rate}
        numbers |= {"norm_limit": limit, "skipped": recent.skipped}
        scalars = {name: metric for name, metric in metrics.items() if not metric[0].ndim}
        numbers |= {name: total / jnp.maximum(w, 1e-9) for name, (total, w) in scalars.items()}
        return TrainState(state.step + 1, params, opt_state, recent), numbers

    return train_step


def accumulate(
    loss_fn: Loss,
    params: Params,
    frozen: Params,
    batch: PyTree,
    hyper: Hyper,
    rng: jax.Array,
    parts: int,
) -> tuple[jax.Array, PyTree, jax.Array, dict[str, Metric]]:
    """Return the sums over the batch of the loss, its gradient, its weight and the metrics.

    They are float32, summed over `parts` micro-batches. The gradient is that of `params`, the
    parameters that train; a micro-batch's has their dtype.
    """

    def summed(params: Params, batch: PyTree, rng: jax.Array) -> tuple[jax.Array, tuple]:
        total, weight, metrics = loss_fn(params, frozen, batch, hyper, rng)
        return total, (weight, metrics)

    value_and_grad = jax.value_and_grad(summed, has_aux=True)

    def sums(batch: PyTree, rng: jax.Array) -> tuple:
        (loss, (weight, metrics)), grads = value_and_grad(params, batch, rng)
        return loss, grads, weight, metrics

    if parts == 1:
        return optim.cast_float32(sums(batch, rng))

    def split(x: jax.Array) -> jax.Array:
        # Rows go to the micro-batches in turn, so that each device's rows stay on that device.
        micro = jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
        return sharding.constrain(micro, None, *("batch", "sequence")[: x.ndim])

    def add(total: tuple, part: tuple) -> tuple[tuple, None]:
        micro, index = part
        found = sums(micro, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, total, found), None

    micros = jax.tree.map(split, batch)
    shapes = jax.eval_shape(lambda: sums(jax.tree.map(lambda x: x[0], micros), rng))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    return jax.lax.scan(add, zero, (micros, jnp.arange(parts)))[0]


class Step(NamedTuple):
    """The jitted init and train_step of a config on a mesh, with shardings and abstract arrays."""

    shardings: TrainState
    abstract: TrainState
    frozen: Params  # abstract, too
    init: Callable[..., tuple[TrainState, Params]]
    train_step: Callable


def make_step(cfg: JobConfig, mesh: Mesh, loss_fn: Loss | None = None) -> Step:
    """Return the step on a mesh, whose devices may be absent. Raises ConfigError."""
    shape = cfg.train
    sharding.check_batch(
        "train.batch_size", shape.batch_size, shape.accumulation_steps, cfg.model.seq_len, mesh
    )
    if shape.ramp_batch_size:  # if the first batch can be divided, so can its doublings
        first = shape.ramp_batch_size, shape.accumulation_steps
        sharding.check_batch("train.ramp_batch_size", *first, cfg.model.seq_len, mesh)
    model = Transformer(cfg.model, frozen_layers=frozen_layers(cfg))
    table = parameters(model.cfg)
    check_offload(cfg.model.remat, mesh)
    if cfg.lora.rank:
        check_targets(model.cfg)
    check_trainable(trained_patterns(cfg), table)
    init = jax.jit(make_init(cfg))  # here, so that it is traced once for both its uses
    # The key is created while tracing, too: on an absent device none can be.
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    rows = with_int8_rows(table)
    shardings = tuple(sharding.tree_shardings(part, rows, mesh) for part in shapes)
    optim.check_pattern("optim.decay_pattern", cfg.optim.decay_pattern, table)
    for pattern, _ in map(parse_multiplier, cfg.optim.rate_multipliers):
        optim.check_pattern("optim.rate_multipliers", pattern, table)
    abstract, frozen = checkpoint.with_shardings(shapes, shardings)
    loss_fn = loss_fn or OBJECTIVES[cfg.objective.kind](model, cfg)
    init = jax.jit(init, out_shardings=shardings)
    train_step = jax.jit(
        make_train_step(loss_fn, cfg.optim, model.cfg, shape.accumulation_steps),
        donate_argnums=0,
        out_shardings=(shardings[0], NamedSharding(mesh, PartitionSpec())),
    )
    return Step(shardings[0], abstract, frozen, init, train_step)
