"""Checkpoints: what is kept, what a fingerprint catches, and what happens to broken ones."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nanojaxgpt.checkpoint import (
    Checkpoints,
    Keep,
    describe_leaves,
    restore,
    set_aside,
    with_shardings,
)  # fmt: skip
from nanojaxgpt.errors import CheckpointError
from nanojaxgpt.rundir import saved_steps


def tree(seed: int) -> dict:
    """Return a small tree of several dtypes."""
    rng = np.random.default_rng(seed)
    return {
        "w_DF": jnp.asarray(rng.standard_normal((4, 6)), jnp.float32),
        "half": jnp.asarray(rng.standard_normal(5), jnp.bfloat16),
        "count": jnp.int32(seed),
    }


def abstract() -> dict:
    """Return the shapes to restore into."""
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: tree(0))
    return {"params": with_shardings(shapes, jax.tree.map(lambda _: one, shapes))}


def save(folder, steps, losses=None, **keep) -> None:
    """Save tree(step) at each step; `losses` become known just after their save."""
    known = {}
    rules = dict(last=2, every_steps=0, best=0) | keep
    checkpoints = Checkpoints(folder, Keep(**rules, losses=lambda: known))
    for step in steps:
        checkpoints.save(step, {"params": tree(step), "opt_state": {"mu": tree(step + 100)}})
        known |= {step: losses[step]} if losses and step in losses else {}
    checkpoints.close()


def test_restored_is_what_was_saved(tmp_path):
    save(tmp_path / "c", [3])
    step, items = restore(tmp_path / "c", abstract())
    assert step == 3
    for a, b in zip(jax.tree.leaves(items["params"]), jax.tree.leaves(tree(3)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_the_newest_every_kth_and_the_best_are_kept(tmp_path):
    save(tmp_path / "c", range(1, 8))
    assert saved_steps(tmp_path / "c") == [6, 7]
    save(tmp_path / "k", range(1, 8), every_steps=3, last=1)
    assert saved_steps(tmp_path / "k") == [3, 6, 7]
    losses = {1: 5.0, 2: 1.0, 3: 4.0, 4: 2.0, 5: 3.0}
    save(tmp_path / "b", range(1, 8), losses, best=2, last=1)
    assert saved_steps(tmp_path / "b") == [2, 4, 7]


@pytest.mark.parametrize("item", ["w_DF", "half", "count"])
def test_one_flipped_bit_and_two_swapped_numbers_change_the_fingerprint(item):
    good, bad = tree(1), tree(1)
    array = np.array(bad[item])
    bits = array.reshape(-1).view(np.uint8)
    bits[0] ^= 4
    bad[item] = jnp.asarray(array)
    assert describe_leaves(good) != describe_leaves(bad)
    if array.ndim:
        swapped = np.array(good[item])
        flat = swapped.reshape(-1)
        flat[[0, 3]] = flat[[3, 0]]
        assert describe_leaves(good | {item: jnp.asarray(swapped)}) != describe_leaves(good)


def damage(folder, how: str) -> None:
    """Break the data files below `folder`."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.parent.name == "d"]
    assert files
    for path in files:
        data = bytearray(path.read_bytes())
        if how == "flip":
            data[len(data) // 2] ^= 16
        elif how == "truncate":
            data = data[: len(data) // 2]
        if how == "delete":
            path.unlink()
        else:
            path.write_bytes(data)


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_a_broken_checkpoint_is_passed_over_loudly(tmp_path, how):
    save(tmp_path / "c", [1, 2])
    damage(tmp_path / "c" / "2" / "params", how)
    said = []
    step, items = restore(tmp_path / "c", abstract(), report=said.append)
    assert step == 1
    np.testing.assert_array_equal(items["params"]["w_DF"], tree(1)["w_DF"])
    assert "2 is unusable" in said[0]
    assert said[0].startswith("WARNING")
    with pytest.raises(CheckpointError, match="tried \\[2\\]"):
        restore(tmp_path / "c", abstract(), step=2, report=said.append)
    damage(tmp_path / "c" / "1" / "params", how)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is usable"):
        restore(tmp_path / "c", abstract(), report=said.append)


def test_weights_altered_in_a_valid_file_are_caught(tmp_path):
    """Orbax restores these without a word: the fingerprint alone can tell."""
    save(tmp_path / "c", [1, 2])
    save(tmp_path / "other", [9])
    (tmp_path / "c" / "2" / "params").rename(tmp_path / "old")
    (tmp_path / "other" / "9" / "params").rename(tmp_path / "c" / "2" / "params")
    said = []
    step, _ = restore(tmp_path / "c", abstract(), report=said.append)
    assert step == 1
    assert "these arrays differ from what was saved" in said[0]


@pytest.mark.parametrize("how", ["renamed", "contents moved"])
def test_a_checkpoint_under_another_steps_name_is_passed_over(tmp_path, how):
    save(tmp_path / "c", [20, 25])
    if how == "renamed":
        (tmp_path / "c" / "25").rename(tmp_path / "c" / "39")
    else:
        shutil.rmtree(tmp_path / "c" / "25")
        shutil.copytree(tmp_path / "c" / "20", tmp_path / "c" / "25")
    newest, said = saved_steps(tmp_path / "c")[-1], []
    step, items = restore(tmp_path / "c", abstract(), report=said.append)
    assert (step, int(items["params"]["count"])) == (20, 20)
    holds = 25 if how == "renamed" else 20
    assert f"c/{newest} is unusable: it holds step {holds}" in said[0]
    with pytest.raises(CheckpointError, match=f"tried \\[{newest}\\]"):
        restore(tmp_path / "c", abstract(), step=newest, report=said.append)


def test_only_folders_named_by_a_step_are_checkpoints(tmp_path):
    save(tmp_path / "c", [1, 2])
    for name in ("²", "٣", "007", "latest", "3.orbax-checkpoint-tmp"):
        (tmp_path / "c" / name).mkdir()
    (tmp_path / "c" / "9").write_text("a file")
    assert saved_steps(tmp_path / "c") == [1, 2]
    assert restore(tmp_path / "c", abstract())[0] == 2


def test_another_shape_or_dtype_is_refused(tmp_path):
    save(tmp_path / "c", [1])
    other = abstract()
    other["params"]["w_DF"] = jax.ShapeDtypeStruct(
        (4, 6), jnp.int32, sharding=other["params"]["w_DF"].sharding
    )
    said = []
    with pytest.raises(CheckpointError):
        restore(tmp_path / "c", other, report=said.append)
    assert "params/w_DF is ['float32', [4, 6]] there, ['int32', [4, 6]] here" in said[0]


def test_none_is_none_and_a_missing_step_is_named(tmp_path):
    assert restore(tmp_path / "nothing", abstract()) is None
    save(tmp_path / "c", [1, 2])
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5 in .* available: \[1, 2\]"):
        restore(tmp_path / "c", abstract(), step=5)


def test_a_file_in_the_place_of_what_is_set_aside_is_named(tmp_path):
    (tmp_path / "c" / "2").mkdir(parents=True)
    (tmp_path / "unusable").write_text("")
    with pytest.raises(CheckpointError, match=f"{tmp_path}: unusable: File exists"):
        set_aside(tmp_path / "c", 1)
    assert saved_steps(tmp_path / "c") == [2]


def test_what_is_set_aside_is_not_deleted(tmp_path):
    save(tmp_path / "c", [1, 2])
    set_aside(tmp_path / "c", 1)
    assert saved_steps(tmp_path / "c") == [1]
    assert (tmp_path / "unusable" / "2" / "params").exists()
