"""However often a run is killed or stopped, it ends with the bits of one that never was."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import ROOT, write_tiny

from nanojaxgpt import checkpoint, rundir, sharding
from nanojaxgpt import training as train_module
from nanojaxgpt.config import override_config
from nanojaxgpt.data.loader import prepare_data
from nanojaxgpt.errors import INTERRUPTED, PREEMPTED, Stopped
from nanojaxgpt.metrics import read_metrics
from nanojaxgpt.model.config import complete
from nanojaxgpt.model.transformer import Transformer
from nanojaxgpt.training import fit, make_job
from nanojaxgpt.validation import make_evaluation

NUM_STEPS = 20
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


make_mesh = sharding.make_mesh


def one_device_mesh(*_):
    return make_mesh({}, jax.devices()[:1])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return a function that starts training in a run directory, in a process of its own."""
    folder = tmp_path_factory.mktemp("resume")
    write_tiny(
        folder,
        f"""
        model.dropout = 0.1
        cfg.mesh.data = 1
        train.num_steps, train.accumulation_steps = {NUM_STEPS}, 2
        cfg.optim.warmup_steps = 5
        cfg.eval.every_steps, cfg.eval.num_batches = 5, 2
        cfg.checkpoint.every_steps = 5
        """,
    )
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "JAX_PLATFORMS": "cpu",
    }

    def begin(run, *arguments) -> subprocess.Popen:
        command = [sys.executable, "-m", "nanojaxgpt", "train"]
        command += [f"--config={folder}/tiny.py", f"--run={run}", *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )

    return begin


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """Return the run directory of a run that was left alone."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    process = start(run)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return run


def steps_seen(run) -> int:
    return max((r["step"] for r in read_metrics(run)), default=0)


def stop_at(process, run, step, number) -> tuple[int, str, int]:
    """Send a signal when `step` is in the metrics; return exit code, output, last step seen."""
    while steps_seen(run) < step and process.poll() is None:
        time.sleep(0.002)
    seen = steps_seen(run)
    process.send_signal(number)
    output = process.communicate(timeout=300)[0]
    return process.returncode, output, seen


def leaves(run) -> dict[str, np.ndarray]:
    """Return the arrays of the last step's checkpoint by their paths."""
    cfg = complete(rundir.read_config(run))
    job = make_job(cfg, prepare_data(cfg, print), one_device_mesh())
    abstract = job.abstract.items(cfg, {})
    step, items = checkpoint.restore(run / "checkpoints", abstract, NUM_STEPS)
    assert step == NUM_STEPS
    found = jax.tree_util.tree_leaves_with_path(items)
    return {checkpoint.path_name(path): np.asarray(leaf) for path, leaf in found}


