"""Processes meet, agree and end together over the lifeline; a process that hangs says where."""

import contextlib
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref

import pytest
from conftest import ROOT, command

from nanojaxgpt.config import base_config, override_config
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.hosts import joining, lifeline
from nanojaxgpt.hosts.garbage import collected_every
from nanojaxgpt.hosts.joining import place, preflight
from nanojaxgpt.hosts.lifeline import PORT_OFFSET, connect
from nanojaxgpt.hosts.team import ALONE, Members
from nanojaxgpt.hosts.watchdog import Watchdog


def free_address() -> str:
    """Return HOST:PORT for a coordinator whose lifeline's port is free too."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                other.bind(("127.0.0.1", port + PORT_OFFSET))
                return f"127.0.0.1:{port}"


def in_threads(count, work):
    """Return what work(index) gives or raises for each process, each in a thread of its own."""
    found = [None] * count

    def call(index):
        try:
            found[index] = work(index)
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def teams(count):
    """Return the members of a team, whose ends nobody minds."""
    address = free_address()
    members = [Members(line) for line in in_threads(count, lambda i: connect(i, count, address, 9))]
    for member in members:
        member.line.closing = True
        member.line.start()
    return members


@pytest.fixture
def three():
    """Return a team of three."""
    return teams(3)


def test_alone_every_question_is_answered_at_once():
    assert (ALONE.first, ALONE.count) == (True, 1)
    assert ALONE.gather(5) == [5]
    assert ALONE.decide(lambda: "it") == "it"
    assert ALONE.first_then_all(lambda: 3, "to count") == 3
    assert (ALONE.next_stop(7, 0), ALONE.next_stop(8, 15)) == (0, 15)
    with pytest.raises(KeyError):
        ALONE.all_or_none(lambda: {}["missing"])


def test_values_go_round_in_order(three):
    def work(index):
        team = three[index]
        time.sleep(random.Random(index).uniform(0, 0.05))
        return [team.gather({"me": index, "round": r}) for r in range(5)]

    expected = [[{"me": i, "round": r} for i in range(3)] for r in range(5)]
    assert in_threads(3, work) == [expected] * 3


def test_process_0_alone_decides_and_works_first(three):
    called = []

    def work(index):
        chosen = three[index].decide(lambda: called.append(index) or 10 + index)
        order.append(three[index].first_then_all(lambda: called.append(index) or index, "to work"))
        return chosen

    order = []
    assert in_threads(3, work) == [10] * 3
    assert called[:2] == [0, 0]
    assert sorted(called[2:]) == [1, 2]
    assert sorted(order) == [0, 1, 2]


def test_what_fails_on_one_host_fails_on_all(three):
    def work(index):
        return three[index].all_or_none(lambda: [1, 0, 1][index] / [1, 0, 1][index])

    one, other, third = in_threads(3, work)
    assert isinstance(other, ZeroDivisionError)
    for error in (one, third):
        assert isinstance(error, ValueError)
        assert f"on host 1 ({socket.gethostname()}): division by zero" in str(error)
    assert in_threads(3, lambda i: three[i].all_or_none(lambda: i)) == [0, 1, 2]


def test_who_differs_from_process_0_is_named(three):
    assert in_threads(3, lambda i: three[i].differing({"a": 1})) == [""] * 3
    assert (
        in_threads(3, lambda i: three[i].differing({"a": i}))
        == [f"host 1 ({socket.gethostname()}), host 2 ({socket.gethostname()})"] * 3
    )
    assert ALONE.differing(1) == ""


@pytest.mark.parametrize("seed", range(8))
def test_all_stop_after_the_same_step(seed, three):
    chance = random.Random(seed)
    asked = {chance.randrange(3): chance.randrange(30) for _ in range(1 + seed % 2)}
    meeting = threading.Barrier(3)  # as the gradients' sum is, in each step

    def work(index):
        pace = random.Random(index + 10 * seed)
        for step in range(1, 60):
            meeting.wait(20)
            time.sleep(pace.uniform(0.01, 0.02))  # a word may be slow on a busy machine
            signal_seen = 15 if step >= asked.get(index, 99) else 0
            if stop := three[index].next_stop(step, signal_seen):
                return step, stop
        return None

    found = in_threads(3, work)
    assert len(set(found)) == 1
    step, number = found[0]
    assert number == 15
    assert min(asked.values()) <= step <= min(asked.values()) + 10


@pytest.mark.parametrize(
    ("starts", "words"),
    [
        ([(0, 3), (1, 3)], "no answer from process 2 of 3 in 1 s"),
        ([(0, 3)], "no answer from process 1, 2 of 3 in 1 s"),
        ([(1, 3)], "no answer from process 0 at 127.0.0.1:"),
        ([(0, 3), (1, 3), (1, 3)], "two processes have --process_id=1"),
        ([(0, 3), (1, 4), (2, 3)], "was started as one of 4, not 3"),
    ],
)
def test_who_is_missing_or_wrong_is_named_to_all(starts, words):
    address = free_address()
    found = in_threads(len(starts), lambda i: connect(*starts[i], address, 1))
    told = [str(error) for error in found if isinstance(error, ConfigError)]
    assert len(told) == len(found)
    assert any(words in text for text in told)
    assert len(starts) < 3 or any(words in t for t in told[1:])


@pytest.mark.parametrize("address", ["host", "host:", ":8000", "host:x", "host:80", "host:99999"])
def test_an_address_that_is_none(address):
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        connect(0, 2, address, 1)


def test_strangers_at_the_port_are_sent_away():
    address = free_address()
    port = int(address.split(":")[1]) + PORT_OFFSET

    def work(index):
        if index < 2:
            return connect(index, 2, address, 9)
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b"[]\n", b'{"index": 1}\n', b""):
            for _ in range(50):
                with contextlib.suppress(ConnectionRefusedError):
                    with socket.create_connection(("127.0.0.1", port)) as link:
                        link.sendall(text)
                    break
                time.sleep(0.02)
        return None

    lines = in_threads(3, work)
    assert [line.count for line in lines[:2]] == [2, 2]


def test_flags_come_before_the_environment(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:5000")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1")
    assert place("", -1, -1, 1) == ("a:5000", 4, 3, [0, 1])
    assert place("b:6000", 2, 0, 1) == ("b:6000", 2, 0, [0, 1])
    with pytest.raises(ConfigError, match="process_id=3"):
        place("", 2, -1, 1)
    monkeypatch.setenv("JAX_PROCESS_ID", "three")
    with pytest.raises(ConfigError, match="three"):
        place("", -1, -1, 1)
    monkeypatch.delenv("JAX_PROCESS_ID")
    with pytest.raises(ConfigError, match="--process_id"):
        place("", -1, -1, 1)


def test_flags_without_multihost_are_refused():
    found = command("train", "--config=experiments/quickstart.py", "--num_processes=2")
    assert found.returncode == 2
    assert "need --multihost" in found.stderr


def check_together(three, tmp_path, monkeypatch, facts=lambda index: {}, runs=None):
    """Return what preflight raises on each host, whose facts and run directories may differ."""
    own, real = threading.local(), joining.facts

    def work(index):
        own.index = index
        seed = {"train.seed": "1"} if index == 2 and facts(2) else {}
        run = runs[index] if runs else tmp_path / "run"
        preflight(three[index], override_config(base_config(), seed), run)

    with monkeypatch.context() as patch:
        patch.setattr(joining, "facts", lambda cfg: real(cfg) | facts(own.index))
        patch.setattr(joining, "SEEN_SECONDS", 0.3)
        return in_threads(3, work)


def test_hosts_that_fit_together(three, tmp_path, monkeypatch):
    assert check_together(three, tmp_path, monkeypatch) == [None] * 3
    assert list((tmp_path / "run").iterdir()) == []


def test_every_difference_is_named_with_its_host(three, tmp_path, monkeypatch):
    others = [{}, {"package jax": "0.1", "devices of a process": 4}, {"the code's hash": "x"}]
    found = check_together(three, tmp_path, monkeypatch, lambda index: others[index])
    assert len(set(map(str, found))) == 1
    assert all(isinstance(error, ConfigError) for error in found)
    lines = str(found[0]).split("\n")[1:]
    name = socket.gethostname()
    assert any(line.startswith(f"  host 1 ({name}): package jax is 0.1, but") for line in lines)
    assert f"  host 1 ({name}): devices of a process is 4, but 8 on host 0" in lines
    assert f"  host 2 ({name}): train.seed is 1, but 0 on host 0" in lines
    assert any("host 2" in line and "the code's hash is x" in line for line in lines)
    assert len(lines) == 4


def test_a_run_directory_that_is_not_shared(three, tmp_path, monkeypatch):
    runs = [tmp_path / "a", tmp_path / "a", tmp_path / "b"]
    found = check_together(three, tmp_path, monkeypatch, runs=runs)
    assert "host 2" in str(found[0])
    assert "must be on a shared file system" in str(found[0])
    assert "host 1" not in str(found[0])
    (tmp_path / "file").write_text("")
    runs = [tmp_path / "a", tmp_path / "file" / "b", tmp_path / "a"]
    found = check_together(three, tmp_path, monkeypatch, runs=runs)
    assert "can't write to" in str(found[2])


def test_a_full_disk(three, tmp_path, monkeypatch):
    monkeypatch.setattr(joining, "MIN_FREE_BYTES", 1 << 62)
    assert "MiB are free" in str(check_together(three, tmp_path, monkeypatch)[1])


MEMBER = """
import sys, time
from nanojaxgpt.__main__ import explain
from nanojaxgpt.errors import DataError
from nanojaxgpt.hosts.joining import end
from nanojaxgpt.hosts.lifeline import connect
from nanojaxgpt.hosts.team import Members
index, address, fault = int(sys.argv[1]), *sys.argv[2:]
line = connect(index, 3, address, 20)
team = Members(line)
line.start()
team.gather(None)
print("met", flush=True)
try:
    if fault == "user" or fault == "error" and index == 1:
        raise DataError("no corpus") if fault == "user" else KeyError("a bug")
    time.sleep(60)
