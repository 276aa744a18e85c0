"""Schedules at their ends, AdamW against its formula, decay and clipping."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import small_model

from nanojaxgpt.config import base_config, typed
from nanojaxgpt.config.sections import rules
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.model.parameters import parameters
from nanojaxgpt.optim import (
    NORMS_NEEDED,
    OPTIMIZERS,
    check_pattern,
    clip_factor,
    frozen_gradients,
    gradient_point,
    init_recent,
    make_optimizer,
    path_mask,
    rate_multipliers,
)
from nanojaxgpt.schedules import SCHEDULES, learning_rate
from nanojaxgpt.step import make_hyper

TABLE = parameters(small_model())
HYPER = dict(
    learning_rate=1.0, num_steps=100.0, warmup_steps=9.0, final_fraction=0.1, decay_begin=80.0,
    beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, independent_decay=0.0, ema_decay=0.0,
)  # fmt: skip
HYPER = {name: jnp.float32(value) for name, value in HYPER.items()}


def rates(schedule: str) -> np.ndarray:
    """Return the learning rate of steps 0 to 100."""
    return np.array(jax.vmap(lambda step: learning_rate(schedule, step, HYPER))(jnp.arange(101)))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_linear_and_then_the_schedule_begins_at_the_top(schedule):
    np.testing.assert_allclose(rates(schedule)[:10], np.arange(1, 11) / 10, rtol=1e-6)


# At the last of 100 steps, after 9 of warm-up, down to a tenth: cosine and linear are one step of
# the 91 before their end.
LAST = {
    "cosine": 0.1 + 0.9 * (1 + np.cos(np.pi * 90 / 91)) / 2,
    "linear": 0.1 + 0.9 / 91,
    "constant": 1.0,
    "inverse_sqrt": np.sqrt(10 / 100),
    "wsd": 0.1,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_at_its_first_and_its_last_step(schedule):
    np.testing.assert_allclose(rates(schedule)[[0, 99]], [0.1, LAST[schedule]], rtol=1e-5)


def test_schedules_in_between():
    assert rates("constant")[10:].tolist() == [1] * 91
    np.testing.assert_allclose(rates("cosine")[100], 0.1, rtol=1e-5)
    np.testing.assert_allclose(rates("linear")[[9, 100]], [1, 0.1], rtol=1e-5)
    np.testing.assert_allclose(rates("inverse_sqrt")[39], 0.5, rtol=1e-5)
    np.testing.assert_allclose(rates("wsd")[[50, 79, 89, 99]], [1, 1, 0.55, 0.1], rtol=1e-5)
    assert rates("wsd")[10:80].tolist() == [1] * 70  # no bit less before its decay


@pytest.mark.parametrize(
    ("num_steps", "fraction", "expected"),
    [
        (10, 0.4, [1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
        (4, 1.0, [0.75, 0.5, 0.25, 0]),
        (3, 0.0, [1, 1, 1]),
        (1000, 0.3, [1] * 700 + [1 - step / 300 for step in range(1, 301)]),
    ],
)
def test_wsd_decays_over_whole_steps_to_the_last(num_steps, fraction, expected):
    cfg = base_config().unlock()
    cfg.train.num_steps, cfg.optim.decay_fraction = num_steps, fraction
    cfg.optim.learning_rate, cfg.optim.warmup_steps, cfg.optim.final_fraction = 1.0, 0, 0.0
    hyper = make_hyper(typed(cfg))
    found = [float(learning_rate("wsd", step, hyper)) for step in range(num_steps)]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    begin = num_steps - round(num_steps * fraction)
    assert found[:begin] == [1.0] * begin


def test_cosine_is_nanogpts():
    step, warmup, last = 40, 9, 100
    ratio = (step - warmup) / (last - warmup)
    expected = 0.1 + 0.5 * (1 + np.cos(np.pi * ratio)) * 0.9
    np.testing.assert_allclose(rates("cosine")[step], expected, rtol=1e-5)


def test_adamw_is_its_formula():
    params = {"w_DF": jnp.array([[1.0, -2.0]]), "bias": jnp.array([3.0])}
    optimizer = make_optimizer("adamw", TABLE, HYPER, 0.01, r"_[A-Z]{2,}$")
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
        optimizer = make_optimizer("adamw", TABLE, hyper, peak * factor, r"_[A-Z]{2,}$")
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return updates

    def factored(independent):
        """Return the updates of two matrices, one at a tenth of the rate, and one frozen."""
        hyper = HYPER | {"independent_decay": jnp.float32(independent)}
        tree = {name: jnp.array([[1.0, -2.0]]) for name in ("w_DF", "up_DF", "q_DF")}
        multipliers = [("w_", jnp.float32(0.1)), ("q_", jnp.float32(0))]
        optimizer = make_optimizer("adamw", TABLE, hyper, 0.5, "_DF", multipliers)
        zeros = jax.tree.map(jnp.zeros_like, tree)
        return optimizer.update(zeros, optimizer.init(tree), tree)[0]

    for independent, share in ((True, 1), (False, 0.1)):
        found = factored(independent)
        np.testing.assert_allclose(found["w_DF"], share * found["up_DF"], rtol=1e-6)
        assert np.all(found["up_DF"])
        assert not np.any(found["q_DF"])
    for peak in (1e-3, 0.5):
        found = decayed(True, peak)
        np.testing.assert_allclose(found["w_DF"], -0.25 * 0.1 * params["w_DF"], rtol=1e-6)
        assert not np.any(found["bias"])
        expected = -peak * 0.25 * 0.1 * params["w_DF"]
        np.testing.assert_allclose(decayed(False, peak)["w_DF"], expected, rtol=1e-6)


def test_patterns_that_match_nothing_are_refused():
    tree = {"layers": {"q_DNH": 0, "q_bias": 0}}
    assert path_mask(tree, "q_D") == {"layers": {"q_DNH": True, "q_bias": False}}
    assert path_mask(tree, "") == {"layers": {"q_DNH": False, "q_bias": False}}
    with pytest.raises(ConfigError, match=r"optim.decay_pattern='gate' matches no parameter"):
        check_pattern("optim.decay_pattern", "gate", TABLE)


def test_clipping_shrinks_only_what_is_too_long():
    np.testing.assert_allclose(clip_factor(jnp.float32(4), jnp.float32(1)), 0.25, rtol=1e-5)
    assert clip_factor(jnp.float32(0.5), jnp.float32(1)) == 1
    assert clip_factor(jnp.float32(4), jnp.float32(0)) == 1


def test_the_config_knows_every_name():
    assert rules()["optim.optimizer"].choices == tuple(OPTIMIZERS)
    assert rules()["optim.schedule"].choices == tuple(SCHEDULES)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_goes_downhill(name):
    target = jax.random.normal(jax.random.key(0), (2, 4, 6))
    params = {"layers": {"up_DF": jnp.zeros((2, 4, 6))}, "scale": jnp.zeros(3)}

    def loss(params):
        square = jnp.sum((params["layers"]["up_DF"] - target) ** 2)
        return square + jnp.sum((params["scale"] - 1) ** 2)

    optimizer = make_optimizer(name, TABLE, HYPER | {"weight_decay": jnp.float32(0)}, 0.02, "")
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
    muon = OPTIMIZERS["muon"](HYPER, TABLE)
    found, _ = jax.jit(muon.update)(grads, muon.init(params), params)
    matrices = {"q_DNH": (3, 8, 8), "o_NHD": (3, 8, 8), "up_DF": (3, 8, 16), "down_DF": (3, 8, 16)}
    for name, shape in matrices.items():
        sizes = np.linalg.svd(np.reshape(found["layers"][name], shape), compute_uv=False)
        sizes /= 0.2 * np.sqrt(max(shape[1:]))
        assert sizes.max() < 1.25  # five Newton-Schulz steps bring most near 1
        assert np.median(sizes) > 0.7
    adam = OPTIMIZERS["adamw"](HYPER, TABLE)
    rest = {"embed_VD": grads["embed_VD"], "q_bias": grads["layers"]["q_bias"]}
    expected, _ = adam.update(rest, adam.init(rest), rest)
    np.testing.assert_allclose(found["embed_VD"], expected["embed_VD"], rtol=1e-6)
    np.testing.assert_allclose(found["layers"]["q_bias"], expected["q_bias"], rtol=1e-6)


# Of Adafactor's test: each leaf's shape, and that of one matrix or vector in it.
LEAVES = {
    "layers/q_DNH": ((2, 6, 2, 4), (6, 8)),
    "layers/o_NHD": ((2, 2, 4, 6), (8, 6)),
    "layers/down_DF": ((2, 6, 16), (6, 16)),
    "layers/q_bias": ((2, 2, 4), (8,)),
    "embed_VD": ((9, 6), (9, 6)),
    "norm_scale": ((6,), (6,)),
}


def as_tree(leaves: dict) -> dict:
    """Return the tree of arrays by path."""
    tree: dict = {"layers": {}}
    for name, leaf in leaves.items():
        (tree["layers"] if "/" in name else tree)[name.split("/")[-1]] = jnp.float32(leaf)
    return tree


def adafactor_numpy(weights: list, steps: list, rate: float, decay: float) -> list:
    """Return arrays after Adafactor's steps, by its formulas in float64 (Shazeer 2018)."""
    weights, moments = [w.astype(np.float64) for w in weights], [0.0] * len(weights)
    for step, grads in enumerate(steps, 1):
        fade = 1 - step**-0.8
        for index, g in enumerate(np.float64(g) for g in grads):
            square = g**2 + 1e-30
            # The averages by row and column are those of the matrix of averages, as all is linear.
            moments[index] = v = fade * moments[index] + (1 - fade) * square
            if g.ndim == 2:
                v = v.mean(1, keepdims=True) * v.mean(0, keepdims=True) / v.mean()
            update = g / np.sqrt(v)
            update /= max(1, np.sqrt(np.mean(update**2)))
            weights[index] -= rate * (update + decay * weights[index])
    return weights


