"""scripts/check_gpu.py: its rows at tiny sizes on a CPU, and what it says of what breaks."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

from nanojaxgpt.attention import blocked
from nanojaxgpt.config import load_module

SCRIPT = ROOT / "scripts" / "check_gpu.py"


@pytest.fixture
def script(monkeypatch):
    found = load_module(str(SCRIPT))
    monkeypatch.setattr(found, "find_gpu", lambda: "cpu")
    return found


def run(script, monkeypatch, *arguments: str) -> int:
    """Return the exit code of the script."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    return script.main()


def test_without_a_gpu_it_says_so(script, monkeypatch, capsys):
    assert run(script, monkeypatch) == 2
    assert "there is no GPU: jax runs on cpu" in capsys.readouterr().err


def test_a_check_that_crashes_is_a_failed_row_and_ends_no_other(
    script, monkeypatch, tmp_path, capsys
):
    def processes(command, **_):
        name = command[2].removeprefix("--row=")
        if name == "resume":
            raise subprocess.TimeoutExpired(command, 1)
        row = json.dumps([name, "ok" if name == "device" else "missed", "fine", {"rate": 2.5}])
        code = -11 if name == "train xl" else 0
        return subprocess.CompletedProcess(command, code, f"noise\n{row}\n", "a\nSegmentation\n")

    monkeypatch.setattr(script.subprocess, "run", processes)
    path = tmp_path / "found.json"
    flags = ["--tiny", "--only=device,train xl,resume,decode 1", f"--json={path}"]
    assert run(script, monkeypatch, *flags) == 1
    assert "1 ok, 2 missed, 2 failed, 0 skipped" in capsys.readouterr().out
    rows = json.loads(path.read_text())["rows"]
    assert [(row["name"], row["state"]) for row in rows] == [
        ("device", "ok"), ("train xl", "missed"), ("train xl", "failed"), ("resume", "failed"),
        ("decode 1", "missed"),
    ]  # fmt: skip
    assert rows[2]["value"] == "exit code -11: Segmentation"
    assert run(script, monkeypatch, "--tiny", "--only=decode 1", f"--json={path}") == 0  # missed


def test_a_wrong_kernel_fails(script, monkeypatch):
    right, tiny = blocked.run, script.Sizes(True)
    rows = list(script.check_attention(tiny, "blocked"))
    assert [row.state for row in rows] == ["ok"] * 3
    monkeypatch.setattr(blocked, "run", lambda *a, **k: 1.05 * right(*a, **k))
    assert [row.state for row in script.check_attention(tiny, "blocked")] == ["failed"] * 3


@pytest.mark.slow
def test_every_row_runs_at_tiny_sizes(tmp_path):
    path = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), "--tiny", f"--json={path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    assert not [row for row in rows.values() if row["state"] == "failed"]
    for name in ("train gpt2 small", "train gpt2 xl", "decode gpt2 small, batch 1"):
        assert rows[name]["numbers"]["tokens_per_second"] > 0
    assert rows["resume"]["state"] == "ok"
    assert rows["memory against rehearse cpu:1"]["state"] == "ok"
    kernels = [name for name in rows if name.startswith("attention")]
    assert len(kernels) == 12
    assert [name for name in kernels if rows[name]["state"] == "skipped"] == [
        f"attention cudnn, {case}" for case in ("causal", "windowed", "packed")
    ]
