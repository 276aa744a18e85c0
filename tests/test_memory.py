"""What can't fit is refused before it is allocated, with the fields that lower it."""

import math
import re
import sys
from subprocess import run

import jax
import numpy as np
import pytest
from conftest import ROOT, write_tiny

from nanojaxgpt import memory, sharding
from nanojaxgpt.__main__ import main
from nanojaxgpt.attention.cache import init_cache
from nanojaxgpt.config import base_config, override_config
from nanojaxgpt.errors import MemoryExceeded
from nanojaxgpt.hosts import process
from nanojaxgpt.memory import cache_bytes, explained, group_bytes, host_bytes, readable
from nanojaxgpt.model.config import complete
from nanojaxgpt.model.parameters import count_params
from nanojaxgpt.step import make_step

TOO_LARGE = 6


@pytest.fixture
def limit(monkeypatch):
    """Return a function that sets what every device has, in bytes."""
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)
    return lambda size: monkeypatch.setattr(memory, "device_bytes", lambda mesh: size)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Return the path of an experiment on one device whose run takes a second."""
    folder = tmp_path_factory.mktemp("memory")
    return write_tiny(
        folder, "train.num_steps = 1\ncfg.mesh.fsdp, cfg.mesh.data = 8, 1", num_words=2000
    )


def config(**overrides):
    overrides = {k.replace("__", "."): str(v) for k, v in overrides.items()}
    return complete(override_config(base_config(), {"model.vocab_size": "256"} | overrides))


def state(cfg, mesh):
    with jax.set_mesh(mesh):
        return make_step(cfg, mesh).abstract


def test_the_bytes_are_those_of_adam_by_hand(limit):
    cfg, mesh = config(), sharding.make_mesh({}, jax.devices()[:1])
    count = count_params(cfg.model)
    # Parameters, gradients and two moments; Adam's counter and the step; tokens, targets, weights.
    needed = 4 * 4 * count + 2 * 4 + 3 * 4 * cfg.train.batch_size * cfg.model.seq_len
    abstract = state(cfg, mesh)
    limit(needed)
    memory.check_state(cfg, mesh, abstract, {})
    limit(needed - 1)
    with pytest.raises(MemoryExceeded, match=re.escape(readable(needed))):
        memory.check_state(cfg, mesh, abstract, {})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model__embed_dim": 2147483646, "model__num_heads": 2}, "EiB"),
        ({"model__num_layers": 2147483647}, "model.num_layers=1073741823"),
        ({"train__batch_size": 2147483647}, "batch "),
    ],
)
def test_sizes_that_no_machine_has(overrides, words):
    cfg, mesh = config(**overrides), sharding.make_mesh({}, jax.devices()[:1])
    with pytest.raises(MemoryExceeded) as caught:
        memory.check_state(cfg, mesh, state(cfg, mesh), {})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_suggestions_lower_it_and_the_best_come_first():
    cfg, mesh = config(train__batch_size=512), sharding.make_mesh({"data": 8})
    text = memory.suggestions(cfg, mesh)
    changes = re.findall(r"([\w.]+=\w+(?: [\w.]+=\w+)*) \(about ([\d.]+) MiB less\)", text)
    assert len(changes) == memory.SUGGESTED
    saved = [float(size) for _, size in changes]
    assert saved == sorted(saved, reverse=True)
    devices = list(mesh.devices.flat)
    now = config(train__batch_size=512, mesh__data=8)
    for (change, size), _ in zip(changes, saved, strict=True):
        fields = dict(pair.split("=") for pair in change.split())
        after = memory.step_bytes(override_config(now, fields), devices, True)
        less = memory.step_bytes(now, devices, True) - after
        assert float(size) == pytest.approx(less / 2**20, rel=0.01)


def test_training_asks_before_it_allocates(experiment, limit, tmp_path, capsys):
    limit(1e4)
    run_ = tmp_path / "run"
    assert main(["train", f"--config={experiment}", f"--run={run_}"]) == TOO_LARGE
    err = capsys.readouterr().err
    assert "a training step needs at least" in err
    assert "9.77 KiB" in err
    assert err.count("less)") == memory.SUGGESTED
    assert not (run_ / "config.json").exists()


@pytest.mark.slow
def test_the_compiled_step_is_compared_before_it_runs(experiment, limit, tmp_path, capsys):
    limit(3e4)  # holds the state and the batch, but not the activations
    assert main(["train", f"--config={experiment}", f"--run={tmp_path}/run"]) == TOO_LARGE
    err = capsys.readouterr().err
    assert "temporaries" in err
    assert "Traceback" not in err
    assert (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("of_host", [False, True])
def test_an_evaluation_that_cannot_fit_is_refused_before_training(
    of_host, experiment, limit, tmp_path, monkeypatch, capsys
):
    limit(math.inf if of_host else 1e9)
    monkeypatch.setattr(memory, "host_bytes", lambda: 1e9)
    options = [f"--config={experiment}", f"--run={tmp_path}/run"]
    assert main(["train", *options, "--config.eval.batch_size=2000000000"]) == TOO_LARGE
    err = capsys.readouterr().err
    assert "the evaluation needs at least" in err
    assert "lower eval.batch_size" in err
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_the_advice_of_an_evaluation_is_its_own(experiment, limit, tmp_path, monkeypatch, capsys):
    run = [f"{tmp_path}/run"]
    limit(math.inf)
    assert main(["train", f"--config={experiment}", f"--run={run[0]}"]) == 0
    capsys.readouterr()
    big = "--config.eval.batch_size=2000000000"
    monkeypatch.setattr(memory, "host_bytes", lambda: 1e9)
    assert main(["eval", *run, big]) == TOO_LARGE
    assert "the evaluation needs at least" in capsys.readouterr().err
    limit(1.6e4)  # holds the parameters and the batch, but not the activations
    assert main(["eval", *run]) == TOO_LARGE
    err = capsys.readouterr().err
    assert "an evaluation step needs at least" in err
    assert "temporaries" in err
    assert "lower eval.batch_size" in err


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (MemoryError(), ""),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes."),
         " and asked for 123 bytes more"),
        (jax.errors.JaxRuntimeError("INTERNAL: std::bad_alloc"), ""),
    ],
)  # fmt: skip
def test_running_out_is_explained(error, asked):
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    with (
        pytest.raises(MemoryExceeded, match=f"^training ran out of memory{asked}; .* has .* Less$"),
        explained("training", mesh, lambda: "Less"),
    ):
        raise error
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: other"),
        explained("training", mesh, lambda: "Less"),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: other")


def test_a_real_allocation_that_fails_is_explained():
    code = """
