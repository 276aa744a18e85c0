"""What import and export write appears whole; what a killed one left goes with the next."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from test_golden_models import copy_golden

import nanojaxgpt
from nanojaxgpt.__main__ import main
from nanojaxgpt.errors import CheckpointError, ConfigError
from nanojaxgpt.interchange import targets
from nanojaxgpt.interchange.targets import new_folder, new_target

# A command that stops when all is written and nothing has its name yet.
STOPPING = """
import pathlib, sys, time
from nanojaxgpt.__main__ import main
rename = pathlib.Path.rename
def stop(self, target):
    if self.name == ".out.partial":
        print("written", flush=True)
        time.sleep(600)
    return rename(self, target)
pathlib.Path.rename = stop
sys.exit(main(sys.argv[1:]))
"""


def begin(*arguments: str) -> subprocess.Popen:
    """Start a command, and return it when it has stopped."""
    command = [sys.executable, "-c", STOPPING, *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, stderr=subprocess.DEVNULL
    )
    assert process.stdout
    assert process.stdout.readline() == "written\n"
    return process


@pytest.mark.parametrize(
    "command", ["export", pytest.param("import", marks=pytest.mark.slow)]
)  # fmt: skip
def test_a_killed_command_leaves_nothing_to_the_next(command, tmp_path_factory, tmp_path, capsys):
    model, out = copy_golden("llama", tmp_path_factory.mktemp("source")), tmp_path / "out"
    (tmp_path / ".other.partial").mkdir()
    process = begin(command, str(model), str(out))
    try:
        left = sorted(path.name for path in tmp_path.iterdir())
        assert left == [".other.partial", ".out.lock", ".out.partial"]
        # It is still running: its folder is not touched.
        held = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").rglob("*")}
        assert len(held) > 3
        assert main([command, str(model), str(out)]) == 2
        assert "another process is writing" in capsys.readouterr().err
        assert {path: path.stat().st_mtime_ns for path in held} == held
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    (tmp_path / ".out.partial" / "of-the-killed").touch()
    assert main([command, str(model), str(out)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.partial", "out"]
    assert not (out / "of-the-killed").exists()
    assert nanojaxgpt.load(out).config.num_layers == 2


def test_a_target_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "new" / "out"
    with new_target(out) as partial:
        partial.write_text("half")
        assert not out.exists()
        with pytest.raises(ConfigError, match="another process is writing"), new_target(out):
            pass
        partial.write_text("whole")
    assert out.read_text() == "whole"
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(ConfigError, match="out exists: choose"), new_target(out):
        pass
    with (
        pytest.raises(CheckpointError, match=r"can't write .*two"),
        new_folder(tmp_path / "two") as two,
    ):
        two.rename(tmp_path / "three")
    (tmp_path / "three").rmdir()
    assert list(tmp_path.iterdir()) == [out.parent]
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as partial:
        (partial / "file").touch()
    assert (tmp_path / "empty" / "file").exists()
    with pytest.raises(ConfigError, match="empty is not an empty folder"):
        targets.check_free(tmp_path / "empty")
    with pytest.raises(CheckpointError, match=r"can't write .*out/x"), new_target(out / "x"):
        pass


def test_a_lock_that_was_removed_meanwhile_is_not_enough(tmp_path, monkeypatch):
    """Another process ended, and removed the file, after this one had opened it."""
    real = targets.fcntl.flock

    def late(file, how):
        (tmp_path / ".out.lock").unlink()
        real(file, how)

    monkeypatch.setattr(targets.fcntl, "flock", late)
    with pytest.raises(ConfigError, match="another process"), new_target(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []
