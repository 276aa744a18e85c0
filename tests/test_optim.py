"""Schedules at their corners, AdamW against its formula, decay and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojaxgpt.errors import ConfigError
from nanojaxgpt.optim import (
    OPTIMIZERS,
    SCHEDULES,
    clip_factor,
    frozen_gradients,
    learning_rate,
    make_optimizer,
    path_mask,
    rate_multipliers,
)

HYPER = dict(
    learning_rate=1.0, num_steps=100.0, warmup_steps=9.0, final_fraction=0.1, decay_fraction=0.2,
    beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, independent_decay=0.0,
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


def test_independent_decay_follows_the_schedule_and_not_the_rate():
    params = {"w_DF": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    grads = jax.tree.map(jnp.zeros_like, params)

    def decayed(independent, peak, factor=0.25):
        numbers = {"independent_decay": independent, "learning_rate": peak}
        hyper = HYPER | {name: jnp.float32(value) for name, value in numbers.items()}
        optimizer = make_optimizer("adamw", hyper, peak * factor, r"_[A-Z]{2,}$")
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return updates

    for peak in (1e-3, 0.5):
        found = decayed(True, peak)
        np.testing.assert_allclose(found["w_DF"], -0.25 * 0.1 * params["w_DF"], rtol=1e-6)
        assert not np.any(found["bias"])
        expected = -peak * 0.25 * 0.1 * params["w_DF"]
        np.testing.assert_allclose(decayed(False, peak)["w_DF"], expected, rtol=1e-6)


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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_downhill(name):
    target = jax.random.normal(jax.random.key(0), (2, 4, 6))
    params = {"layers": {"up_DF": jnp.zeros((2, 4, 6))}, "scale": jnp.zeros(3)}

    def loss(params):
        square = jnp.sum((params["layers"]["up_DF"] - target) ** 2)
        return square + jnp.sum((params["scale"] - 1) ** 2)

    optimizer = make_optimizer(name, HYPER | {"weight_decay": jnp.float32(0)}, 0.02, "")
    state = optimizer.init(params)
    update = jax.jit(lambda state, params: optimizer.update(jax.grad(loss)(params), state, params))
    for _ in range(60):
        updates, state = update(state, params)
        params = jax.tree.map(jnp.add, params, updates)
    assert loss(params) < 0.7 * loss(jax.tree.map(jnp.zeros_like, params))


def test_muon_turns_each_layers_kernel_into_an_orthogonal_matrix_and_leaves_the_rest_to_adam():
    shapes = dict(q_DNH=(3, 8, 2, 4), o_NHD=(3, 2, 4, 8), up_DF=(3, 8, 16), down_DF=(3, 8, 16))
    params = {"layers": {k: jnp.zeros(v) for k, v in shapes.items()}, "embed_VD": jnp.zeros((9, 8))}
    params["layers"]["q_bias"] = jnp.zeros((3, 2, 4))
    keys = iter(jax.random.split(jax.random.key(0), 9))
    grads = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
    muon = OPTIMIZERS["muon"](HYPER)
    found, _ = jax.jit(muon.update)(grads, muon.init(params), params)
    matrices = {"q_DNH": (3, 8, 8), "o_NHD": (3, 8, 8), "up_DF": (3, 8, 16), "down_DF": (3, 8, 16)}
    for name, shape in matrices.items():
        sizes = np.linalg.svd(np.reshape(found["layers"][name], shape), compute_uv=False)
        sizes /= 0.2 * np.sqrt(max(shape[1:]))
        assert sizes.max() < 1.25  # five Newton-Schulz steps bring most near 1
        assert np.median(sizes) > 0.7
    adam = OPTIMIZERS["adamw"](HYPER)
    rest = {"embed_VD": grads["embed_VD"], "q_bias": grads["layers"]["q_bias"]}
    expected, _ = adam.update(rest, adam.init(rest), rest)
    np.testing.assert_allclose(found["embed_VD"], expected["embed_VD"], rtol=1e-6)
    np.testing.assert_allclose(found["layers"]["q_bias"], expected["q_bias"], rtol=1e-6)


def test_multipliers_scale_and_freeze_paths():
    params = {"embed_VD": jnp.ones(2), "layers": {"up_DF": jnp.ones(2), "q_DNH": jnp.ones(2)}}
    multipliers = rate_multipliers(("embed_=0", "q_DNH=0.5"), "adamw", 1)

    def updates(multipliers):
        optimizer = make_optimizer("adamw", HYPER, 0.1, "up_DF", multipliers)
        return optimizer.update(params, optimizer.init(params), params)[0]

    plain, found = updates([]), updates(multipliers)
    assert not np.any(found["embed_VD"])
    np.testing.assert_array_equal(found["layers"]["up_DF"], plain["layers"]["up_DF"])
    np.testing.assert_allclose(found["layers"]["q_DNH"], 0.5 * plain["layers"]["q_DNH"])
    clean = frozen_gradients(params, multipliers)
    assert not np.any(clean["embed_VD"])
    np.testing.assert_array_equal(clean["layers"]["q_DNH"], 1)
    for entries in (("embed",), ("embed=x",)):
        with pytest.raises(ConfigError, match="is not PATTERN=FACTOR"):
            rate_multipliers(entries, "adamw", 1)
    with pytest.raises(ConfigError, match=r"optim.rate_multipliers='gate' matches no parameter"):
        updates(rate_multipliers(("gate=2",), "adamw", 1))


def test_mup_divides_the_rate_of_hidden_kernels_alone():
    (pattern, factor), *rest = rate_multipliers((), "adamw", 4)
    assert (factor, rest) == (0.25, [])
    assert rate_multipliers((), "muon", 4)[0][1] == 0.5
    assert rate_multipliers((), "adamw", 1) == []
    tree = {"layers": {"q_DNH": 0, "down_DF": 0, "up_bias": 0}, "embed_VD": 0, "head_VD": 0}
    mask = path_mask(tree, pattern, "f")
    hidden = {"q_DNH": True, "down_DF": True, "up_bias": False}
    assert mask == {"layers": hidden, "embed_VD": False, "head_VD": False}
