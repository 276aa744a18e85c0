"""Any mesh trains the same model: losses to rounding, checkpoints exactly, constraints present."""

import jax
import numpy as np
import pytest

from nanojaxgpt import checkpoint, metrics, sharding
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.train import fit, make_hyper, make_job, prepare_data, resolve, start_state

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


@pytest.fixture
def on_mesh(monkeypatch):
    """Return a function that makes every mesh from then on have this shape."""
    real = sharding.make_mesh

    def choose(name: str):
        shape = MESHES[name]
        count = int(np.prod(list(shape.values())))
        mesh = real(**shape, devices=jax.devices()[:count])
        monkeypatch.setattr(sharding, "make_mesh", lambda **_: mesh)
        return mesh

    return choose


def test_every_mesh_gives_the_losses_of_one_device(cfg, on_mesh, tmp_path):
    losses = {}
    for name in MESHES:
        on_mesh(name)
        state = fit(cfg, tmp_path / name, report=lambda _: None)
        records = metrics.read_metrics(tmp_path / name)
        losses[name] = [record["loss"] for record in records if "loss" in record]
        shards = {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.params)}
        assert shards == {1 if name == "one" else 8}
    assert losses["one"][0] - losses["one"][-1] > 0.01  # it learns, so the steps are not no-ops
    for name, found in losses.items():
        np.testing.assert_allclose(found, losses["one"], atol=LOSS_BOUND, err_msg=name)


def test_a_checkpoint_of_one_mesh_is_the_same_on_every_other(cfg, on_mesh, tmp_path):
    on_mesh("2x2x2")
    saved = fit(cfg, tmp_path / "run", report=lambda _: None)
    store = prepare_data(cfg, lambda _: None)
    for name in MESHES:
        mesh = on_mesh(name)
        job = make_job(resolve(cfg, store), store, mesh)
        with jax.set_mesh(mesh):
            state = start_state(job, tmp_path / "run", lambda _: None)
        for a, b, s in zip(*map(jax.tree.leaves, (saved, state, job.shardings)), strict=True):
            np.testing.assert_array_equal(a, b)
            assert b.sharding.is_equivalent_to(s, b.ndim)


def test_sharding_constraints_are_in_the_program(cfg, on_mesh):
    """In the one body of the layers q, k, v, up, two residuals; outside embedding and logits."""
    mesh = on_mesh("2x2x2")
    store = prepare_data(cfg, lambda _: None)
    job = make_job(resolve(cfg, store), store, mesh)

    def constraints() -> int:
        jax.clear_caches()  # a trace made under another mesh must not be found again
        fresh = make_job(resolve(cfg, store), store, mesh)
        text = fresh.train_step.lower(job.abstract, job.train_batch(0), make_hyper(cfg)).as_text()
        return text.count("sdy.sharding_constraint") + text.count("custom_call @Sharding")

    with jax.set_mesh(mesh):
        inside = constraints()
    assert inside == 2 * (6 + 2)  # forward and backward
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
    mesh, asked = sharding.make_mesh(4, 2, 1), []

    def rows(first, last):
        asked.append((first, last))
        return np.arange(first, last)[:, None] * np.ones((1, 3))

    batch_BT = sharding.global_batch(rows, 16, 3, mesh)
    np.testing.assert_array_equal(np.asarray(batch_BT)[:, 0], np.arange(16))
    assert sorted(asked) == [(i, i + 2) for i in range(0, 16, 2)]


def test_what_does_not_fit_is_named():
    mesh = sharding.make_mesh(2, 2, 2)
    with pytest.raises(ConfigError, match="needs 9 devices, here are 8"):
        sharding.make_mesh(3, 3, 1)
    with pytest.raises(ConfigError, match=r"train.batch_size=6 .* the next that does is 8"):
        sharding.check_batch_size("train.batch_size", 6, 1, mesh)
    with pytest.raises(KeyError):
        sharding.partition_spec(["embed", "no such axis"])
    with pytest.raises(ValueError, match="mesh axis twice"):
        sharding.partition_spec(["heads", "mlp"])


def test_a_vocabulary_that_does_not_divide_says_what_would(cfg, on_mesh):
    mesh = on_mesh("2x2x2")
    cfg = cfg.copy_and_resolve_references().unlock()
    cfg.model.vocab_size = 23
    store = prepare_data(cfg, lambda _: None)
    with pytest.raises(ConfigError, match=r"params/embed_VD: a dimension of 23 .* to 24 here"):
        make_job(resolve(cfg, store), store, mesh)


def test_fingerprints_don_t_depend_on_the_mesh():
    mesh = sharding.make_mesh(2, 2, 2)
    array = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    spec = sharding.partition_spec(["embed", "heads"])
    spread = jax.device_put(array, jax.sharding.NamedSharding(mesh, spec))
    one = jax.device_put(array, jax.devices()[0])
    assert checkpoint.describe({"x": spread}) == checkpoint.describe({"x": one})
