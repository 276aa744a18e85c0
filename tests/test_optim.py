"""Schedules at their corners, AdamW against its formula, decay and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojaxgpt.errors import ConfigError
from nanojaxgpt.optim import SCHEDULES, clip_factor, learning_rate, make_optimizer, path_mask

HYPER = dict(
    learning_rate=1.0, num_steps=100.0, warmup_steps=9.0, final_fraction=0.1, decay_fraction=0.2,
    beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1,
)  # fmt: skip
HYPER = {name: jnp.float32(value) for name, value in HYPER.items()}


def rates(schedule: str) -> np.ndarray:
    """Return the learning rate of steps 0 to 100."""
    return np.array(jax.vmap(lambda step: learning_rate(schedule, step, HYPER))(jnp.arange(101)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_linear_and_then_the_schedule_begins_at_the_top(schedule):
    np.testing.assert_allclose(rates(schedule)[:10], np.arange(1, 11) / 10, rtol=1e-6)


def test_schedules_end_where_they_say():
    assert rates("constant")[10:].tolist() == [1] * 91
    np.testing.assert_allclose(rates("cosine")[100], 0.1, rtol=1e-5)
    np.testing.assert_allclose(rates("linear")[[9, 100]], [1, 0.1], rtol=1e-5)
    np.testing.assert_allclose(rates("inverse_sqrt")[39], 0.5, rtol=1e-5)
    np.testing.assert_allclose(rates("wsd")[[50, 80, 90, 100]], [1, 1, 0.55, 0.1], rtol=1e-5)


def test_cosine_is_nanogpts():
    step, warmup, last = 40, 9, 100
    ratio = (step - warmup) / (last - warmup)
    expected = 0.1 + 0.5 * (1 + np.cos(np.pi * ratio)) * 0.9
    np.testing.assert_allclose(rates("cosine")[step], expected, rtol=1e-5)


def test_adamw_is_its_formula():
    params = {"w_DF": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    optimizer = make_optimizer("adamw", HYPER, 0.01, r"_[A-Z]{2,}$")
    state = optimizer.init(params)
    m = v = np.zeros(3)
    p = np.array([1.0, -2.0, 3.0])
    for step in range(1, 4):
        g = np.array([0.5, -0.1, 2.0]) * step
        grads = {"w_DF": jnp.array([g[:2]], jnp.float32), "bias": jnp.array(g[2:], jnp.float32)}
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        adam = (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        p = p - 0.01 * (adam + 0.1 * p * [1, 1, 0])
    got = np.concatenate([params["w_DF"][0], params["bias"]])
    np.testing.assert_allclose(got, p, rtol=1e-5)


def test_patterns_that_match_nothing_are_refused():
    tree = {"layers": {"q_DNH": 0, "q_bias": 0}}
    assert path_mask(tree, "q_D", "f") == {"layers": {"q_DNH": True, "q_bias": False}}
    assert path_mask(tree, "", "f") == {"layers": {"q_DNH": False, "q_bias": False}}
    with pytest.raises(ConfigError, match=r"optim.decay_pattern='gate' matches no parameter"):
        path_mask(tree, "gate", "optim.decay_pattern")


def test_clipping_shrinks_only_what_is_too_long():
    np.testing.assert_allclose(clip_factor(jnp.float32(4), jnp.float32(1)), 0.25, rtol=1e-5)
    assert clip_factor(jnp.float32(0.5), jnp.float32(1)) == 1
    assert clip_factor(jnp.float32(4), jnp.float32(0)) == 1
