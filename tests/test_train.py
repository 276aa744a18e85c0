"""The train step: accumulation, weights, clipping, traced hyperparameters, and starting points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens

from nanojaxgpt.data.rows import Batch
from nanojaxgpt.errors import CheckpointError, ConfigError
from nanojaxgpt.model import ModelConfig, Transformer
from nanojaxgpt.sharding import unbox
from nanojaxgpt.train import (
    fit,
    make_hyper,
    make_init,
    make_loss,
    make_train_step,
    prepare_data,
    resolve,
)  # fmt: skip


@pytest.fixture
def cfg(small_config):
    return small_config(**{"model.vocab_size": "31", "mesh.data": "-1"})


def batch(seed: int = 0, weights=None) -> Batch:
    """Return a batch of 8 rows with uneven weights."""
    tokens_BT = random_tokens(8, 17, seed=seed)
    weights_BT = np.random.default_rng(seed).integers(0, 3, (8, 16)).astype(np.float32)
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], weights_BT if weights is None else weights)


def step_of(cfg, accumulation_steps=1, chunks=1):
    """Return (state, jitted train_step)."""
    state = jax.jit(lambda rng: unbox(make_init(cfg)(rng)))(jax.random.key(0))
    loss = make_loss(Transformer(ModelConfig(**cfg.model)), chunks)
    return state, jax.jit(make_train_step(loss, cfg.optim, accumulation_steps))


def assert_close(a, b, bound=1e-5):
    """Compare two trees."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, bound, bound), a, b)


def test_accumulation_and_chunks_are_one_big_batch(cfg):
    hyper = make_hyper(cfg)
    state, plain = step_of(cfg)
    after, numbers = plain(state, batch(), hyper)
    assert max(map(float, jax.tree.leaves(
        jax.tree.map(lambda a, b: jnp.abs(a - b).max(), state.params, after.params)
    ))) > 1e-5  # fmt: skip
    for options in (dict(accumulation_steps=4), dict(chunks=4)):
        _, other = step_of(cfg, **options)
        assert_close(other(state, batch(), hyper), (after, numbers))


def test_loss_is_the_weighted_mean_and_starts_at_log_vocabulary(cfg):
    state, step = step_of(cfg)
    even = batch(weights=np.ones((8, 16), np.float32))
    _, numbers = step(state, even, make_hyper(cfg))
    np.testing.assert_allclose(numbers["loss"], np.log(31), atol=0.1)
    first = np.zeros((8, 16), np.float32)
    first[0] = 1
    _, one = step(state, batch(weights=first), make_hyper(cfg))
    _, ten = step(state, batch(weights=10 * first), make_hyper(cfg))
    np.testing.assert_allclose(one["loss"], ten["loss"], rtol=1e-6)
    np.testing.assert_allclose(one["grad_norm"], ten["grad_norm"], rtol=1e-5)


def test_other_numbers_do_not_recompile_and_do_act(cfg):
    state, step = step_of(cfg)
    hyper = make_hyper(cfg)
    base, _ = step(state, batch(), hyper)
    for name in ("learning_rate", "beta1", "clip_norm", "weight_decay", "z_loss", "warmup_steps"):
        other, _ = step(state, batch(), hyper | {name: np.float32(hyper[name] * 0.5 + 0.01)})
        moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), base, other)
        assert max(map(float, jax.tree.leaves((moved.params, moved.opt_state)))) > 0, name
    assert step._cache_size() == 1


def test_dropout_depends_on_seed_and_step_alone(cfg):
    cfg = cfg.copy_and_resolve_references().unlock()
    cfg.model.dropout = 0.5
    state, step = step_of(cfg)
    hyper = make_hyper(cfg)
    losses = [
        float(step(state._replace(step=jnp.int32(at)), batch(), hyper | {"seed": np.uint32(seed)})[
            1]["loss"]) for at, seed in ((3, 0), (3, 0), (4, 0), (3, 1))
    ]  # fmt: skip
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(cfg):
    store = prepare_data(cfg, lambda _: None)
    small = cfg.copy_and_resolve_references().unlock()
    small.model.vocab_size = 3
    with pytest.raises(ConfigError, match=r"model.vocab_size=3, but the tokenizer has"):
        resolve(small, store)


def test_a_run_starts_from_another_runs_parameters(cfg, tmp_path):
    def quiet(config, run):
        return fit(config, tmp_path / run, report=lambda _: None)

    first = quiet(cfg, "first")
    other = cfg.copy_and_resolve_references().unlock()
    other.init.from_run = str(tmp_path / "first")
    other.optim.learning_rate = 0.0
    other.train.num_steps = 1
    second = quiet(other, "second")
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert int(second.step) == 1
    other.init.from_run = str(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nowhere has no checkpoint"):
        quiet(other, "third")
