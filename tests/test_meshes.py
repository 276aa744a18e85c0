"""Any mesh trains the same model: losses to rounding, checkpoints exactly, constraints present."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojaxgpt import checkpoint, metrics, sharding
from nanojaxgpt.attention import attend
from nanojaxgpt.attention.request import Mask
from nanojaxgpt.data.loader import prepare_data, resolve
from nanojaxgpt.data.rows import Batch
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.objectives.language import make_loss
from nanojaxgpt.step import accumulate, make_hyper, make_init
from nanojaxgpt.training import fit, make_job, start_state

MESHES = {
    "one": dict(data=1, fsdp=1, tensor=1),
    "data=8": dict(data=8, fsdp=1, tensor=1),
    "fsdp=8": dict(data=1, fsdp=8, tensor=1),
    "2x2x2": dict(data=2, fsdp=2, tensor=2),
}
# float32 sums in another order: losses of about 3 nats differ in the seventh digit; Adam
# divides small gradients by their own size, so parameters drift a little more over the steps.
LOSS_BOUND = 2e-5


@pytest.fixture
def cfg(small_config):
    return small_config(**{
        "model.embed_dim": "32", "model.num_heads": "4", "model.vocab_size": "24",
        "model.unroll": "1",
        "train.num_steps": "6", "checkpoint.every_steps": "3", "eval.every_steps": "0",
    })  # fmt: skip


# Mesh sizes over 8 devices, and what else may not change a step: accumulation_steps, remat,
# unroll, loss_chunks. Each size of each axis and each option comes up; `-m exhaustive` tries all.
OPTIONS = [
    (1, "none", 1, 1), (2, "none", 0, 4), (1, "full", 1, 2), (2, "dots", 1, 1),
    (1, "save=q,k offload=layer_input,attention", 1, 2),
]  # fmt: skip
SIZES = [
    dict(slice=2, data=4), dict(fsdp=8), dict(tensor=8), dict(sequence=4, tensor=2),
    dict(data=2, fsdp=2, tensor=2), dict(slice=2, fsdp=2, sequence=2),
]  # fmt: skip
ALL_SIZES = [
    dict(zip(sharding.AXES, sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(sharding.AXES))
    if np.prod(sizes) == 8
]
STEP_BOUND = 2e-5  # of the largest number of each array


def one_step(build, sizes: dict, options: tuple, **changes: str) -> tuple[dict, set]:
    """Return loss, gradients and updated parameters of one step, and who holds the parameters.

    Its batch has packed documents, padding and weights; every second layer has a window.
    """
    parts, remat, unroll, chunks = map(str, options)
    cfg = build(**{
        "model.embed_dim": "32", "model.num_heads": "8", "model.vocab_size": "32",
        "model.windows": "(0, 5)", "model.positions": "rotary", "train.batch_size": "16",
        "train.accumulation_steps": parts, "model.remat": remat, "model.unroll": unroll,
        "train.loss_chunks": chunks, "optim.eps": "0.1", "optim.warmup_steps": "0", **changes,
    })  # fmt: skip
    draw, shape = np.random.default_rng(0), (16, 16)
    segments_BT = np.sort(draw.integers(0, 4, shape), axis=1)[:, ::-1].astype(np.int32)
    rows = Batch(
        draw.integers(0, 32, shape, np.int32), draw.integers(0, 32, shape, np.int32),
        (segments_BT > 0).astype(np.float32), segments_BT,
        np.tile(np.arange(16, dtype=np.int32), (16, 1)),
    )  # fmt: skip
    mesh = sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    data = prepare_data(cfg, lambda _: None)
    job = make_job(resolve(cfg, data), data, mesh)
    loss_fn, hyper = (
        make_loss(Transformer(job.cfg.model), int(chunks)),
        make_hyper(job.cfg),
    )

    def gradients(params, batch):
        key = jax.random.key(0)
        return accumulate(loss_fn, params, {}, batch, hyper, key, int(parts))[:2]

    with jax.set_mesh(mesh):
        batch = sharding.global_batch(
            lambda first, last: jax.tree.map(lambda x: x[first:last], rows), *shape, mesh
        )
        init = jax.jit(make_init(job.cfg), out_shardings=(job.shardings, {}))
        state, _ = init(jax.random.key(0))
        held = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.params)}
        loss, grads = jax.jit(gradients)(state.params, batch)
        state, _ = job.train_step(state, batch, hyper)
    found = {"loss": loss, "gradient": grads, "parameters": state.params}
    leaves = jax.tree_util.tree_flatten_with_path(found)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}, held


def far_off(found: dict, plain: dict) -> dict[str, float]:
    """Return the arrays that differ by more than STEP_BOUND, and by how much."""
    off = {
        name: float(np.max(np.abs(found[name] - value)) / np.max(np.abs(value)))
        for name, value in plain.items()
    }
    return {name: error for name, error in off.items() if not error <= STEP_BOUND}


def named(sizes: dict) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1)


@pytest.fixture(scope="module")
def plain_steps():
    """Return a dict that keeps the step of one device, made when it is first asked for."""
    return {}


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        pytest.param(sizes, OPTIONS[i % len(OPTIONS)], marks=[pytest.mark.slow] * (i != 4))
        for i, sizes in enumerate(SIZES)
    ]
    + [
        pytest.param(sizes, options, marks=pytest.mark.exhaustive)
        for sizes in ALL_SIZES
        for options in OPTIONS
    ],
    ids=lambda value: named(value) if isinstance(value, dict) else "-".join(map(str, value)),
)
def test_any_mesh_makes_the_plain_step(sizes, options, small_config, plain_steps):
    if not plain_steps:
        plain_steps["found"], held = one_step(small_config, {"data": 1}, OPTIONS[0])
        assert held == {1}
    plain = plain_steps["found"]
    found, held = one_step(small_config, sizes, options)
    assert held == {8}
    bad = far_off(found, plain)
    assert not bad, f"on {named(sizes)} with {options} these are off: {bad}"


@pytest.mark.slow
def test_layers_of_two_shapes_make_the_plain_step(small_config):
    shapes = {"model.mlp_dims": "(32, 64)", "model.num_layers": "5"}
    plain, _ = one_step(small_config, {"data": 1}, OPTIONS[0], **shapes)
    found, held = one_step(small_config, dict(fsdp=2, tensor=2), OPTIONS[0], **shapes)
    assert held == {4}
    assert "['parameters']['layers_1']['up_DF']" in plain
    assert not far_off(found, plain)


@pytest.fixture
def on_mesh(monkeypatch):
    """Return a function that makes every mesh from then on have this shape."""
    real = sharding.make_mesh

    def choose(name: str):
        shape = MESHES[name]
        count = int(np.prod(list(shape.values())))
        mesh = real(shape, jax.devices()[:count])
        monkeypatch.setattr(sharding, "make_mesh", lambda *_: mesh)
        return mesh

    return choose


@pytest.mark.parametrize(
    "meshes",
    [
        pytest.param(("one", "2x2x2"), marks=pytest.mark.slow),
        pytest.param(tuple(MESHES), marks=pytest.mark.exhaustive),
    ],
    ids=len,
)
def test_a_run_on_any_mesh_has_the_losses_of_one_device(meshes, cfg, on_mesh, tmp_path):
    losses = {}
    for name in meshes:
        on_mesh(name)
        state = fit(cfg, tmp_path / name, report=lambda _: None)
        records = metrics.read_metrics(tmp_path / name)
        losses[name] = [record["loss"] for record in records if "loss" in record]
        shards = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.params)}
        assert shards == {1 if name == "one" else 8}
    assert losses["one"][0] - losses["one"][-1] > 0.01  # it learns, so the steps are not no-ops
    for name, found in losses.items():
        np.testing.assert_allclose(found, losses["one"], atol=LOSS_BOUND, err_msg=name)


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_is_the_same_on_every_other(cfg, on_mesh, tmp_path):
    on_mesh("2x2x2")
    saved = fit(cfg, tmp_path / "run", report=lambda _: None)
    store = prepare_data(cfg, lambda _: None)
    for name in MESHES:
        mesh = on_mesh(name)
        job = make_job(resolve(cfg, store), store, mesh)
        with jax.set_mesh(mesh):
            state, _ = start_state(job, tmp_path / "run", lambda _: None)
        for a, b, s in zip(*map(jax.tree.leaves, (saved, state, job.shardings)), strict=True):
            np.testing.assert_array_equal(a, b)
            assert b.sharding.is_equivalent_to(s, b.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(sequence=2, tensor=2, data=2), dict(sequence=4, fsdp=2)])
@pytest.mark.parametrize("window", [0, 100])
def test_splash_with_its_queries_spread_is_the_formula(sizes, window):
    """Interpreted: four query heads share two of keys, rows hold two documents each."""
    mesh, draw = sharding.make_mesh(sizes), np.random.default_rng(0)
    q, k, v, d = (draw.standard_normal((2, 512, n, 32)).astype(np.float32) for n in (4, 2, 2, 4))
    order_1T = jnp.arange(512)[None]
    segments_BT = (order_1T > np.array([[100], [300]])).astype(jnp.int32)
    mask = Mask(order_1T, order_1T, segments_BT, segments_BT, window)

    @functools.partial(jax.jit, static_argnames="kernel")
    def gradients(q, k, v, kernel):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, mask, scale=0.2, kernel=kernel), q, k, v)
        return out, *pull(d)

    plain = gradients(q, k, v, "plain")
    with jax.set_mesh(mesh):
        spread = gradients(q, k, v, "splash")
    assert len(spread[0].sharding.device_set) == 8
    for a, b in zip(plain, spread, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_sharding_constraints_are_in_the_program(cfg, on_mesh):
    """In the body of the layers q, k, v, gathered k, v, up, two residuals; outside two more."""
    mesh = on_mesh("2x2x2")
    store = prepare_data(cfg, lambda _: None)
    job = make_job(resolve(cfg, store), store, mesh)

    def constraints() -> int:
        jax.clear_caches()  # a trace made under another mesh must not be found again
        fresh = make_job(resolve(cfg, store), store, mesh)
        lowered = fresh.train_step.__wrapped__.lower(
            job.abstract, job.train_batch(0), make_hyper(job.cfg)
        )
        text = lowered.as_text()
        return text.count("sdy.sharding_constraint") + text.count("custom_call @Sharding")

    with jax.set_mesh(mesh):
        inside = constraints()
    assert inside == 2 * (8 + 2)  # forward and backward
    assert constraints() == 0  # without the mesh they vanish: so the count can tell


def test_weights_are_divided_over_fsdp_and_tensor(cfg, on_mesh):
    mesh = on_mesh("2x2x2")
    store = prepare_data(cfg, lambda _: None)
    shardings = make_job(resolve(cfg, store), store, mesh).shardings
    layers = shardings.params["layers"]
    assert tuple(layers["q_DNH"].spec) == (None, "fsdp", "tensor", None)
    assert tuple(layers["down_DF"].spec) == (None, "fsdp", "tensor")
    assert shardings.opt_state[0].mu["layers"]["q_DNH"].spec == layers["q_DNH"].spec
    assert tuple(shardings.step.spec) == ()


def test_each_device_asks_for_its_own_rows_only():
    mesh, asked = sharding.make_mesh(dict(data=4, fsdp=2)), []

    def rows(first, last):
        asked.append((first, last))
        return np.arange(first, last)[:, None] * np.ones((1, 3))

    batch_BT = sharding.global_batch(rows, 16, 3, mesh)
    np.testing.assert_array_equal(np.asarray(batch_BT)[:, 0], np.arange(16))
    assert sorted(asked) == [(i, i + 2) for i in range(0, 16, 2)]


def test_what_does_not_fit_is_named():
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    with pytest.raises(ConfigError, match="needs 9 devices, not 8"):
        sharding.make_mesh(dict(data=3, fsdp=3))
    with pytest.raises(ConfigError, match=r"train.batch_size=6 .* the next that is: 8"):
        sharding.check_batch("train.batch_size", 6, 1, 16, mesh)
    with pytest.raises(KeyError):
        sharding.partition_spec(["embed", "no such axis"])
    with pytest.raises(ValueError, match="mesh axis twice"):
        sharding.partition_spec(["heads", "mlp"])


def test_a_vocabulary_that_does_not_divide_says_what_would(cfg, on_mesh):
    mesh = on_mesh("2x2x2")
    cfg = cfg.copy_and_resolve_references().unlock()
    cfg.model.vocab_size = 23
    store = prepare_data(cfg, lambda _: None)
    with pytest.raises(ConfigError, match=r"model.vocab_size=23 \(of params/embed_VD\) .* to 24"):
        make_job(resolve(cfg, store), store, mesh)


def test_fingerprints_don_t_depend_on_the_mesh():
    mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
    array = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    spec = sharding.partition_spec(["embed", "heads"])
    spread = jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))
    one = jax.device_put(array, jax.devices()[0])
    assert checkpoint.describe_leaves({"x": spread}) == checkpoint.describe_leaves({"x": one})