def losses(run, name="loss") -> list[tuple[int, float]]:
    """Return (step, number) of every record that has it, in the order of the file."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r[name]) for r in map(json.loads, lines) if name in r]


def assert_same_run(run, expected) -> None:
    """Compare every loss and every bit of the last state."""
    for name in ("loss", "grad_norm", "learning_rate", "validation_loss"):
        assert losses(run, name) == losses(expected, name)
    assert [step for step, _ in losses(run)] == list(range(1, NUM_STEPS + 1))
    assert [step for step, _ in losses(run, "validation_loss")] == [5, 10, 15, 20]
    found, wanted = leaves(run), leaves(expected)
    assert found.keys() == wanted.keys()
    assert {name.split("/")[0] for name in wanted} == {"params", "opt_state", "recent"}
    assert any(np.any(leaf) for name, leaf in wanted.items() if name.startswith("opt_state"))
    for name, leaf in wanted.items():
        assert found[name].dtype == leaf.dtype
        assert found[name].tobytes() == leaf.tobytes(), name


def finish(process, run) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert steps_seen(run) == NUM_STEPS
    return output


@pytest.mark.slow
def test_killed_stopped_and_started_again(start, uninterrupted, tmp_path):
    run = tmp_path / "run"
    for step, number, expected in (
        (3, TERM, PREEMPTED), (7, KILL, -KILL), (10, INT, INTERRUPTED), (14, KILL, -KILL)
    ):  # fmt: skip
        code, output, seen = stop_at(start(run), run, step, number)
        assert code == expected, output
        assert seen < NUM_STEPS
        if number != KILL:
            saved = max(rundir.saved_steps(run / "checkpoints"))
            assert f"saved step {saved} in {run}" in output
            assert steps_seen(run) == saved
            assert seen <= saved < NUM_STEPS
    assert "resuming from step" in finish(start(run), run)
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize("place", ["imports", "before the loop"])
def test_terminated_before_the_first_step(place, start, tmp_path):
    process = start(tmp_path / "run")
    if place == "imports":
        maps = f"/proc/{process.pid}/maps"
        while process.poll() is None and "jaxlib" not in open(maps).read():  # noqa: SIM115
            time.sleep(0.01)
    else:
        while "parameters" not in process.stdout.readline():
            assert process.poll() is None
    process.send_signal(TERM)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == PREEMPTED, output


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_moments(seed, start, uninterrupted, tmp_path):
    run, chance, kills = tmp_path / "run", random.Random(seed), 0
    for _ in range(12):
        process = start(run, f"--config.checkpoint.every_steps={1 + seed % 3}")
        try:
            process.communicate(timeout=chance.uniform(1, 6))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0
        break
    else:
        finish(start(run), run)
    assert kills
    assert_same_run(run, uninterrupted)


@pytest.fixture(scope="module")
def compiled(uninterrupted):
    """Return the job of that run on one device; every `fit` shares it, so that it compiles once."""
    changes = {"checkpoint.every_steps": "7", "checkpoint.keep_last": "3"}
    cfg = complete(override_config(rundir.read_config(uninterrupted), changes))
    return make_job(cfg, prepare_data(cfg, print), one_device_mesh())


@pytest.fixture
def job(compiled, monkeypatch):
    """Return the compiled job, and have `fit` use it."""
    monkeypatch.setattr(sharding, "make_mesh", one_device_mesh)
    share(compiled, monkeypatch)
    return compiled


def share(job, monkeypatch) -> None:
    monkeypatch.setattr(train_module, "make_job", lambda *_: job)


def interrupt_at(job, step, monkeypatch, asked) -> None:
    """Have SIGTERM arrive while `step` is dispatched."""

    def train_step(state, *arguments):
        asked.append(int(state.step))
        if asked[-1] == step - 1:
            os.kill(os.getpid(), TERM)
        return job.train_step(state, *arguments)

    share(job._replace(train_step=train_step), monkeypatch)


@pytest.mark.slow
def test_stopped_after_every_step(job, tmp_path, monkeypatch):
    plain, run, asked = tmp_path / "plain", tmp_path / "run", []
    fit(job.cfg, plain, report=lambda text: None)
    for step in range(1, NUM_STEPS):
        interrupt_at(job, step, monkeypatch, asked)
        with pytest.raises(Stopped) as caught:
            fit(job.cfg, run, report=lambda text: None)
        assert caught.value.exit_code == PREEMPTED
        assert max(rundir.saved_steps(run / "checkpoints")) == step
    interrupt_at(job, 0, monkeypatch, asked)
    state = fit(job.cfg, run, report=lambda text: None)
    assert int(state.step) == NUM_STEPS
    assert asked == list(range(NUM_STEPS))
    assert_same_run(run, plain)


@pytest.mark.slow
def test_a_signal_while_restoring_is_no_broken_checkpoint(job, tmp_path, monkeypatch):
    run, lines = tmp_path / "run", []
    interrupt_at(job, 9, monkeypatch, [])
    with pytest.raises(Stopped):
        fit(job.cfg, run, report=lines.append)
    before = rundir.saved_steps(run / "checkpoints")
    assert before == [7, 9]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "restore_step", lambda *_: os.kill(os.getpid(), TERM))
        with pytest.raises(Stopped) as caught:
            fit(job.cfg, run, report=lines.append)
    assert caught.value.exit_code == PREEMPTED
    assert not any("unusable" in line for line in lines)
    assert rundir.saved_steps(run / "checkpoints") == before


@pytest.mark.parametrize(("warmup", "warned"), [("19", False), ("20", True), ("39", True)])
def test_a_warm_up_longer_than_the_run_is_said_once(warmup, warned, job, tmp_path):
    cfg, lines = override_config(job.cfg, {"optim.warmup_steps": warmup}), []
    train_module.begin_run(job._replace(cfg=cfg), tmp_path, lines.append)
    found = [line for line in lines if "optim.warmup_steps" in line]
    assert len(found) == warned
    if warmup == "39":
        assert "optim.warmup_steps=39 is not below train.num_steps=20" in found[0]
        assert "ends at 50% of optim.learning_rate" in found[0]


def test_no_validation_split_gives_no_validation_loss(job, tmp_path, monkeypatch):
    cfg = override_config(job.cfg, {"data.validation_fraction": "0"})
    model = Transformer(cfg.model)
    evaluate = make_evaluation(cfg, prepare_data(cfg, print), job.mesh, model)
    share(job._replace(evaluate=evaluate), monkeypatch)
    fit(job.cfg, tmp_path / "run", report=lambda text: None)
    assert len(losses(tmp_path / "run")) == NUM_STEPS
    assert losses(tmp_path / "run", "validation_loss") == []


def test_batches_are_functions_of_the_step_alone(compiled):
    cfg = override_config(compiled.cfg, {"model.dropout": "0", "checkpoint.every_steps": "3"})
    fresh = make_job(cfg, prepare_data(cfg, print), one_device_mesh())
    batches = {step: compiled.train_batch(step) for step in (0, 7, 19, 1000)}
    for step in (1000, 7, 0, 19):
        for one, other in zip(batches[step][:3], fresh.train_batch(step)[:3], strict=True):
            np.testing.assert_array_equal(one, other)
    assert not np.array_equal(batches[0].tokens_BT, batches[7].tokens_BT)