def adafactor_transformers(weights: list, steps: list, rate: float, decay: float) -> list:
    """Return arrays after the steps of transformers' Adafactor, which others wrote."""
    torch = pytest.importorskip("torch", reason="the oracle is transformers' Adafactor, in torch")
    found = pytest.importorskip("transformers.optimization", reason="transformers is the oracle")
    tensors = [torch.nn.Parameter(torch.tensor(w)) for w in weights]
    optimizer = found.Adafactor(
        tensors, lr=rate, weight_decay=decay,
        relative_step=False, scale_parameter=False, warmup_init=False,
    )  # fmt: skip
    for grads in steps:
        for tensor, grad in zip(tensors, grads, strict=True):
            tensor.grad = torch.tensor(grad)
        optimizer.step()
    return [tensor.detach().numpy() for tensor in tensors]


@pytest.mark.slow
@pytest.mark.parametrize("oracle", [adafactor_numpy, adafactor_transformers])
def test_adafactor_takes_each_layers_kernel_as_a_matrix(oracle):
    chance = np.random.default_rng(0)

    def draw(scale: float) -> dict:
        return {
            name: np.float32(scale * chance.normal(size=shape))
            for name, (shape, _) in LEAVES.items()
        }

    def matrices(leaves: dict) -> list:
        """Return the arrays apart, two of each leaf in layers."""
        return [
            part.reshape(LEAVES[name][1])
            for name, leaf in leaves.items()
            for part in (leaf if "/" in name else [leaf])
        ]

    first, steps = draw(1.0), [draw(scale) for scale in np.geomspace(0.01, 1, 20)]
    for name, leaf in steps[9].items():
        if "/" in name:
            leaf[1] *= 30  # a spike of one layer must not shrink the other's update
    params, state = as_tree(first), None
    for grads in steps:
        optimizer = make_optimizer("adafactor", TABLE, HYPER, 0.1, ".")
        state = state or optimizer.init(params)
        updates, state = optimizer.update(as_tree(grads), state, params)
        params = optax.apply_updates(params, updates)
    flat = params["layers"] | params
    found = {name: np.asarray(flat[name.split("/")[-1]]) for name in LEAVES}
    expected = oracle(matrices(first), [matrices(grads) for grads in steps], 0.1, 0.1)
    for ours, theirs, began in zip(matrices(found), expected, matrices(first), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        assert np.abs(theirs - began).max() > 0.1


def test_adafactors_state_is_a_row_and_a_column_for_each_matrix():
    params = as_tree({name: np.zeros(shape) for name, (shape, _) in LEAVES.items()})
    state = OPTIMIZERS["adafactor"](HYPER, TABLE).init(params)
    sizes = {name: np.prod(shape) for name, (shape, _) in LEAVES.items()}
    sizes |= {"layers/q_DNH": 2 * (6 + 8), "layers/o_NHD": 2 * (8 + 6)}
    sizes |= {"layers/down_DF": 2 * (6 + 16), "embed_VD": 9 + 6}
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 1 + sum(sizes.values())
    largest = as_tree({"layers/q_DNH": np.zeros((2, 160, 4, 40))})
    sizes = [
        leaf.size for leaf in jax.tree.leaves(OPTIMIZERS["adafactor"](HYPER, TABLE).init(largest))
    ]
    assert sorted(sizes) == [1, 2 * 160, 2 * 160]


def test_multipliers_scale_and_freeze_paths():
    params = {"embed_VD": jnp.ones(2), "layers": {"up_DF": jnp.ones(2), "q_DNH": jnp.ones(2)}}
    multipliers = rate_multipliers(("embed_=0", "q_DNH=0.5"), "adamw", 1, TABLE)

    def updates(multipliers):
        optimizer = make_optimizer("adamw", TABLE, HYPER, 0.1, "up_DF", multipliers)
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
            rate_multipliers(entries, "adamw", 1, TABLE)
    with pytest.raises(ConfigError, match=r"optim.rate_multipliers='gate' matches no parameter"):
        check_pattern("optim.rate_multipliers", "gate", TABLE)


def test_mup_divides_the_rate_of_hidden_kernels_alone():
    (pattern, factor), *rest = rate_multipliers((), "adamw", 4, TABLE)
    assert (factor, rest) == (0.25, [])
    assert rate_multipliers((), "muon", 4, TABLE)[0][1] == 0.5
    assert rate_multipliers((), "adamw", 1, TABLE) == []
    tree = {"layers": {"q_DNH": 0, "down_DF": 0, "up_bias": 0}, "embed_VD": 0, "head_VD": 0}
    mask = path_mask(tree, pattern)
    hidden = {"q_DNH": True, "down_DF": True, "up_bias": False}
    assert mask == {"layers": hidden, "embed_VD": False, "head_VD": False}


def noisy_steps(name, rates, ema=False, decay=0.0, **numbers):
    """Yield (average, point, fast) after each step on a noisy parabola, with its gradients."""
    hyper = HYPER | {key: jnp.float32(value) for key, value in numbers.items()}
    hyper |= {"weight_decay": jnp.float32(decay)}
    params = {"w_DF": jnp.array([[1.0, -2.0, 0.5]])}
    state = make_optimizer(name, TABLE, hyper, 0.0, "", ema=ema).init(params)
    for step, rate in enumerate(rates):
        optimizer = make_optimizer(name, TABLE, hyper, jnp.float32(rate), "w_DF", ema=ema)
        point = gradient_point(name, hyper, params, state)
        noise = jax.random.normal(jax.random.key(step), (1, 3))
        grads = jax.tree.map(lambda p, noise=noise: p + noise, point)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        yield params["w_DF"], gradient_point(name, hyper, params, state)["w_DF"], state, grads


def test_schedule_free_is_optaxs():
    """Optax keeps the point of the gradient and finds the average from it; here it is reversed."""
    rates, params = [0.01, 0.02, 0.03, 0.03, 0.03, 0.03], {"w_DF": jnp.array([[1.0, -2.0, 0.5]])}
    state = None
    for rate, (average, point, _, grads) in zip(
        rates, noisy_steps("schedule_free", rates, decay=0.1), strict=True
    ):
        theirs = optax.contrib.schedule_free(
            optax.chain(
                optax.scale_by_rms(0.95, 1e-8, eps_in_sqrt=False, bias_correction=True),
                optax.add_decayed_weights(0.1),
                optax.scale(-rate),
            ),
            rate,
            b1=0.9,
        )
        state = state or theirs.init(params)
        updates, state = theirs.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        expected = optax.contrib.schedule_free_eval_params(state, params)
        np.testing.assert_allclose(average, expected["w_DF"], atol=2e-6)
        np.testing.assert_allclose(point, params["w_DF"], atol=2e-6)
    assert np.abs(average - point).max() > 1e-3


def test_an_average_is_its_formula_and_leaves_the_steps_as_they_are():
    rates, weighted, total = [0.1] * 6, 0.0, 0.0
    both = zip(
        noisy_steps("adamw", rates),
        noisy_steps("adamw", rates, ema=True, ema_decay=0.75),
        strict=True,
    )
    for (plain, *_), (average, point, state, _) in both:
        np.testing.assert_array_equal(point, plain)
        np.testing.assert_array_equal(state.fast["w_DF"], plain)
        weighted, total = 0.75 * weighted + plain, 0.75 * total + 1
        np.testing.assert_allclose(average, weighted / total, rtol=1e-5)
    assert np.abs(average - plain).max() > 1e-3


@pytest.mark.parametrize(("name", "ema"), [("schedule_free", False), ("adamw", True)])
def test_what_is_frozen_stays_where_it_is_in_an_average(name, ema):
    params = {"w_DF": jnp.array([[0.1, -2.3]]), "up_DF": jnp.array([[0.7]])}
    state, start = None, params
    for _ in range(5):
        hyper = HYPER | {"ema_decay": jnp.float32(0.9)}
        optimizer = make_optimizer(name, TABLE, hyper, jnp.float32(0.1), "", [("w_", 0.0)], ema)
        state = state or optimizer.init(params)
        updates, state = optimizer.update(params, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["w_DF"], start["w_DF"])
    assert params["up_DF"] != start["up_DF"]


def test_a_spike_is_measured_by_the_norms_of_updates_that_were_made():
    recent, norms = init_recent(), np.random.default_rng(0).uniform(1, 2, 200).astype(np.float32)
    factor, weights = jnp.float32(3), 0.0
    for count, norm in enumerate(norms, 1):
        recent = recent.remember(jnp.float32(norm), jnp.bool(True))
        limit = float(recent.norm_limit(factor))
        assert (limit < np.inf) == (count > NORMS_NEEDED + 1), count
    weights = (1 - 1 / 128) ** np.arange(len(norms))[::-1]
    np.testing.assert_allclose(limit, 3 * np.average(norms, weights=weights), rtol=1e-5)
    for count in (1, 2):
        recent = recent.remember(jnp.float32(np.nan), jnp.bool(False))
        assert int(recent.skipped) == count
    assert float(recent.norm_limit(factor)) == limit
    assert float(recent.norm_limit(jnp.float32(0))) == np.inf
    assert int(recent.remember(jnp.float32(1), jnp.bool(True)).skipped) == 0
