"""Frozen parameters: which they are, that they cost nothing but their place, that they stay."""

import json
import math

import jax
import numpy as np
import pytest
from conftest import small_model

from nanojaxgpt import checkpoint, memory, sharding
from nanojaxgpt.__main__ import main
from nanojaxgpt.config import override_config, to_json
from nanojaxgpt.data.loader import prepare_data, resolve
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.model.config import complete
from nanojaxgpt.model.parameters import parameters
from nanojaxgpt.step import make_hyper, make_step
from nanojaxgpt.trainable import check_trainable, is_trainable, merge_params, split_params
from nanojaxgpt.training import fit, make_job

TABLE = parameters(small_model(tied_head=False))
QUERIES = ("q_DNH", "norm")  # a tenth of the small model


@pytest.mark.parametrize(
    ("patterns", "trains"),
    [
        ((), set(TABLE)),
        (("layers/",), {path for path in TABLE if path.startswith("layers/")}),
        (("!embed", "."), set(TABLE) - {"embed_VD"}),
        (("!layers/q_", "layers/", "!."), {p for p in TABLE if "layers/" in p and "q_" not in p}),
        (("head_VD$",), {"head_VD"}),
    ],
)
def test_the_first_pattern_that_is_found_decides(patterns, trains):
    assert {path for path in TABLE if is_trainable(path, patterns)} == trains
    tree = {"layers": {p.split("/")[1]: p for p in TABLE if "/" in p}}
    tree |= {p: p for p in TABLE if "/" not in p}
    trainable, frozen = split_params(tree, patterns)
    assert set(jax.tree.leaves(trainable)) == trains
    assert set(jax.tree.leaves(frozen)) == set(TABLE) - trains
    assert merge_params(trainable, frozen) == tree


@pytest.mark.parametrize(
    ("patterns", "message"),
    [(("!embde", "."), "'!embde' matches no parameter; the paths: embed_VD"),
     (("!.",), "leaves no parameter to train")],
)  # fmt: skip
def test_patterns_that_do_nothing_are_refused(patterns, message):
    with pytest.raises(ConfigError, match=message):
        check_trainable(patterns, TABLE)


def test_a_broken_pattern_is_a_mistake_in_the_config(small_config):
    with pytest.raises(ConfigError, match=r"optim.trainable: '\(' is not a regular expression"):
        small_config(**{"optim.trainable": "('!(',)"})


@pytest.fixture
def cfg(small_config):
    fields = {"optim.trainable": repr(QUERIES), "train.num_steps": "6", "mesh.data": "-1"}
    fields |= {"model.tied_head": "false", "checkpoint.every_steps": "3", "eval.every_steps": "3"}
    return small_config(**fields)


@pytest.mark.slow
def test_what_is_frozen_stays_and_has_no_state(cfg, tmp_path):
    said: list[str] = []
    state = fit(cfg, tmp_path / "run", report=said.append)
    names = {checkpoint.path_name(path) for path, _ in jax.tree.leaves_with_path(state.params)}
    assert names == {p for p in TABLE if is_trainable(p, QUERIES)}
    assert any(line.startswith("layers/q_DNH") for line in said)
    # The table of the split adds up to the arrays.
    *_, state_bytes = next(line for line in said if line.startswith("all ")).split()
    held = jax.tree.leaves_with_path(state.opt_state)
    sizes = [leaf.nbytes for path, leaf in held if leaf.ndim]
    assert int(state_bytes.replace(",", "")) == sum(sizes)
    assert sum(sizes) == 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    # In the checkpoint are all parameters; the frozen ones are those of the first step.
    mesh = sharding.make_mesh({"data": -1})
    model_cfg = resolve(cfg, prepare_data(cfg, said.append)).model
    first, last = (
        checkpoint.load_params(tmp_path / "run", model_cfg, mesh, step, said.append)[1]
        for step in (3, 6)
    )
    for (path, before), after in zip(
        jax.tree.leaves_with_path(first), jax.tree.leaves(last), strict=True
    ):
        moved = np.any(np.asarray(before) != np.asarray(after))
        assert moved == is_trainable(checkpoint.path_name(path), QUERIES), path
    # A run that was stopped in between resumes with the same bits.
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        if folder.name == "6":
            folder.rename(tmp_path / "gone")
    again = fit(cfg, tmp_path / "run", report=said.append)
    jax.tree.map(np.testing.assert_array_equal, again, state)


