"""A finished run is recognised at once, and nothing else is taken for one."""

import fcntl
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, write_tiny

from nanojaxgpt import finish, rundir
from nanojaxgpt import training as train_module
from nanojaxgpt.__main__ import main
from nanojaxgpt.errors import ConfigError, UserError
from nanojaxgpt.hosts import process


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return an experiment and its finished run."""
    own = "train.num_steps, cfg.checkpoint.every_steps = 6, 3"
    path = write_tiny(tmp_path_factory.mktemp("finish"), own)
    before, process.keep_freed_memory = process.keep_freed_memory, lambda: None
    assert main(["train", f"--config={path}", f"--run={path.parent / 'run'}"]) == 0
    process.keep_freed_memory = before
    return path, path.parent / "run"


def test_a_finished_run_says_so_without_jax(finished):
    path, run = finished
    code = f"""
import sys
from nanojaxgpt.__main__ import main
print(main(["train", "--config={path}", "--run={run}", "--config.sample.top_k=3"]))
print("jax" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    lines = found.stdout.splitlines()
    assert lines[-2:] == ["0", "False"], found.stderr
    assert lines[0] == f"{run} is finished at step 6"
    assert f"  checkpoint       {run}/checkpoints/6" in lines
    assert f"  nanojaxgpt eval {run}" in lines


def put_back(run) -> None:
    """Give the checkpoint of step 3 the name of the last one; a rename keeps all times."""
    shutil.rmtree(run / "checkpoints/6")
    (run / "checkpoints/3").rename(run / "checkpoints/6")


def flip_a_bit(run) -> None:
    """Change the largest file of the last checkpoint, but neither its size nor its time."""
    path = max(run.glob("checkpoints/6/params/**/*"), key=lambda path: path.stat().st_size)
    before, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def edit(run, old: bytes, new: bytes) -> None:
    path = run / "finished.json"
    text = path.read_bytes()
    assert old in text
    path.write_bytes(text.replace(old, new))


CHANGES = {
    "its newest checkpoint is not the last step": lambda run: shutil.rmtree(run / "checkpoints/6"),
    "another checkpoint has its name": put_back,
    "a bit of it flipped": flip_a_bit,
    "a file was added to it": lambda run: (run / "checkpoints/6/params/more").write_text(""),
    "its record is of another step": lambda run: edit(run, b'"step": 6', b'"step": 5'),
    "its record is damaged": lambda run: (run / "finished.json").write_text("[" * 100_000),
    "its record is missing": lambda run: (run / "finished.json").unlink(),
    "a file of it is gone": lambda run: shutil.rmtree(run / "checkpoints/6/params/d"),
    "no plot": lambda run: (run / "loss.png").unlink(),
    "another config": lambda run: "--config.train.seed=1",
    "a larger vocabulary": lambda run: "--config.model.vocab_size=64",
    "more steps": lambda run: "--config.train.num_steps=7",
    "several hosts": lambda run: "--multihost",
}


def test_a_copied_run_is_still_finished(finished, tmp_path):
    """Copies and backups change times, not content."""
    shutil.copytree(finished[1], tmp_path / "run", copy_function=shutil.copyfile)
    cfg = rundir.read_config(tmp_path / "run")
    assert finish.is_finished(cfg, tmp_path / "run", print)


def test_without_matplotlib_a_run_has_no_plot_and_is_finished_all_the_same(
    finished, tmp_path, monkeypatch
):
    run, said = tmp_path / "run", []
    subprocess.run(["cp", "-a", finished[1], run], check=True)
    (run / "loss.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    finish.end_run(run, said.append)
    assert said[0] == "no loss.png: matplotlib is not installed: pip install 'nanojaxgpt[plots]'"
    assert not [line for line in said[1:] if line.startswith("  plot")]
    assert not (run / "loss.png").exists()
    cfg = rundir.read_config(run)
    assert finish.is_finished(cfg, run, print)
    monkeypatch.undo()
    assert not finish.is_finished(cfg, run, print)  # the next `train` draws it


def test_a_checkpoint_too_large_to_hash_is_read_instead(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    subprocess.run(["cp", "-a", finished[1], run], check=True)
    monkeypatch.setattr(finish, "HASHED_BYTES", 100)
    finish.end_run(run, lambda line: None)
    assert not (run / "finished.json").exists()
    assert not finish.is_finished(rundir.read_config(run), run, print)


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "identity.json", "loss.png"])
def test_a_file_that_is_a_folder_is_named(name, finished, tmp_path):
    run = tmp_path / "run"
    subprocess.run(["cp", "-a", finished[1], run], check=True)
    (run / name).unlink()
    (run / name).mkdir()
    write = {
        "lock": lambda: rundir.own_run(run).__enter__(),
        "metrics.jsonl": lambda: finish.report_end(run, print),
        "identity.json": lambda: write_text(run / name),
        "loss.png": lambda: finish.end_run(run, print),
    }
    with pytest.raises(UserError, match=f"can't [a-z ]+ {run}(: |/){name}: Is a directory"):
        write[name]()


def write_text(path) -> None:
    with rundir.writing(path.parent, ConfigError):
        rundir.write_text(path, "")


class Started(Exception):
    """The run was started as any other."""


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_no_finished_run_is_started(change, finished, tmp_path, monkeypatch):
    def start(*_):
        raise Started

    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(train_module, "fit", start)
    monkeypatch.setattr("nanojaxgpt.hosts.joining.place", start)
    path, run = finished[0], tmp_path / "run"
    subprocess.run(["cp", "-a", finished[1], run], check=True)
    assert main(["train", f"--config={path}", f"--run={run}"]) == 0
    more = CHANGES[change](run)
    arguments = [
        "train",
        f"--config={path}",
        f"--run={run}",
        *([more] if isinstance(more, str) else []),
    ]
    monkeypatch.setattr("nanojaxgpt.__main__.explain", lambda error: error)
    assert isinstance(main(arguments), Started)


@pytest.mark.parametrize(
    ("harm", "code", "words"),
    [("lock", 2, "another process is training"), ("corpus", 3, "is not what")],
)
def test_a_finished_run_is_still_checked(
    harm, code, words, finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)
    run = tmp_path / "run"
    subprocess.run(["cp", "-a", finished[1], run], check=True)
    if harm == "corpus":
        identity = json.loads((run / "identity.json").read_text())
        identity["data"]["parts"][0]["tokens"] = "0" * 16
        (run / "identity.json").write_text(json.dumps(identity))
    with open(run / "lock") as lock:
        if harm == "lock":
            fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["train", f"--config={finished[0]}", f"--run={run}"]) == code
    assert words in capsys.readouterr().err
