"""However many launchers run a sweep, however often they are killed: each trial is done once."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, write_tiny

from nanojaxgpt.metrics import read_metrics
from nanojaxgpt.sweep import claims
from nanojaxgpt.sweep import launch as launch_module
from nanojaxgpt.sweep.claims import Claims, is_running, read_outcome, run_path, write_outcome
from nanojaxgpt.sweep.launch import own_devices
from nanojaxgpt.sweep.plan import load_trials

NUM_TRIALS, NUM_STEPS = 6, 12


def test_a_claim_is_had_by_one(tmp_path):
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        assert one.take("a")
        assert not other.take("a")
        assert not one.take("a")
        assert other.take("b")
        assert is_running(tmp_path, "a")
        one.release("a")
        assert not is_running(tmp_path, "a")
        assert other.take("a")
        assert not one.take("a")
    assert not is_running(tmp_path, "a")
    assert not is_running(tmp_path, "b")


def test_another_machines_claim_lives_by_its_heartbeat(tmp_path, monkeypatch):
    with Claims(tmp_path) as one:
        assert one.take("a")
        path, _ = one.held["a"]
        monkeypatch.setattr(claims, "machine", lambda: "another")
        with Claims(tmp_path) as other:
            assert not other.take("a")
            old = time.time() - claims.STALE_SECONDS - 5
            os.utime(path, (old, old))
            assert other.take("a")
            assert claims.newest_claim(tmp_path / "claims", "a") == other.held["a"][0] != path


def test_who_was_taken_over_ends_at_once(tmp_path):
    code = f"""
import time
from pathlib import Path
from nanojaxgpt.sweep import claims
from nanojaxgpt.sweep import launch as launch_module
claims.BEAT_SECONDS = 0.05
with claims.Claims(Path("{tmp_path}")) as held:
    held.take("a")
    print("taken", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout.readline() == "taken\n"
    (tmp_path / "claims" / "a.2").write_text("another")
    assert process.wait(timeout=30) == 75
    assert "a was taken over" in process.stderr.read()


def test_who_gave_up_was_not_taken_over(tmp_path):
    code = f"""
import threading, time
from pathlib import Path
from nanojaxgpt.sweep import claims
claims.BEAT_SECONDS, newest = 0, claims.newest_claim
def late(*arguments):  # the heart beats slowly, and others take what was given up
    time.sleep(0.01 * (threading.current_thread() is not threading.main_thread()))
    return newest(*arguments)
claims.newest_claim = late
with claims.Claims(Path("{tmp_path}")) as one, claims.Claims(Path("{tmp_path}")) as other:
    for holder in (one, other) * 25:
        assert holder.take("a")
        time.sleep(0.005)
        holder.release("a")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_many_at_once_never_share_a_claim(tmp_path):
    code = f"""
import random, sys, time
from pathlib import Path
from nanojaxgpt.sweep.claims import Claims
with Claims(Path("{tmp_path}")) as held:
    print("ready", flush=True)
    sys.stdin.readline()
    for turn in range(200):
        name = f"trial{{turn % 5}}"
        if held.take(name):
            inside = Path("{tmp_path}") / f"inside-{{name}}"
            inside.mkdir()  # fails where another is inside
            time.sleep(random.random() / 1000)
            inside.rmdir()
            held.release(name)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for _ in range(4)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert len(list((tmp_path / "claims").glob("trial0.*"))) > 4


@pytest.mark.parametrize("content", [
    b"\xff", b"", b"{", b"[]", b"null", b"5", b"[" * 100_000, b'{"state": "finished"}', b"9" * 5000,
    b'{"state": "done", "seconds": 1, "message": ""}',
    b'{"state": [], "seconds": 1, "message": ""}',
    b'{"state": "pruned", "seconds": "1", "message": ""}',
    b'{"state": "pruned", "seconds": 1, "message": 2}',
])  # fmt: skip
def test_a_damaged_outcome_counts_as_none_and_is_reported_once(content, tmp_path, capsys):
    path = run_path(tmp_path, "a") / "trial.json"
    assert read_outcome(tmp_path, "a") == {}
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert [read_outcome(tmp_path, "a") for _ in range(3)] == [{}] * 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"WARNING: {path} is damaged, so the trial counts as not finished"
    outcome = {"state": "pruned", "seconds": 1, "message": "step 2"}
    write_outcome(tmp_path, "a", outcome)
    assert read_outcome(tmp_path, "a") == outcome


def test_a_pipe_in_place_of_an_outcome_is_not_read(tmp_path):
    path = run_path(tmp_path, "a") / "trial.json"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert read_outcome(tmp_path, "a") == {}


def test_workers_share_the_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    shares = [own_devices(index, 2)["CUDA_VISIBLE_DEVICES"] for index in range(2)]
    assert shares == ["4,6", "5"]
    assert own_devices(4, 5) == {"CUDA_VISIBLE_DEVICES": "5"}  # more workers than GPUs
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(launch_module, "nvidia_devices", list)
    assert own_devices(0, 2) == {}


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """Return (experiment, a function that starts a launcher in a folder)."""
    folder = tmp_path_factory.mktemp("launch")
    experiment = write_tiny(
        folder,
        f"""
        train.num_steps = {NUM_STEPS}
        cfg.eval.every_steps, cfg.eval.num_batches = 6, 2
        cfg.checkpoint.every_steps = 4
        """,
        f'def sweep():\n    return choice("train.seed", *range({NUM_TRIALS}))\n',
    )
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }

    def begin(target, *arguments, action="run") -> subprocess.Popen:
        command = [sys.executable, "-m", "nanojaxgpt", "sweep", action, f"--config={experiment}"]
        return subprocess.Popen(
            [*command, f"--dir={target}", *arguments], stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True,
        )  # fmt: skip

    return str(experiment), begin


