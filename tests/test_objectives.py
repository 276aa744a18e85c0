"""Objectives: sums and weights that add up, examples that don't see each other, resuming."""

import functools
import json
import math

import jax
import numpy as np
import pytest
from conftest import small_model

from nanojaxgpt import metrics, sharding
from nanojaxgpt.checkpoint import Checkpoints, Keep
from nanojaxgpt.config import override_config, to_json
from nanojaxgpt.config.sections import Config
from nanojaxgpt.data.loader import RunData, resolve
from nanojaxgpt.data.rows import Batch, Rows, WeightedRows
from nanojaxgpt.data.tokenizers import ByteTokenizer
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.hosts.process import stop_signals
from nanojaxgpt.model.parameters import parameters
from nanojaxgpt.model.transformer import Transformer, init_params
from nanojaxgpt.objectives import distill
from nanojaxgpt.objectives.classify import macro_f1
from nanojaxgpt.objectives.distill import divergence
from nanojaxgpt.objectives.features import log_probabilities
from nanojaxgpt.objectives.preference import log_odds, pair_sums
from nanojaxgpt.step import OBJECTIVES, accumulate, make_hyper
from nanojaxgpt.sweep.plan import program_key
from nanojaxgpt.sweep.together import train_together
from nanojaxgpt.training import make_job, share_job, start_state, train_job

LENGTH, LABELS = 16, 3
PREFERENCES = ("dpo", "ipo", "orpo", "simpo")
# One of each kind is fast enough for every run of the tests.
CASES = [
    "classify",
    "reward",
    "dpo",
    "orpo",
    "distill",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("language", "ipo", "simpo")),
]
FIELDS = {
    "data.packing": "pack", "model.num_layers": "1", "model.embed_dim": "16",
    "model.num_heads": "2", "model.seq_len": str(LENGTH), "mesh.data": "1",
    "train.batch_size": "4", "train.log_every_steps": "1", "train.num_steps": "4",
    "eval.every_steps": "2", "checkpoint.every_steps": "2", "optim.warmup_steps": "0",
    "optim.learning_rate": "0.01",
}  # fmt: skip


def config(name: str, **changes: str) -> Config:
    """Return the config of a case, not resolved."""
    fields = {"objective.kind": name}
    if name in PREFERENCES:
        fields = {"objective.kind": "preference", "objective.loss": name}
    if name == "classify":
        fields["model.num_labels"] = str(LABELS)
    if name == "distill":
        fields["objective.teacher"] = "unread"
    return override_config(Config(), FIELDS | fields | changes)


def make_rows(name: str, count: int = 4, seed: int = 0, lengths: tuple = (4, 3, 3, 5)) -> Batch:
    """Return rows of packed examples with unequal masks, as the loader gives them."""
    draw, shape = np.random.default_rng(seed), (count, LENGTH)
    tokens, targets = (draw.integers(0, 31, shape, np.int32) for _ in range(2))
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    weights, documents = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)
    first = 0
    for number, length in enumerate(lengths, 1):
        place = slice(first, first + length)
        segments[:, place], positions[:, place] = number, np.arange(length)
        documents[:, place] = (np.arange(count) * len(lengths) + number - 1)[:, None]
        prompt = draw.integers(0, length - 1, count)
        weights[:, place] = np.arange(length) > prompt[:, None]
        if name == "classify":
            weights[:, place] = np.arange(length) == length - 1
            targets[:, first + length - 1] = tokens[:, first + length - 1] % LABELS
        first += length
    weights[-1] *= segments[-1] == 1 if name in ("language", "distill", "classify") else 1
    batch = Batch(tokens, targets, weights, segments, positions)
    if name in ("dpo", "ipo"):
        reference = draw.normal(-9, 1, (count, len(lengths) + 1)).astype(np.float32)
        found = np.take_along_axis(reference, segments, 1)
        return batch._replace(reference_BT=np.where(segments > 0, found, 0))
    return batch._replace(documents_BT=documents) if name == "documents" else batch


