"""Trackers get every record, a resumed run continues there, and none can hold up training."""

import importlib.util
import os
import struct
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, write_tiny

from nanojaxgpt import rundir, trackers
from nanojaxgpt.__main__ import main
from nanojaxgpt.config import sections
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.hosts import process
from nanojaxgpt.trackers import Background, check_installed, close_all, open_trackers


class Listed:
    """A tracker that keeps what it gets."""

    def __init__(self):
        self.records, self.closed = [], False

    def log(self, step, values):
        self.records.append((step, values))

    def close(self):
        self.closed = True


class Stuck(Listed):
    """A tracker that takes one record and returns from nothing until it is released."""

    def __init__(self, *_):
        super().__init__()
        self.released = threading.Event()

    def log(self, step, values):
        super().log(step, values)
        self.released.wait(60)


@pytest.fixture
def left(monkeypatch):
    """Return a list that grows by each thread that is given up."""
    left = []
    monkeypatch.setattr(process, "leave_threads", lambda: left.append(True))
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)
    return left


def test_all_records_arrive_in_order(left):
    tracker, said = Listed(), []
    background = Background("listed", lambda: tracker, said.append)
    for step in range(500):
        background.log(step, {"loss": 1.0})
    close_all([background])
    assert tracker.records == [(step, {"loss": 1.0}) for step in range(500)]
    assert tracker.closed
    assert said == left == []


def test_a_stuck_tracker_drops_records_with_one_warning(left, monkeypatch):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.05)
    tracker, said = Stuck(), []
    background = Background("stuck", lambda: tracker, said.append)
    while not tracker.records:
        background.log(1, {"loss": 1.0})
    for step in range(2, 2 + 2 * trackers.QUEUE_RECORDS):
        background.log(step, {"loss": 1.0})
    assert len(said) == 1
    assert said[0].startswith("WARNING: stuck can't keep up: records from step ")
    assert background.dropped >= trackers.QUEUE_RECORDS
    close_all([background])
    assert said[1:] == ["WARNING: stuck is still sending; not waiting for it any longer"]
    assert left == [True]
    tracker.released.set()
    background.thread.join(60)