def steps_done(folder) -> int:
    """Return how many steps all trials have logged."""
    runs = (folder / "trials").glob("*") if (folder / "trials").exists() else []
    return sum(len(read_metrics(run)) for run in runs)


def assert_each_done_once(experiment, folder, outputs) -> None:
    """Check the finished set against the plan, and that no trial or step was done twice."""
    names = [trial.name for trial in load_trials(experiment, {})]
    assert len(names) == NUM_TRIALS
    assert sorted(path.name for path in (folder / "trials").iterdir()) == sorted(names)
    finished = re.findall(r"^\d+/\d+ (\w+) finished", "".join(outputs), re.MULTILINE)
    assert len(finished) == len(set(finished))
    for name in names:
        assert read_outcome(folder, name)["state"] == "finished"
        records = read_metrics(run_path(folder, name))
        assert [r["step"] for r in records if "loss" in r] == [*range(1, NUM_STEPS + 1)]
        assert [r["step"] for r in records if "validation_loss" in r] == [6, 12]
        assert (run_path(folder, name) / "checkpoints" / str(NUM_STEPS)).is_dir()


def stop_at(folder, processes, step, index, number) -> str:
    """Send a signal to one of the processes when so many steps are done; return its output."""
    while steps_done(folder) < step and processes[index].poll() is None:
        time.sleep(0.01)
    process = processes.pop(index)
    process.send_signal(number)
    return process.communicate(timeout=300)[0]


@pytest.mark.slow
def test_two_at_once_one_killed_one_stopped_then_resumed(launch, tmp_path):
    experiment, begin = launch
    rng, total = random.Random(), NUM_TRIALS * NUM_STEPS
    moments = sorted(rng.randrange(total) for _ in range(2))
    print("moments:", moments)  # pytest shows it where the test fails
    processes = [begin(tmp_path), begin(tmp_path)]
    outputs = [stop_at(tmp_path, processes, moments[0], 0, signal.SIGKILL)]
    outputs.append(stop_at(tmp_path, processes, moments[1], 0, signal.SIGTERM))
    last = begin(tmp_path, "--workers=2", action="resume")
    outputs.append(last.communicate(timeout=300)[0])
    assert last.returncode == 0, outputs
    assert_each_done_once(experiment, tmp_path, outputs)


@pytest.mark.slow
def test_the_launcher_stops_its_workers(launch, tmp_path):
    experiment, begin = launch
    first = begin(tmp_path, "--workers=2")
    outputs = [stop_at(tmp_path, [first], 5, 0, signal.SIGTERM)]
    assert first.returncode == 75, outputs
    assert not any(is_running(tmp_path, trial.name) for trial in load_trials(experiment, {}))
    second = begin(tmp_path)
    outputs.append(second.communicate(timeout=300)[0])
    assert_each_done_once(experiment, tmp_path, outputs)


@pytest.mark.exhaustive
def test_two_launchers_one_killed_at_twenty_moments(launch, tmp_path):
    experiment, begin = launch
    rng = random.Random(0)
    for turn in range(20):
        folder, step = tmp_path / str(turn), rng.randrange(NUM_TRIALS * NUM_STEPS)
        processes = [begin(folder), begin(folder)]
        outputs = [stop_at(folder, processes, step, rng.randrange(2), signal.SIGKILL)]
        outputs.append(processes[0].communicate(timeout=300)[0])
        assert processes[0].returncode == 0, outputs
        assert_each_done_once(experiment, folder, outputs)
