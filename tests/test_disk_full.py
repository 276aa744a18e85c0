"""A full disk ends training with one line, and nothing that was saved is lost."""

import contextlib
import shutil
import subprocess

import jax
import pytest
from conftest import write_tiny

from nanojaxgpt import config, metrics, rundir, sharding
from nanojaxgpt import training as train_module
from nanojaxgpt.__main__ import main
from nanojaxgpt.data.loader import prepare_data, resolve
from nanojaxgpt.hosts import process
from nanojaxgpt.loop import Loop
from nanojaxgpt.metrics import read_metrics

LAST, SIZE = 60, 8 << 20
NO_METRICS = "--config.train.log_every_steps=1000"
make_mesh = sharding.make_mesh


@pytest.fixture
def disk(tmp_path):
    """Return the folder of a file system of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    found = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", disk], capture_output=True, text=True
    )
    if found.returncode:
        pytest.skip(f"no file system can be mounted here: {found.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill(disk) -> None:
    """Leave no byte free."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    assert shutil.disk_usage(disk).free == 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return an experiment, and its job, which is compiled once."""
    own = f"train.num_steps, cfg.checkpoint.every_steps, cfg.eval.every_steps = {LAST}, 10, 0"
    path = write_tiny(tmp_path_factory.mktemp("full"), own)
    cfg = config.load_config(str(path))
    mesh, data = make_mesh({}, jax.devices()[:1]), prepare_data(cfg, print)
    return path, train_module.make_job(resolve(cfg, data), data, mesh)


@pytest.fixture
def run_on(tiny, monkeypatch):
    """Return run(disk, step, *arguments) -> exit code; the disk fills up before that step ends."""
    path, job = tiny
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: job.mesh)
    make_job = train_module.share_job
    monkeypatch.setattr(train_module, "make_job", lambda cfg, *_: make_job(job, cfg))
    between = Loop.between

    def run(disk, step, *arguments):
        def full_at(self, now, state):
            if now == step:
                self.recorder.checkpoints.manager.wait_until_finished()
                fill(disk)
            between(self, now, state)

        monkeypatch.setattr(Loop, "between", full_at)
        return main(["train", f"--config={path}", f"--run={disk / 'run'}", *arguments])

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "argument", "kept", "words"),
    [
        (12, NO_METRICS, [10], "can't save step 20"),
        (LAST, NO_METRICS, [LAST - 20, LAST - 10], "can't write to the run directory"),
        (12, "--config.checkpoint.every_steps=0", [], "can't write to the run directory"),
        (12, "--config.train.trackers=('tensorboard',)", [10], "can't "),
    ],
)
def test_a_disk_that_fills_up(step, argument, kept, words, disk, run_on, capsys):
    assert run_on(disk, step, argument) == 5
    said = capsys.readouterr().err
    errors = [line for line in said.splitlines() if not line.startswith("WARNING: tensorboard")]
    assert len(errors) == 1, said
    assert words in errors[0]
    assert "no space left on the device (0 bytes free)" in errors[0]
    assert rundir.saved_steps(disk / "run" / "checkpoints") == kept
    (disk / "filler").unlink()
    assert run_on(disk, 0, argument) == 0
    out = capsys.readouterr().out
    assert not kept or f"resuming from step {max(kept)}" in out
    assert rundir.saved_steps(disk / "run" / "checkpoints")[-1] == LAST
    assert not list(disk.rglob("*orbax-checkpoint-tmp*"))
    if argument != NO_METRICS:
        steps = [record["step"] for record in read_metrics(disk / "run") if "loss" in record]
        assert steps == list(range(1, LAST + 1))


@pytest.mark.slow
def test_a_disk_without_room_for_the_plot(disk, run_on, monkeypatch, capsys):
    plot = metrics.plot_losses
    monkeypatch.setattr(metrics, "plot_losses", lambda *a: (fill(disk), plot(*a)))
    assert run_on(disk, 0) == 5
    assert "no space left on the device (0 bytes free)" in capsys.readouterr().err
    assert rundir.saved_steps(disk / "run" / "checkpoints")[-1] == LAST


def test_a_disk_that_is_full_at_the_start(disk, run_on, capsys):
    fill(disk)
    assert run_on(disk, 0) == 2
    assert "no space left on the device (0 bytes free)" in capsys.readouterr().err
    with open(disk / "filler", "r+b") as file:
        file.truncate(SIZE - (40 << 10))
    assert run_on(disk, 0) == 2
    said = capsys.readouterr().err
    assert "error: a checkpoint takes up to " in said
    assert rundir.saved_steps(disk / "run" / "checkpoints") == []
