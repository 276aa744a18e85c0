"""The train step: accumulation, weights, clipping, traced hyperparameters, and starting points."""

import gc
import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_tokens

from nanojaxgpt import metrics, sharding
from nanojaxgpt import training as train_module
from nanojaxgpt.__main__ import main
from nanojaxgpt.config import editable, override_config, with_fields
from nanojaxgpt.data.loader import prepare_data, resolve
from nanojaxgpt.data.rows import Batch
from nanojaxgpt.errors import CheckpointError, ConfigError, NonFiniteError
from nanojaxgpt.language_model import load
from nanojaxgpt.metrics import read_metrics
from nanojaxgpt.model.config import ModelConfig, complete
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.objectives.language import make_loss
from nanojaxgpt.optim import OPTIMIZERS
from nanojaxgpt.rundir import check_identity, saved_steps
from nanojaxgpt.step import make_hyper, make_init, make_train_step
from nanojaxgpt.training import fit, make_job, share_job  # fmt: skip

make_mesh = sharding.make_mesh


@pytest.fixture
def cfg(small_config):
    return complete(small_config(**{"model.vocab_size": "31", "mesh.data": "-1"}))


def batch(seed: int = 0, weights=None) -> Batch:
    """Return a batch of 8 rows with uneven weights."""
    tokens_BT = random_tokens(8, 17, seed=seed)
    weights_BT = np.random.default_rng(seed).integers(0, 3, (8, 16)).astype(np.float32)
    return Batch(tokens_BT[:, :-1], tokens_BT[:, 1:], weights_BT if weights is None else weights)


def step_of(cfg, accumulation_steps=1, chunks=1):
    """Return (state, jitted train_step)."""
    state, _ = jax.jit(make_init(cfg))(jax.random.key(0))
    loss = make_loss(Transformer(cfg.model), chunks)
    return state, jax.jit(make_train_step(loss, cfg.optim, cfg.model, accumulation_steps))