import resource, jax
from nanojaxgpt import memory, sharding
jax.config.update("jax_platforms", "cpu")
mesh = sharding.make_mesh({}, jax.devices()[:1])
jax.numpy.zeros(8).block_until_ready()
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, -1))
assert memory.host_bytes() <= 8 << 30
try:
    with memory.explained("training", mesh, lambda: "Less"):
        jax.jit(lambda: jax.numpy.arange(1 << 34).astype("float32") ** 2)().block_until_ready()
except memory.MemoryExceeded as error:
    print(error)
"""
    found = run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout.startswith("training ran out of memory"), found.stderr[-2000:]


def test_a_cache_has_the_bytes_of_its_arrays():
    cfg = config(model__num_kv_heads=2, model__compute_dtype="bfloat16").model
    shape = cfg.num_layers, 3, 5, cfg.num_kv_heads, cfg.head_dim, cfg.compute_dtype
    real = init_cache(*shape)
    assert cache_bytes(cfg, 3, 5) == sum(leaf.nbytes for leaf in jax.tree.leaves(real))


def test_control_groups_limit_the_host(tmp_path, monkeypatch):
    assert 0 < host_bytes() < 1e15
    (tmp_path / "a").mkdir()
    (tmp_path / "memory.max").write_text("7000\n")
    (tmp_path / "memory.swap.max").write_text("max\n")
    (tmp_path / "a" / "memory.max").write_text("max\n")
    (tmp_path / "own").write_text("0::/a\n")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    assert group_bytes(0, tmp_path) == 7000
    assert group_bytes(100, tmp_path) == 7100
    (tmp_path / "own").write_text("4:memory:/a\n")
    (tmp_path / "memory" / "a").mkdir(parents=True)
    (tmp_path / "memory" / "a" / "memory.limit_in_bytes").write_text("9000\n")
    assert group_bytes(0, tmp_path) == 9000


def test_readable_sizes():
    assert [readable(n) for n in (0, 1, 1023, 1536, 2**30, 5 * 2**70, math.inf)] == [
        "0 B", "1 B", "1023 B", "1.5 KiB", "1 GiB", "5 ZiB", "an unknown amount"
    ]  # fmt: skip
    assert np.isfinite(host_bytes())