except Exception as error:
    end(line, error, explain)
"""


@pytest.fixture
def start_three():
    """Return a function that starts three processes on a lifeline, and waits until they met."""
    started = []

    def begin(fault):
        address = free_address()
        for index in range(3):
            started.append(
                subprocess.Popen(
                    [sys.executable, "-c", MEMBER, str(index), address, fault],
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                    env=os.environ | {"PYTHONPATH": str(ROOT)},
                )
            )  # fmt: skip
        for process in started:
            assert process.stdout.readline() == "met\n"
        return started

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def ends(processes) -> list[tuple[int, str]]:
    """Return exit code and last line of each, at the latest after 30 s."""
    found = []
    for process in processes:
        errors = process.communicate(timeout=30)[1]
        found.append((process.returncode, (errors.strip().split("\n") or [""])[-1]))
    return found


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_process_is_named_and_ends_all(number, start_three):
    processes = start_three("none")
    processes[number].kill()
    found = ends(processes)
    name = socket.gethostname()
    for index, (code, line) in enumerate(found):
        if index == number:
            assert code == -signal.SIGKILL
        else:
            assert (code, line) == (70, f"host {number} ({name}) is gone: killed, "
                                        "or its machine is down")  # fmt: skip


@pytest.mark.slow
def test_an_exception_on_one_host_ends_all_with_its_traceback_there(start_three):
    found = ends(start_three("error"))
    assert found[1] == (70, "KeyError: 'a bug'")
    for code, line in (found[0], found[2]):
        assert code == 70
        assert line.startswith("host 1 (")
        assert line.endswith("ended with exit code 70: KeyError: 'a bug'")


def test_what_all_raise_each_says_by_itself(start_three):
    assert ends(start_three("user")) == [(3, "error: no corpus")] * 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 0])
def test_a_silent_process_is_named(number, start_three):
    processes = start_three("none")
    stopped = processes.pop(number)
    stopped.send_signal(signal.SIGSTOP)
    for code, line in ends(processes):
        assert code == 70
        assert line.startswith(f"host {number} (")
        assert line.endswith(f"{lifeline.SILENCE_SECONDS:.0f} s")
    stopped.send_signal(signal.SIGCONT)
    ((code, line),) = ends([stopped])
    assert code == 70
    assert line.startswith(f"host {number} (")  # it blames itself, not those who left


def test_watchdog_bites_only_where_nothing_moves():
    bitten = []
    dog = Watchdog(0.2, bitten.append)
    for item in dog.each(range(6)):
        time.sleep(0.1)
        assert item < 6
    assert not bitten
    assert dog.patience() >= 10 * 0.1  # ten median steps, which is longer than the timeout
    dog.took.clear()
    deadline = time.monotonic() + 20
    while not bitten and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "no step ended in" in bitten[0]


def test_watchdog_waits_longer_for_the_first_step_and_can_be_off():
    first = Watchdog(2.0, print)
    assert first.patience() == 20
    first.close()  # else it prints into a later test
    off = Watchdog(0.0, print)
    assert off.timeout == 0
    assert "watchdog" not in {thread.name for thread in threading.enumerate() if thread is off}
    dog = Watchdog(0.05, print)
    dog.close()
    assert dog.stopped.is_set()


def test_a_hung_process_writes_its_stacks_and_exits_70():
    code = (
        "import time\nfrom nanojaxgpt.hosts.watchdog import Watchdog\n"
        "def stuck_here():\n    time.sleep(60)\n"
        "dog = Watchdog(0.1)\ndog.beat()\nstuck_here()\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, cwd=ROOT
    )
    assert found.returncode == 70
    assert "in stuck_here" in found.stderr
    assert "no step ended in" in found.stderr.strip().split("\n")[-1]


class Cycle:
    """What only a collection of garbage frees."""

    def __init__(self):
        self.own = self


@pytest.mark.slow
def test_garbage_is_collected_at_set_steps_and_never_lives_longer():
    alive, counts = weakref.WeakSet(), []
    with collected_every(10) as collect:
        for step in range(1, 101):
            alive.add(Cycle())
            [[] for _ in range(5000)]  # Python's own collector would run within each step
            collect(step)
            counts.append(len(alive))
            assert not gc.isenabled()
            assert gc.get_freeze_count() > 10_000
    assert counts[0] == 0  # warm-up ends with a collection
    assert counts[1:20] == [*range(1, 9), 0, *range(1, 10), 0]
    assert max(counts) == 9
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


@pytest.mark.parametrize("automatic", [True, False])
def test_the_collector_is_as_before_after_an_error(automatic):
    (gc.enable if automatic else gc.disable)()
    try:
        with contextlib.suppress(KeyboardInterrupt), collected_every(3) as collect:
            collect(1)
            raise KeyboardInterrupt
        assert (gc.isenabled(), gc.get_freeze_count()) == (automatic, 0)
        gc.freeze()  # by somebody else: it stays so
        with collected_every(3) as collect:
            collect(1)
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
        gc.enable()


def test_without_set_steps_the_collector_is_left_alone():
    with collected_every(0) as collect:
        for step in range(1, 5):
            collect(step)
            assert gc.isenabled()
            assert not gc.get_freeze_count()