def make_params(model: Transformer) -> dict:
    """Return parameters of which none is 0."""
    draw = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(model.cfg, jax.random.key(0)))
    params = jax.tree.map(lambda x: draw.normal(0.05, 0.1, x.shape).astype(np.float32), shapes)
    return jax.device_put(params)


@functools.cache
def case(name: str, chunks: int = 1):
    """Return a jitted sums(params, batch, beta, parts), the parameters, and rows of the case."""
    labels = {"classify": LABELS, "reward": 1}.get(name, 0)
    cfg = config(name, **{"train.loss_chunks": str(chunks)})
    model = Transformer(small_model(num_layers=1, num_labels=labels))
    params, frozen = make_params(model), {}
    if name == "distill":
        teacher = Transformer(small_model(num_layers=1, vocab_size=40))
        frozen = {"teacher": make_params(teacher)}
        loss_fn = distill.make_loss(model, teacher, chunks)
    else:
        loss_fn = OBJECTIVES[cfg.objective.kind](model, cfg)
    numbers = {"label_smoothing": 0.1, "margin": 0.3, "centering": 0.2, "nll_weight": 0.5,
               "temperature": 1.5, "jsd_beta": 0.3}  # fmt: skip
    hyper = make_hyper(cfg) | {key: np.float32(value) for key, value in numbers.items()}

    @functools.partial(jax.jit, static_argnames="parts")
    def program(params, batch, beta, parts):
        key = jax.random.key(0)
        return accumulate(loss_fn, params, frozen, batch, hyper | {"beta": beta}, key, parts)

    def sums(params, batch, beta=0.1, parts=1):
        return program(params, batch, np.float32(beta), parts)

    sums.programs = program._cache_size

    return sums, params, make_rows(name)