def test_gradients_and_state_take_the_bytes_of_what_trains(cfg, tmp_path):
    wide = complete(override_config(cfg, {"model.vocab_size": "64"}))
    mesh = sharding.make_mesh({"fsdp": 2, "data": -1})
    with jax.set_mesh(mesh):
        step = make_step(wide, mesh)
        batch = memory.abstract_batch(wide, mesh)
        found = memory.state_memory(wide, step.abstract, step.frozen, batch, math.inf)
    share = memory.shard_bytes(step.abstract.params)
    assert share < 0.15 * found.parameters
    assert found.gradients == share
    assert found.parameters == share + memory.shard_bytes(step.frozen)
    # Two float32 moments of what trains, and three counters.
    assert found.optimizer == 2 * share + 8
    wrote = tmp_path / "config.json"
    wrote.write_text(to_json(wide))
    assert main(["rehearse", str(tmp_path), "--topology=cpu:8", "--config.mesh.fsdp=2",
                 f"--json={tmp_path}/found.json"]) == 0  # fmt: skip
    (printed,) = json.loads((tmp_path / "found.json").read_text())
    for name in ("parameters", "optimizer", "gradients"):
        assert printed["memory"][name] == getattr(found, name), name


LAYERS = {
    "one stack": {"model.num_layers": "4", "optim.trainable_layers": "2"},
    "a period of three": {"model.windows": "(0, 4, 4)", "model.num_layers": "5",
                          "optim.trainable_layers": "3"},
    "two stacks": {"model.mlp_dims": "(0, 24)", "model.num_layers": "4",
                   "optim.trainable_layers": "1"},
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [pytest.param(fields, id=name, marks=[pytest.mark.slow] * (name != "a period of three"))
     for name, fields in LAYERS.items()],
)  # fmt: skip
def test_only_the_last_layers_train(small_config, fields, tmp_path):
    fields = fields | {"optim.trainable": "('layers', 'final_norm')", "train.num_steps": "3"}
    fields |= {"mesh.data": "-1", "checkpoint.every_steps": "1", "checkpoint.keep_last": "9"}
    cfg = small_config(**fields)
    job, mesh = resolve(cfg, prepare_data(cfg, print)), sharding.make_mesh(cfg.mesh)
    step = make_step(job, mesh)
    # Trained rows, their gradients and their state are those of the last layers alone.
    for path, leaf in jax.tree.leaves_with_path(step.abstract.params):
        name = checkpoint.path_name(path)
        if name.startswith("layers"):
            places = [stack for stack, _ in job.model.places[-cfg.optim.trainable_layers :]]
            assert leaf.shape[0] == places.count(name.split("/")[0])
    fit(cfg, tmp_path / "run", report=lambda _: None)
    first, last = (
        checkpoint.load_params(tmp_path / "run", job.model, mesh, n, print)[1] for n in (1, 3)
    )
    for index, (stack, row) in enumerate(job.model.places):
        trains = index >= cfg.model.num_layers - cfg.optim.trainable_layers
        pairs = zip(first[stack].values(), last[stack].values(), strict=True)
        assert {np.array_equal(a[row], b[row]) for a, b in pairs} == {not trains}
    assert np.array_equal(first["embed_VD"], last["embed_VD"])
    # A run that was stopped in between resumes with the same bits.
    (tmp_path / "run" / "checkpoints" / "3").rename(tmp_path / "gone")
    fit(cfg, tmp_path / "run", report=lambda _: None)
    _, again = checkpoint.load_params(tmp_path / "run", job.model, mesh, 3, print)
    jax.tree.map(np.testing.assert_array_equal, again, last)


@pytest.mark.slow
def test_the_last_layers_train_as_they_do_where_all_train(small_config):
    """The gradients of their rows are those of the whole stack, and so they are on a mesh."""
    found = []
    for layers, mesh in (("0", {"data": "-1"}), ("2", {"data": "2", "fsdp": "2", "tensor": "2"})):
        cfg = small_config(**{"model.num_layers": "4", "model.vocab_size": "16",
                              "optim.trainable_layers": layers,
                              "optim.trainable": "('layers',)", "optim.clip_norm": "0",
                              **{f"mesh.{axis}": size for axis, size in mesh.items()}})  # fmt: skip
        data = prepare_data(cfg, print)
        job = make_job(resolve(cfg, data), data, sharding.make_mesh(cfg.mesh))
        with jax.set_mesh(job.mesh):
            state, frozen = job.init(jax.random.key(0))
            state, _ = job.train_step(state, job.train_batch(0), make_hyper(job.cfg), frozen)
        found.append(merge_params(state.params, frozen)["layers"])
    whole, last = found
    for name, leaf in whole.items():
        np.testing.assert_allclose(leaf[2:], last[name][2:], rtol=0, atol=1e-6)


def test_layers_that_can_not_be_chosen(small_config):
    cfg = small_config(**{"optim.trainable_layers": "9", "mesh.data": "-1"})
    with pytest.raises(ConfigError, match="trainable_layers=9, but the model has"):
        make_step(resolve(cfg, prepare_data(cfg, print)), sharding.make_mesh(cfg.mesh))
    with pytest.raises(ConfigError, match=r"lora.rank and optim.trainable_layers are both set"):
        small_config(**{"optim.trainable_layers": "1", "lora.rank": "2", "init.from_run": "a"})
