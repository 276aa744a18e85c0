"""What is stored in bfloat16 loses nothing that accumulates, and a step keeps every dtype."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojaxgpt import sharding
from nanojaxgpt import training as train_module
from nanojaxgpt.config import base_config, override_config
from nanojaxgpt.data.loader import prepare_data, resolve
from nanojaxgpt.data.rows import Batch
from nanojaxgpt.model.config import complete
from nanojaxgpt.optim import OPTIMIZERS
from nanojaxgpt.step import accumulate, first_state, make_hyper, make_step, make_train_step
from nanojaxgpt.training import fit, make_job

make_mesh = sharding.make_mesh
CASES = [(name, 0.0) for name in OPTIMIZERS]
CASES += [(name, 0.9) for name in OPTIMIZERS if name != "schedule_free"]


def one_device_mesh(*_):
    return make_mesh({}, jax.devices()[:1])


def rows(dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((8, 16), dtype)


def config(name: str, ema: float, dtype: str):
    """Return the config of a model of one layer, 16 wide."""
    return override_config(base_config(), {
        "model.num_layers": "1", "model.embed_dim": "16", "model.num_heads": "2",
        "model.seq_len": "16", "model.vocab_size": "31", "model.param_dtype": dtype,
        "train.batch_size": "8", "train.accumulation_steps": "2", "optim.optimizer": name,
        "optim.ema_decay": str(ema), "optim.schedule": "constant",
    })  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "ema"), CASES)
def test_a_step_keeps_the_structure_shapes_and_dtypes_of_the_state(name, ema, dtype):
    cfg = complete(config(name, ema, dtype))
    step = make_step(cfg, one_device_mesh())
    batch = Batch(rows(jnp.int32), rows(jnp.int32), rows())
    after, _ = jax.eval_shape(step.train_step, step.abstract, batch, make_hyper(cfg))
    plain = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (step.abstract, after))
    assert plain[0] == plain[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(after.params)} == {jnp.dtype(dtype)}
    kinds = {leaf.dtype for leaf in jax.tree.leaves(after.opt_state)}
    assert kinds <= {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{"optim.ema_decay": "0.9"}, {"optim.optimizer": "muon", "train.accumulation_steps": "2"}],
    ids=["adamw, averaged", "muon"],
)
def test_a_run_in_bfloat16_that_was_stopped_has_the_same_bits(
    options, small_config, tmp_path, monkeypatch
):
    monkeypatch.setattr(sharding, "make_mesh", one_device_mesh)
    cfg = small_config(**{
        "model.param_dtype": "bfloat16", "model.num_layers": "1", "train.num_steps": "6",
        "checkpoint.every_steps": "3", "eval.every_steps": "0", "data.validation_fraction": "0",
    } | options)  # fmt: skip
    job = make_job(resolve(cfg, data := prepare_data(cfg, str)), data, one_device_mesh())
    monkeypatch.setattr(train_module, "make_job", lambda *_: job)  # compiled once
    state = fit(cfg, tmp_path / "run", report=lambda _: None)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    again = fit(cfg, tmp_path / "run", report=lambda _: None)
    assert [leaf.tobytes() for leaf in map(np.asarray, jax.tree.leaves(again))] == [
        leaf.tobytes() for leaf in map(np.asarray, jax.tree.leaves(state))
    ]


def follow(pulls: np.ndarray, **optim: str) -> np.ndarray:
    """Return the parameter, 1.0 in bfloat16 at first, that SGD moves by -1 x these gradients."""
    base = {"optim.optimizer": "sgd", "optim.beta1": "0", "optim.learning_rate": "1",
            "optim.weight_decay": "0", "optim.clip_norm": "0", "optim.schedule": "constant",
            "optim.warmup_steps": "0", "optim.decay_pattern": "",
            "model.vocab_size": "257"}  # fmt: skip
    cfg = complete(override_config(base_config(), base | optim))

    def loss(params, frozen, batch, hyper, rng):
        pull = batch.tokens_BT[0, 0] * params["w"].astype(jnp.float32)[0]
        return pull, jnp.sum(batch.weights_BT), {}

    step = make_train_step(loss, cfg.optim, cfg.model)
    hyper = make_hyper(cfg)
    state, _ = first_state(cfg, {"w": jnp.ones(1, jnp.bfloat16)})

    def body(state, size):
        one = jnp.ones((1, 1))
        return step(state, Batch(size * one, one, one), hyper)[0], None

    last, _ = jax.jit(lambda s, p: jax.lax.scan(body, s, p))(state, jnp.float32(pulls))
    assert last.params["w"].dtype == jnp.bfloat16
    return np.float32(last.params["w"][0])


def test_an_average_of_bfloat16_weights_follows_them():
    """0.999 of the past: 1.0 for 1,500 steps and 2.0 for 3,000 make 2 - 0.04."""
    pulls = np.zeros(4500)
    pulls[1500] = -1
    fades = 0.999 ** np.arange(4500)[::-1]
    expected = np.average(np.where(np.arange(4500) < 1500, 1, 2), weights=fades)
    assert round(expected, 2) == 1.96
    assert abs(follow(pulls, **{"optim.ema_decay": "0.999"}) - expected) < 2**-8


def test_bfloat16_weights_take_steps_below_their_precision():
    """A thousand steps of 1e-4 from 1.0, where bfloat16's next number is 1.0078."""
    assert abs(follow(np.full(1000, -1e-4)) - 1.1) < 2**-8


@pytest.mark.parametrize("parts", [1, 4, 16, 64])
def test_gradients_of_bfloat16_weights_are_rounded_once_however_many_micro_batches(parts):
    """A rounding to bfloat16 errs by 0.16 % (root mean square)."""
    x_BF = np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32)

    def loss(params, frozen, batch, hyper, rng):
        return jnp.sum(batch @ params["w"].astype(jnp.float32)), jnp.float32(len(batch)), {}

    params = {"w": jnp.zeros(4096, jnp.bfloat16)}
    batch, key = jnp.asarray(x_BF), jax.random.key(0)
    _, grads, weight, _ = accumulate(loss, params, {}, batch, {}, key, parts)
    assert weight == 64
    expected = x_BF.astype(np.float64).sum(0)
    error = np.linalg.norm(np.float64(grads["w"]) - expected) / np.linalg.norm(expected)
    assert 0.0014 < error < 0.0018