def assert_close(left, right, bound: float = 2e-6) -> None:
    """Compare trees within `bound` of each array's largest number."""
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=bound, atol=bound * (1 + np.abs(a).max()))


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_of_unequal_weight_add_up(name):
    sums, params, batch = case(name)
    whole, parts = sums(params, batch), sums(params, batch, parts=4)
    assert_close(whole, parts)
    loss, grads, weight, _ = whole
    assert np.isfinite(loss)
    assert weight > 0
    assert any(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("name", CASES)
def test_a_batch_without_trained_tokens_adds_nothing(name):
    sums, params, batch = case(name)
    nothing = sums(params, batch._replace(weights_BT=np.zeros_like(batch.weights_BT)))
    for leaf in jax.tree.leaves(nothing):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize("name", CASES)
def test_what_is_masked_is_not_learned(name):
    sums, params, batch = case(name)
    other = np.where(batch.weights_BT > 0, batch.targets_BT, (batch.targets_BT + 7) % 31)
    same = sums(params, batch._replace(targets_BT=other))
    jax.tree.map(np.testing.assert_array_equal, sums(params, batch), same)
    if name not in ("reward", "distill"):  # they learn from no target
        changed = sums(params, batch._replace(targets_BT=(batch.targets_BT + 1) % 3))
        assert changed[0] != same[0]


@pytest.mark.parametrize("name", ["dpo", "orpo", "distill"])
def test_chunks_of_the_sequence_give_the_same(name):
    (whole, params, batch), (parts, *_) = case(name), case(name, 4)
    assert_close(whole(params, batch), parts(params, batch))


def test_beta_is_an_argument_of_the_program():
    sums, params, batch = case("dpo")
    sums(params, batch)
    programs = sums.programs()
    assert sums(params, batch)[0] != sums(params, batch, beta=0.5)[0]
    assert sums.programs() == programs
    keys = {program_key(config("dpo", **{"objective.beta": beta})) for beta in ("0.1", "0.5")}
    assert len(keys) == 1
    assert program_key(config("ipo")) not in keys


def answer_sums():
    """Return a jitted function of (params, batch) to the sums of each answer [B, P, 2]."""
    model, hyper = Transformer(small_model()), make_hyper(config("dpo"))

    @jax.jit
    def found(params, batch):
        log_BT = log_probabilities(model, params, batch, hyper, 1) * batch.weights_BT
        return pair_sums(log_BT, batch.segments_BT)

    return found, make_params(model)


def test_sums_of_answers_are_those_of_their_places():
    draw = np.random.default_rng(0)
    segments_BT = np.array([[1, 1, 2, 3, 3, 3, 4, 0], [1, 2, 3, 4, 5, 6, 7, 8], [0] * 8], np.int32)
    values_BT = draw.normal(size=(3, 8)).astype(np.float32)
    expected = [[np.sum(v[s == k]) for k in range(1, 9)]
                for v, s in zip(values_BT, segments_BT, strict=True)]  # fmt: skip
    np.testing.assert_allclose(
        pair_sums(values_BT, segments_BT), np.reshape(expected, (3, 4, 2)), rtol=1e-6
    )
    weights = draw.normal(size=(3, 4, 2)).astype(np.float32)
    grad = jax.grad(lambda v: np.sum(pair_sums(v, segments_BT) * weights))(values_BT)
    padded = np.pad(weights.reshape(3, 8), ((0, 0), (1, 0)))
    np.testing.assert_array_equal(grad, np.take_along_axis(padded, segments_BT, 1))


def test_pairs_of_a_row_do_not_see_each_other():
    found, params = answer_sums()
    batch = make_rows("documents")._replace(documents_BT=None)
    before = found(params, batch)
    first = batch.segments_BT <= 2
    moved = found(params, batch._replace(tokens_BT=(batch.tokens_BT + first) % 31))
    assert np.all(np.asarray(before)[:, 0] != np.asarray(moved)[:, 0])
    np.testing.assert_array_equal(before[:, 1:], moved[:, 1:])
    # Alone in its row, the second pair has the same log-probabilities.
    second = np.isin(batch.segments_BT, (3, 4))
    alone = jax.tree.map(lambda x: np.roll(np.where(second, x, 0), -7, 1), batch)
    alone = alone._replace(segments_BT=np.maximum(alone.segments_BT - 2, 0))
    np.testing.assert_allclose(found(params, alone)[:, 0], before[:, 1], rtol=1e-6)


@pytest.mark.parametrize("name", ["classify", "dpo"])
def test_a_mesh_gives_the_same(name):
    cfg = config(name)
    labels = LABELS if name == "classify" else 0
    model = Transformer(small_model(num_layers=1, num_labels=labels, vocab_size=32))
    loss_fn, key, batch = (
        OBJECTIVES[cfg.objective.kind](model, cfg),
        jax.random.key(0),
        make_rows(name),
    )
    params = make_params(model)

    def sums(params, batch):
        return accumulate(loss_fn, params, {}, batch, make_hyper(cfg), key, 1)

    alone = jax.jit(sums)(params, batch)
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    layout = sharding.tree_shardings(params, parameters(model.cfg), mesh)
    with jax.set_mesh(mesh):
        rows = jax.device_put(batch, sharding.batch_sharding(mesh))
        found = jax.jit(lambda *given: sums(*given))(jax.device_put(params, layout), rows)
    assert_close(jax.device_get(alone), jax.device_get(found), 2e-5)


def run_data(name: str) -> RunData:
    """Return data of 10 rows to train on and 3 to validate on."""
    kind = "documents" if name in ("dpo", "ipo") else name
    tables = [make_rows(kind, count, seed) for count, seed in ((10, 1), (3, 2))]
    train, validation = (
        Rows(len(table.tokens_BT), lambda index_B, _, table=table: jax.tree.map(
            lambda x: x[index_B.astype(int)], table)) for table in tables
    )  # fmt: skip
    source = (WeightedRows(name, 1, train),)
    return RunData(ByteTokenizer(), {"of": name}, "10", lambda _: source, lambda _: validation)


def train(name: str, run, **changes: str):
    """Train a case in `run`, or resume it; return the state and the lines it reports."""
    data, said = run_data(name), []
    cfg = resolve(config(name, **changes), data)
    job = make_job(cfg, data, sharding.make_mesh({}, jax.devices()[:1]))
    run.mkdir(parents=True, exist_ok=True)
    with stop_signals() as stop:
        return train_job(job, run, stop, said.append), said


def restart(run, name: str, last: str = "4", **changes: str):
    """Resume a run of a case from the checkpoint before its last one."""
    for folder in (run / "checkpoints").iterdir():
        if folder.name == last:
            folder.rename(run.parent / f"{len(list(run.parent.iterdir()))}")
    return train(name, run, **changes)


@pytest.mark.slow
def test_dpo_starts_at_ln_2_and_resumes_with_the_same_bits(tmp_path):
    run, dropout = tmp_path / "run", {"model.dropout": "0.1"}
    state, said = train("dpo", run, **dropout)
    assert "reference: the log-probabilities of 52 answers" in said
    first, *_ = metrics.read_metrics(run)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["margin"] == 0
    last = metrics.read_metrics(run)[-1]
    assert {"validation_loss", "validation_win_rate", "validation_margin"} <= last.keys()
    stored = (run / "reference.npz").read_bytes()
    again, said = restart(run, "dpo", **dropout)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert not [line for line in said if line.startswith("reference")]
    # Without the file, or with one that is damaged, it is computed again from the same start.
    (run / "reference.npz").write_bytes(stored[:100])
    again, said = restart(run, "dpo", **dropout)
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert "reference: the log-probabilities of 52 answers" in said
    assert (run / "reference.npz").read_bytes() == stored


@pytest.mark.slow
def test_classification_reports_its_metrics_and_resumes_with_the_same_bits(tmp_path):
    run = tmp_path / "run"
    state, _ = train("classify", run, **{"model.dropout": "0.1", "train.num_steps": "4"})
    last = metrics.read_metrics(run)[-1]
    counts = np.array(json.loads((run / "confusion.json").read_text()))
    assert counts.shape == (LABELS, LABELS)
    assert last["validation_accuracy"] == pytest.approx(np.trace(counts) / counts.sum())
    assert last["validation_macro_f1"] == pytest.approx(macro_f1(counts))
    again, _ = restart(run, "classify", **{"model.dropout": "0.1", "train.num_steps": "4"})
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_a_model_without_a_head_gets_a_new_one(tmp_path):
    mesh, data = sharding.make_mesh({}, jax.devices()[:1]), run_data("language")
    base = resolve(config("language"), data)
    job, run = make_job(base, data, mesh), tmp_path / "base"
    state, frozen = job.init(jax.random.key(5))
    run.mkdir()
    (run / "config.json").write_text(to_json(base))
    saved = Checkpoints(run / "checkpoints", Keep(1, 0, 0, dict))
    saved.save(1, state.items(base, frozen))
    saved.close()
    cfg = resolve(config("classify", **{"init.from_run": str(run)}), data)
    state, _ = start_state(make_job(cfg, data, mesh), tmp_path / "new", lambda _: None)
    assert state.params["label_CD"].shape == (LABELS, 16)
    assert np.std(state.params["label_CD"]) == pytest.approx(0.02, rel=0.3)
    before, _ = job.init(jax.random.key(5))
    np.testing.assert_array_equal(state.params["embed_VD"], before.params["embed_VD"])


@pytest.mark.slow
def test_a_student_comes_closer_to_its_teacher(tmp_path):
    train("language", tmp_path / "base", **{"model.num_layers": "2"})
    fields = {"objective.teacher": str(tmp_path / "base"), "train.num_steps": "30"}
    state, said = train("distill", tmp_path / "run", **fields)
    assert f"learning from {tmp_path / 'base'}" in said
    losses = [r["validation_loss"] for r in metrics.read_metrics(tmp_path / "run")
              if "validation_loss" in r]  # fmt: skip
    assert losses[-1] < 0.5 * losses[0]
    names = {path for path, *_ in (tmp_path / "run" / "checkpoints" / "30").walk()}
    assert not [path for path in names if "teacher" in str(path)]
    again, _ = restart(tmp_path / "run", "distill", "30", **fields)
    jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.slow
def test_a_sweep_of_beta_has_the_losses_of_its_trials_alone(tmp_path):
    data, mesh = run_data("dpo"), sharding.make_mesh({}, jax.devices()[:1])
    betas = {
        beta: resolve(config("dpo", **{"objective.beta": beta}), data) for beta in ("0.1", "2")
    }
    job = make_job(betas["0.1"], data, mesh)
    runs = [tmp_path / beta for beta in betas]
    for run in runs:
        run.mkdir()
    with stop_signals() as stop:
        train_together([share_job(job, cfg) for cfg in betas.values()], runs, stop)
    found = {}
    for beta, run in zip(betas, runs, strict=True):
        train("dpo", tmp_path / "alone" / beta, **{"objective.beta": beta})
        pair = [metrics.read_metrics(folder)[-1] for folder in (run, tmp_path / "alone" / beta)]
        found[beta] = pair[0]["validation_loss"]
        assert pair[1]["validation_loss"] == pytest.approx(found[beta], rel=1e-5)
    assert found["0.1"] != found["2"]


def test_divergences_are_those_of_their_definition():
    draw = np.random.default_rng(0)
    student, teacher = (jax.nn.log_softmax(draw.normal(size=7)) for _ in range(2))
    p, q = np.exp(teacher), np.exp(student)
    assert divergence(student, teacher, 0.0) == pytest.approx(np.sum(p * np.log(p / q)), rel=1e-5)
    assert divergence(student, teacher, 1.0) == pytest.approx(np.sum(q * np.log(q / p)), rel=1e-5)
    mixed = 0.7 * q + 0.3 * p
    expected = 0.3 * np.sum(p * np.log(p / mixed)) + 0.7 * np.sum(q * np.log(q / mixed))
    assert divergence(student, teacher, 0.3) == pytest.approx(expected, rel=1e-5)
    for beta in (0.0, 0.3, 1.0):
        assert np.isfinite(jax.grad(divergence)(student, teacher, beta)).all()


def test_log_odds_are_exact_at_both_ends():
    mean = np.array([-30.0, -3.0, -0.69, -0.5, -1e-4, 0.0], np.float32)
    wide = np.minimum(mean.astype(np.float64), -1e-6)
    np.testing.assert_allclose(log_odds(mean), wide - np.log(-np.expm1(wide)), rtol=1e-5)
    assert np.isfinite(jax.vmap(jax.grad(log_odds))(mean)).all()


def test_macro_f1_is_the_mean_over_labels():
    assert macro_f1(np.array([[3, 1], [2, 4]])) == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert macro_f1(np.array([[2, 0], [0, 0]])) == 0.5


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dpo", {"data.packing": "wrap"}, "objective.kind=preference needs whole examples"),
        ("ipo", {"objective.label_smoothing": "0.1"}, "no effect with ipo: it is read by dpo"),
        ("language", {"objective.beta": "0.2"}, "objective.beta=0.2 has no effect with language"),
        ("distill", {"objective.teacher": ""}, "needs a model to learn from"),
        ("orpo", {"train.z_loss": "0.1"}, "train.z_loss=0.1 has no effect with orpo"),
        ("reward", {"model.num_labels": "2"}, "a reward is one number"),
        ("dpo", {"objective.beta": "0"}, "objective.beta=0.0 must be at least 1e-30"),
    ],
)  # fmt: skip
def test_fields_that_contradict_each_other_are_refused(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(name, **changes)