@pytest.mark.parametrize("place", ["open", "log", "close"])
@pytest.mark.parametrize("error", [ValueError("sleep length must be non-negative"), SystemExit(0)])
def test_a_tracker_that_fails_says_so_once(place, error, left):
    def fail(*_):
        raise error

    tracker, said = Listed(), []
    if place != "open":
        setattr(tracker, place, fail)
    opened = fail if place == "open" else lambda: tracker
    background = Background("broken", opened, said.append)
    for step in range(3):
        background.log(step, {"loss": 1.0})
    close_all([background])
    background.log(4, {"loss": 1.0})
    text = f"{type(error).__name__}: {error}"
    assert said == [f"WARNING: broken stopped ({text}); training continues without it"]
    assert not left


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return an experiment of six steps."""
    return write_tiny(tmp_path_factory.mktemp("trackers"), "train.num_steps = 6")


@pytest.mark.slow
def test_training_ends_well_beside_a_stuck_tracker(tiny, left, monkeypatch, capsys):
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(trackers, "QUEUE_RECORDS", 1)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", (Stuck, "json"))
    run = tiny.parent / "run"
    names = "--config.train.trackers=('jsonl','wandb')"
    assert main(["train", f"--config={tiny}", f"--run={run}", names]) == 0
    assert rundir.saved_steps(run / "checkpoints") == [6]
    assert capsys.readouterr().out.count("WARNING: wandb can't keep up") == 1
    assert left


def test_a_missing_package_is_named_before_anything_starts(tiny, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)
    missing = ("wandb", "trackio", "tensorboardX")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *_: None if name in missing else find(name, *_)
    )
    run = tiny.parent / "none"
    for name in trackers.TRACKERS:
        arguments = ["train", f"--config={tiny}", f"--run={run}"]
        assert main([*arguments, f"--config.train.trackers=('{name}',)"]) == 2
        assert f"pip install 'nanojaxgpt[{name}]'" in capsys.readouterr().err
        assert not run.exists()
    check_installed(("jsonl",))
    with pytest.raises(ConfigError, match="needs the package wandb"):
        check_installed(("jsonl", "wandb"))


def test_names_of_trackers(tiny, monkeypatch, capsys):
    monkeypatch.setattr(process, "keep_freed_memory", lambda: None)
    assert set(sections.rules()["train.trackers"].choices) == {"jsonl", *trackers.TRACKERS}
    assert main(["train", f"--config={tiny}", "--config.train.trackers=('wanbd',)"]) == 2
    assert "train.trackers='wanbd' must be one of jsonl, tensorboard" in capsys.readouterr().err


STARTS = ((0, 5), (3, 6))  # a run that is resumed from step 3


def log_steps(name, run, starts=STARTS) -> list[str]:
    """Log steps 1 to 5, then, as a run resumed from step 3, steps 4 to 6; return what was said."""
    said = []
    for start, last in starts:
        opened = open_trackers(("jsonl", name), run, {"train": {"seed": 1}}, start, said.append)
        for step in range(start + 1, last + 1):
            for tracker in opened:
                tracker.log(step, {"loss": 10.0 * start + step})
        close_all(opened)
    return said


def test_tensorboard_reads_what_was_written_while_the_clock_goes_back(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    times = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: next(times))
    assert log_steps("tensorboard", tmp_path) == []
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    values = [(event.step, event.value) for event in found.Scalars("loss")]
    assert values == [(1, 1), (2, 2), (3, 3), (4, 34), (5, 35), (6, 36)]


def wandb_records(content):
    """Yield the records of a .wandb file of less than 32 KiB: LevelDB's log in a single block."""
    assert len(content) < 1 << 15
    place = 7  # after the header
    while place < len(content):
        _, length, kind = struct.unpack_from("<IHB", content, place)
        assert kind == 1  # a whole record
        yield content[place + 7 : place + 7 + length]
        place += 7 + length


@pytest.mark.slow
def test_a_run_of_wandb_is_continued(tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    code = "import test_trackers, pathlib, sys; print(test_trackers.log_steps('wandb', "
    for start in STARTS:  # a process cannot open a run twice
        program = f"{code}pathlib.Path('{tmp_path}'), [{start}]))"
        environment = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
        found = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment
        )
        assert found.stdout == "[]\n", found.stderr
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    names, steps, ends = set(), [], []
    for file in files:
        for data in wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            ends += [file] if record.HasField("exit") else []
            if record.run.run_id:
                names.add((record.run.project, record.run.run_id))
            if record.history.item:
                steps.append(record.history.step.num)
    assert names == {("nanojaxgpt", trackers.tracking_id(tmp_path))}
    assert ends == files
    assert sorted(steps) == [1, 2, 3, 4, 4, 5, 5, 6]


def test_a_run_of_trackio_is_continued(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # read as trackio is imported
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    run = tmp_path / "run"
    run.mkdir()
    assert log_steps("trackio", run) == []
    name = f"run-{trackers.tracking_id(run)}"
    assert SQLiteStorage.get_runs("nanojaxgpt") == [name]
    logs = SQLiteStorage.get_logs("nanojaxgpt", name)
    assert sorted(log["step"] for log in logs) == [1, 2, 3, 4, 4, 5, 5, 6]


def test_the_name_at_the_trackers_is_kept(tmp_path):
    name = trackers.tracking_id(tmp_path)
    assert trackers.tracking_id(tmp_path) == name
    for damaged in (b"\x80", b"[" * 100_000, b"[]", b"{}", b'{"id": "a/b"}', b'{"id": 3}'):
        (tmp_path / "trackers.json").write_bytes(damaged)
        name = trackers.tracking_id(tmp_path)
        assert name.isalnum()
        assert trackers.tracking_id(tmp_path) == name