def assert_close(a, b, bound=1e-5):
    """Compare two trees."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, bound, bound), a, b)


@pytest.mark.slow
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
    names = ["learning_rate", "beta1", "clip_norm", "weight_decay", "z_loss", "warmup_steps"]
    for name in (*names, "embed_multiplier", "attention_multiplier", "logit_multiplier"):
        other, _ = step(state, batch(), hyper | {name: np.float32(hyper[name] * 0.5 + 0.01)})
        moved = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), base, other)
        assert max(map(float, jax.tree.leaves((moved.params, moved.opt_state)))) > 0, name
    assert step._cache_size() == 1


def test_factors_of_rates_are_numbers_of_the_step(cfg):
    cfg = with_fields(cfg, {"optim.rate_multipliers": ("embed_=0.5", "q_D=1")})
    state, step = step_of(cfg)
    hyper = make_hyper(cfg)
    assert hyper["rate_multipliers"] == (0.5, 1)
    half, _ = step(state, batch(), hyper)
    whole, _ = step(state, batch(), hyper | {"rate_multipliers": (np.float32(1), np.float32(0))})
    moved = [
        jax.tree.map(lambda a, b: a - b, after.params, state.params) for after in (half, whole)
    ]
    np.testing.assert_allclose(2 * moved[0]["embed_VD"], moved[1]["embed_VD"], atol=1e-6)
    assert np.any(moved[0]["layers"]["q_DNH"])
    assert not np.any(moved[1]["layers"]["q_DNH"])
    assert step._cache_size() == 1


def test_the_scale_of_the_start_is_of_the_matrices_alone(cfg):
    data = prepare_data(cfg, lambda _: None)
    job = make_job(resolve(cfg, data), data, sharding.make_mesh({}, jax.devices()[:1]))
    twice = with_fields(cfg, {"init.scale": 2.0})
    one, other = (
        share_job(job, resolve(c, data)).init(jax.random.key(0))[0].params for c in (cfg, twice)
    )
    for name, factor in (("embed_VD", 2), ("position_TD", 2), ("final_norm_scale", 1)):
        np.testing.assert_array_equal(other[name], factor * one[name])
    np.testing.assert_array_equal(other["layers"]["down_DF"], 2 * one["layers"]["down_DF"])


def test_an_update_that_is_not_finite_is_left_out(cfg):
    state, step = step_of(cfg)
    hyper = make_hyper(cfg)
    before, _ = step(state, batch(), hyper)
    poisoned = batch(seed=1)
    poisoned.weights_BT[0, 0] = np.nan
    kept, numbers = step(before, poisoned, hyper)
    assert (float(numbers["skipped"]), int(kept.step)) == (1.0, int(before.step) + 1)
    jax.tree.map(np.testing.assert_array_equal, kept[1:3], before[1:3])
    assert [int(state.recent.skipped) for state in (before, kept)] == [0, 1]
    # A finite loss and gradient whose step is too large for float32.
    huge = {"learning_rate": 3e38, "weight_decay": 1e3, "warmup_steps": 0}
    huge = {name: np.float32(value) for name, value in huge.items()}
    kept, numbers = step(before, batch(seed=1), hyper | huge)
    assert np.isfinite(numbers["grad_norm"])
    assert float(numbers["skipped"]) == 0.0
    leaves, old = (np.concatenate([x.ravel() for x in jax.tree.leaves(s.params)])
                   for s in (kept, before))  # fmt: skip
    assert np.isfinite(leaves).all()
    assert 0 < np.sum(leaves == old) < leaves.size
    _, numbers = step(kept, batch(seed=1), hyper)  # what is left can't be trained on
    assert float(numbers["skipped"]) == 1.0


def share_programs(cfg, monkeypatch, devices=1, sizes=None, loss_fn=None):
    """Return the job of `cfg`, whose programs every `fit` takes, so that they compile once."""
    data, mesh = prepare_data(cfg, lambda _: None), make_mesh(sizes or {}, jax.devices()[:devices])
    job = make_job(resolve(cfg, data), data, mesh, loss_fn)
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: mesh)
    monkeypatch.setattr(train_module, "make_job", lambda cfg, *_: share_job(job, cfg))
    return job


@pytest.mark.slow
@pytest.mark.parametrize("factor", [np.nan, 1e3])
def test_a_run_goes_on_over_as_many_bad_updates_as_it_may(
    factor, small_config, tmp_path, monkeypatch
):
    """The loss of the 22nd and the 23rd step is not a number, or a thousand times what it is."""
    cfg = small_config(**{
        "train.num_steps": "25", "optim.max_skipped_steps": "2", "optim.spike_factor": "3",
        "checkpoint.every_steps": "1", "checkpoint.keep_last": "9", "eval.every_steps": "0",
        "data.validation_fraction": "0",
    })  # fmt: skip
    resolved = resolve(cfg, prepare_data(cfg, lambda _: None))
    real = make_loss(Transformer(resolved.model), 1)
    seed = jax.random.key(cfg.train.seed)
    bad = [jax.random.key_data(jax.random.fold_in(seed, step)) for step in (21, 22)]

    def bad_twice(params, frozen, batch, hyper, rng):
        now = jnp.any(jnp.all(jax.random.key_data(rng) == jnp.stack(bad), axis=1))
        total, *rest = real(params, frozen, batch, hyper, rng)
        return total * jnp.where(now, factor, 1), *rest

    def train(run):
        return fit(cfg, tmp_path / run, report=lambda _: None)

    share_programs(cfg, monkeypatch, loss_fn=bad_twice)
    state = train("run")
    assert int(state.step) == 25
    logged = [record["step"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert logged == [*range(1, 22), 24, 25]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    forget(tmp_path / "run", 23)
    jax.tree.map(np.testing.assert_array_equal, train("run"), state)
    # The budget counts on where a run is stopped between the two.
    cfg = override_config(cfg, {"optim.max_skipped_steps": "1"})
    why = "its update is not finite" if np.isnan(factor) else "its gradient norm .* is over"
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=f"step 23: {why}.* bad updates in a row: 2"):
            train("other")
        forget(tmp_path / "other", 23)
        assert (tmp_path / "other" / "checkpoints" / "22").exists()


def forget(run, step):
    """Delete what was saved from this step on, as if the run had been killed before."""
    for saved in (run / "checkpoints").iterdir():
        if int(saved.name) >= step:
            shutil.rmtree(saved)


IDENTITIES = [b"[1]", b"{", b"{}", b'{"data": ', b"[" * 50_000, b"", None, b"\x80"]


@pytest.mark.slow
def test_damaged_notes_block_no_run(small_config, tmp_path, monkeypatch, capsys):
    short = {"train.num_steps": "4", "optim.warmup_steps": "1", "checkpoint.every_steps": "1"}
    cfg = small_config(**short)
    share_programs(cfg, monkeypatch)
    run, said = tmp_path / "run", []
    identity, records = run / "identity.json", run / "metrics.jsonl"
    fit(cfg, run, report=lambda _: None)
    wanted = [record["loss"] for record in read_metrics(run) if "loss" in record]
    for content in IDENTITIES:
        identity.unlink(missing_ok=True)
        if content is not None:
            identity.write_bytes(content)
        assert check_identity(run, {"another": "corpus"}, said.append) == {}
        what = "damaged" if content is not None else "missing"
        assert f"identity.json is {what}, so the corpus can't be compared" in said[-1]
    assert len(said) == len(IDENTITIES)
    forget(run, 4)
    records.write_bytes(b"7\n" + records.read_bytes().replace(b"{", b"\x80{", 1))
    fit(cfg, run, report=said.append)
    assert capsys.readouterr().out.count("lines of") == 1
    assert sum("identity.json" in line for line in said) == len(IDENTITIES) + 1
    assert json.loads(identity.read_text())["data"]
    found = [record["loss"] for record in read_metrics(run) if "loss" in record]
    assert found == wanted[1:]


@pytest.mark.slow
@pytest.mark.parametrize("every", [0, 2])
def test_pythons_collector_is_off_only_while_it_trains(every, small_config, tmp_path, monkeypatch):
    cfg = small_config(**{"train.num_steps": "6", "train.gc_every_steps": str(every)})
    job, found = share_programs(cfg, monkeypatch), []

    def train_step(state, *arguments):
        found.append(gc.isenabled())
        if len(found) == 5 + 6:
            raise NonFiniteError("in the second run")
        return job.train_step(state, *arguments)

    changed = job._replace(train_step=train_step)
    monkeypatch.setattr(train_module, "make_job", lambda cfg, *_: share_job(changed, cfg))
    fit(cfg, tmp_path / "run", report=lambda _: None)
    assert found == [True] + 5 * [not every]
    assert gc.isenabled()
    assert not gc.get_freeze_count()
    with pytest.raises(NonFiniteError, match="in the second run"):
        fit(cfg, tmp_path / "other", report=lambda _: None)
    assert found[6:] == [True] + 4 * [not every]
    assert gc.isenabled()
    assert not gc.get_freeze_count()


@pytest.mark.slow
@pytest.mark.parametrize("moved", [False, True])
def test_a_run_directory_deleted_while_it_trains(moved, small_config, tmp_path, monkeypatch):
    cfg = small_config(**{"train.num_steps": "12", "train.log_every_steps": "100"})
    job, run = share_programs(cfg, monkeypatch), tmp_path / "run"

    def train_step(state, *arguments):
        if int(state.step) == 7:
            while not saved_steps(run / "checkpoints"):
                time.sleep(0.01)
            run.rename(tmp_path / "moved") if moved else shutil.rmtree(run)
        return job.train_step(state, *arguments)

    changed = job._replace(train_step=train_step)
    monkeypatch.setattr(train_module, "make_job", lambda cfg, *_: share_job(changed, cfg))
    with pytest.raises(CheckpointError, match="was deleted or moved during training"):
        fit(cfg, run, report=lambda _: None)
    if moved:
        assert saved_steps(tmp_path / "moved" / "checkpoints") == [5]


@pytest.mark.slow
def test_the_model_is_parsed_once(cfg, tmp_path, monkeypatch):
    seen, complete_one = [], ModelConfig.__post_init__

    def counted(self):
        seen.append(self.head_dim)
        complete_one(self)

    monkeypatch.setattr(ModelConfig, "__post_init__", counted)
    short = {"train.num_steps": 1, "eval.every_steps": 0, "checkpoint.every_steps": 0}
    untyped = editable(with_fields(cfg, short))
    seen.clear()
    fit(untyped, tmp_path / "run", report=lambda _: None)
    assert seen == [0]
    written = json.loads((tmp_path / "run" / "config.json").read_text())["model"]
    assert (written["head_dim"], written["num_kv_heads"], written["mlp_dim"]) == (0, 0, 0)
    model = load(tmp_path / "run", report=lambda _: None)
    assert seen == [0, 0]
    assert (model.config.head_dim, model.config.mlp_dim) == (8, 64)


@pytest.mark.slow
def test_mup_at_its_base_width_is_the_standard_one(cfg):
    def after(**changes):
        changes = {f"model.{name}": value for name, value in changes.items()}
        changed = with_fields(cfg, {"model.attention_scale": 0.25} | changes)
        state, step = step_of(changed)
        return step(state, batch(), make_hyper(changed))

    standard = after()
    jax.tree.map(np.testing.assert_array_equal, standard, after(mup_base_dim=16))
    wider = after(mup_base_dim=8)
    assert float(wider[1]["loss"]) != float(standard[1]["loss"])


CASES = {name: {"optim.optimizer": name} for name in OPTIMIZERS}
CASES["sgd"] |= {"optim.learning_rate": "0.1"}
CASES["schedule_free"] |= {"optim.schedule": "constant"}
CASES["adamw, averaged"] = {"optim.ema_decay": "0.8"}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_optimizer_learns_resumes_bit_for_bit_and_shards(
    case, small_config, tmp_path, monkeypatch
):
    """On eight devices it makes the losses of one, and on one the bits of a run never stopped."""
    losses = {}
    for devices, sizes in ((8, dict(data=2, fsdp=2, tensor=2)), (1, {})):
        cfg = small_config(**{
            "model.vocab_size": "24", "model.num_layers": "1", "optim.learning_rate": "0.01",
            "optim.warmup_steps": "0", "train.num_steps": "8", "eval.every_steps": "0",
            "data.validation_fraction": "0", "checkpoint.every_steps": "4",
        } | CASES[case])  # fmt: skip
        job, run = share_programs(cfg, monkeypatch, devices, sizes), tmp_path / str(devices)
        state = fit(cfg, run, report=lambda _: None)
        losses[devices] = [record["loss"] for record in read_metrics(run) if "loss" in record]
        assert losses[devices][-1] < losses[devices][0] - 0.1
        for leaf, wanted in zip(*map(jax.tree.leaves, (state, job.shardings)), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        fast = getattr(state.opt_state, "fast", state.params)
        same = jax.tree.map(lambda z, p: z.sharding == p.sharding, fast, state.params)
        assert jax.tree.all(same)
    forget(run, 8)
    jax.tree.map(np.testing.assert_array_equal, fit(cfg, run, report=lambda _: None), state)
    np.testing.assert_allclose(losses[8], losses[1], atol=2e-4)


@pytest.mark.slow
def test_batches_grow_and_a_run_stopped_in_between_has_the_same_bits(
    small_config, tmp_path, monkeypatch, capsys
):
    cfg = small_config(**{
        "train.batch_size": "16", "train.ramp_batch_size": "4", "train.ramp_steps": "6",
        "train.num_steps": "9", "eval.every_steps": "0", "checkpoint.every_steps": "4",
    })  # fmt: skip
    job, lines = share_programs(cfg, monkeypatch), []
    sizes = [job.train_batch(step).tokens_BT.shape[0] for step in range(9)]
    assert sizes == [4, 4, 4, 8, 8, 8, 16, 16, 16]
    state = fit(cfg, tmp_path / "run", report=lines.append)
    assert job.train_step.__wrapped__._cache_size() == 3  # a program for each size
    assert "sequences in a batch: 4 from step 1, 8 from step 4, 16 from step 7" in lines
    said = capsys.readouterr().out
    assert "step 4: batches of 8 from here" in said
    assert "step 7: batches of 16 from here" in said
    records = read_metrics(tmp_path / "run")
    forget(tmp_path / "run", 5)
    jax.tree.map(np.testing.assert_array_equal, fit(cfg, tmp_path / "run", report=str), state)
    losses = [[r["loss"] for r in found if "loss" in r]
              for found in (records, read_metrics(tmp_path / "run"))]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_what_is_evaluated_saved_and_started_from_is_the_average(
    ema, small_config, tmp_path, monkeypatch, capsys
):
    options = {"train.num_steps": "6", "optim.learning_rate": "0.01"}
    cfg = small_config(**options, **{"optim.ema_decay": str(ema)})
    job = share_programs(cfg, monkeypatch)
    state = fit(cfg, tmp_path / "run", report=lambda _: None)
    assert (" of the average" in capsys.readouterr().out) == (ema > 0)
    found = metrics.validation_losses(tmp_path / "run")[6]
    assert found == job.evaluate(state.params)["loss"]
    if not ema:
        return
    assert found != job.evaluate(state.opt_state.fast)["loss"]
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == found
    more = {"init.from_run": str(tmp_path / "run"), "optim.learning_rate": "0"}
    second = fit(override_config(cfg, more), tmp_path / "second", report=lambda _: None)
    for params in (second.params, second.opt_state.fast):
        jax.tree.map(np.testing.assert_array_equal, params, state.params)


@pytest.mark.slow
def test_dropout_depends_on_seed_and_step_alone(cfg):
    cfg = with_fields(cfg, {"model.dropout": 0.5})
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
    small = with_fields(cfg, {"model.vocab_size": 3})
    with pytest.raises(ConfigError, match=r"model.vocab_size=3, but the tokenizer has"):
        resolve(small, store)


@pytest.mark.slow
def test_a_run_starts_from_another_runs_parameters(cfg, tmp_path):
    def quiet(config, run):
        return fit(config, tmp_path / run, report=lambda _: None)

    cfg = override_config(cfg, {"train.num_steps": "2"})
    first = quiet(cfg, "first")
    start = {"init.from_run": str(tmp_path / "first"), "optim.learning_rate": 0.0}
    other = with_fields(cfg, start | {"train.num_steps": 1})
    second = quiet(other, "second")
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    assert int(second.step) == 1
    with pytest.raises(ConfigError, match="nowhere"):
        quiet(with_fields(other, {"init.from_run": str(tmp_path / "nowhere")}), "third")
    shutil.rmtree(tmp_path / "first" / "checkpoints")
    with pytest.raises(CheckpointError, match="first has no checkpoint"):
        quiet(other, "third")
