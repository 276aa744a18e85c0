"""Signals become a request that is heard in time; the allocator's settings are taken by glibc."""

import contextlib
import ctypes
import json
import os
import platform
import signal
import subprocess
import sys
import threading

import pytest
from conftest import ROOT, command, write_tiny

from nanojaxgpt.errors import INTERRUPTED, PREEMPTED, Stopped
from nanojaxgpt.hosts import process
from nanojaxgpt.hosts.process import keep_freed_memory, stop_signals

SIGNALS = [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these are glibc's settings")
def test_glibc_takes_every_setting_and_the_process_works_on():
    code = """
import ctypes
from nanojaxgpt.hosts import process
real, results = ctypes.CDLL(None).mallopt, []
class Library:
    def __init__(self, name):
        self.mallopt = lambda *setting: results.append((setting[0], real(*setting)))
process.ctypes.CDLL = Library
process.keep_freed_memory()
import numpy as np
sums = [int(np.ones(size, np.int64).sum()) for size in (1, 1000, 3_000_000)]
print(sorted(results), sums)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "[(-8, 1), (-4, 1), (-1, 1)] [1, 1000, 3000000]\n", found.stderr


def fail(name):
    raise OSError("no C library")


@pytest.mark.parametrize("library", [fail, lambda name: object()])
def test_without_glibc_nothing_happens(library, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", library)
    monkeypatch.setattr(process.ctypes, "CDLL", library)
    keep_freed_memory()
    with pytest.raises((OSError, AttributeError)):
        process.ctypes.CDLL(None).mallopt(0, 0)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_deferred_signal_is_noted_and_the_second_raises(number, code):
    with stop_signals() as stop:
        stop.deferred = True
        assert stop.signal == 0
        os.kill(os.getpid(), number)
        assert stop.signal == number
        with pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), number)
    assert caught.value.exit_code == code
    assert "before the step was saved" in str(caught.value)


@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_where_nothing_looks_the_first_signal_raises(number, code):
    with pytest.raises(Stopped) as caught, stop_signals():
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == code


def test_a_hangup_stops_like_sigterm_and_its_repetition_changes_nothing():
    """When a session drops, both the shell and the kernel send it."""
    with pytest.raises(Stopped) as caught, stop_signals():
        os.kill(os.getpid(), signal.SIGHUP)
    assert caught.value.exit_code == PREEMPTED
    with stop_signals() as stop:
        stop.deferred = True
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal == signal.SIGHUP
        with pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == PREEMPTED


@pytest.mark.parametrize("context", [stop_signals, process.ending_at_signals])
@pytest.mark.parametrize("before", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_hangup_that_is_ignored_stays_so(before, context):
    """As under nohup."""
    old = signal.signal(signal.SIGHUP, before)
    try:
        with context():
            assert (signal.getsignal(signal.SIGHUP) == before) == (before == signal.SIG_IGN)
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, old)


def test_no_handler_of_errors_keeps_a_stop():
    def read_badly():
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped), stop_signals():
        read_badly()


def test_handlers_come_back():
    def handler(number, frame):
        heard.append(number)

    heard = []
    old = signal.signal(signal.SIGTERM, handler)
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with stop_signals() as stop:
            assert signal.getsignal(signal.SIGTERM) == stop.handle
        with pytest.raises(KeyError), stop_signals():
            raise KeyError
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGINT) is interrupt
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, old)


def test_outside_the_main_thread_the_request_never_comes():
    def work():
        with stop_signals() as stop:
            found.append((stop.signal, signal.getsignal(signal.SIGTERM)))

    found, handler = [], signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(0, handler)]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_ends_the_process_while_there_is_nothing_to_save(number, code, inside):
    program = f"""
import os, signal
from nanojaxgpt.hosts.process import ending_at_signals
signal.signal({number:d}, signal.SIG_DFL)
with ending_at_signals():
    try:
        {f"os.kill(os.getpid(), {number:d})" if inside else "pass"}
    except BaseException:
        print("an exception, which a library may swallow")
os.kill(os.getpid(), {number:d})
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (code if inside else -number, ""), found.stderr


ENTRIES = {
    "python -m nanojaxgpt": ["-m", "nanojaxgpt"],
    "nanojaxgpt": ["-c", "from nanojaxgpt.start import main; main()"],
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_signals_are_answered_before_the_slow_imports(entry, number, code):
    arguments = [sys.executable, "-X", "importtime", *ENTRIES[entry], "train", "--config=none.py"]
    child = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for line in child.stderr:
        if line.endswith("absl.flags\n"):  # of ml_collections, the first slow one
            break
        assert "numpy" not in line
    os.kill(child.pid, number)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == code
    assert "Traceback" not in said


@pytest.fixture
def train_at_home(tmp_path, monkeypatch):
    """Return train(name), which trains with a cache of its own: (its output, its metrics)."""
    path = write_tiny(tmp_path, "train.num_steps = cfg.optim.warmup_steps = 2")
    for name in [name for name in os.environ if "_CACHE_" in name]:
        monkeypatch.delenv(name)

    def train(name: str, **environment: str) -> tuple[str, list]:
        home = {"XDG_CACHE_HOME": str(tmp_path / "home")} | environment
        found = command("train", f"--config={path}", f"--run={tmp_path / name}", **home)
        assert found.returncode == 0, found.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return found.stderr, [json.loads(line).get("loss") for line in lines]

    return train


@pytest.mark.slow
def test_the_next_process_finds_its_programs_compiled(train_at_home, tmp_path):
    _, losses = train_at_home("first")
    (folder,) = (tmp_path / "home" / "nanojaxgpt" / "compiled").iterdir()
    programs = {path: path.stat().st_mtime_ns for path in folder.glob("*-cache")}
    assert any("train_step" in path.name for path in programs)
    assert train_at_home("second")[1] == losses
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*-cache")} == programs
    for path in programs:  # a full disk leaves such files
        path.write_bytes(path.read_bytes()[:100])
    assert train_at_home("third")[1] == losses


@pytest.mark.slow
@pytest.mark.parametrize("home", ["/proc/none", "FOLDER"])
def test_programs_are_compiled_again_where_none_can_be_kept(train_at_home, tmp_path, home):
    given = {"XDG_CACHE_HOME": home}
    if home == "FOLDER":  # the environment's own folder goes first
        given = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    train_at_home("run", **given)
    assert not (tmp_path / "home" / "nanojaxgpt" / "compiled").exists()
