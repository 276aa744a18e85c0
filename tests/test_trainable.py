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
from nanojaxgpt.step import make_step
from nanojaxgpt.trainable import check_trainable, is_trainable, merge_params, split_params
from nanojaxgpt.training import fit

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
