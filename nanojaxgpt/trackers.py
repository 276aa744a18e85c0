"""Trackers that show a run elsewhere: TensorBoard, Weights & Biases, trackio.

Each is served by a thread of its own from a queue that drops what it can't keep up with: none can
stop or slow the training. The record that resuming reads is metrics.jsonl, not these.
"""

import importlib.util
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from nanojaxgpt import rundir
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.hosts import process
from nanojaxgpt.regular import read_regular

QUEUE_RECORDS = 1000
CLOSE_SECONDS = 30.0  # for all trackers together, to send what they still hold
PROJECT = "nanojaxgpt"

Report = Callable[[str], None]


class Start(NamedTuple):
    """What a tracker is opened with: records up to `step` are there from an earlier start."""

    run: Path
    config: dict[str, Any]
    step: int
    id: str  # names the run at the tracker, the same at every start


class Tracker(Protocol):
    """Where records go."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take one record."""

    def close(self) -> None:
        """Send what is left."""


class TensorBoard:
    """Event files in RUN/tensorboard; TensorBoard hides what a resumed run does again."""

    def __init__(self, start: Start) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore
        from tensorboardX.proto.summary_pb2 import Summary  # type: ignore

        self.event, self.summary = Event, Summary
        folder = start.run / "tensorboard"
        folder.mkdir(exist_ok=True)
        # Written here, not by SummaryWriter, whose thread ends when the clock is set back. The
        # files are read in the order of their names, which begin with the time but for this number.
        number = sum(1 for _ in folder.iterdir())
        self.writer = EventsWriter(str(folder / f"events.start{number:05}"))
        began = SessionLog(status=SessionLog.START)
        self._write(step=start.step + 1, session_log=began)

    def _write(self, **content: Any) -> None:
        self.writer.write_event(self.event(wall_time=time.time(), **content))
        self.writer.flush()

    def log(self, step: int, values: dict[str, float]) -> None:
        """See Tracker."""
        scalars = [self.summary.Value(tag=name, simple_value=v) for name, v in values.items()]
        self._write(step=step, summary=self.summary(value=scalars))

    def close(self) -> None:
        """See Tracker."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, which a later start of the same run directory continues."""

    def __init__(self, start: Start) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("not logged in: run wandb login, or set WANDB_MODE=offline")
        self.tracked = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=start.id,
            name=os.environ.get("WANDB_NAME", start.run.name),
            dir=str(start.run),
            config=start.config,
            resume="allow",
            reinit="create_new",  # trials of a sweep may be open side by side
            settings=wandb.Settings(console="off", quiet=True, init_timeout=CLOSE_SECONDS),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """See Tracker."""
        self.tracked.log(values, step=step)

    def close(self) -> None:
        """See Tracker."""
        self.tracked.finish()


class Trackio:
    """A run of trackio, which a later start of the same run directory continues."""

    def __init__(self, start: Start) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self.tracked = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{start.run.name}-{start.id}",
            config=start.config,
            resume="allow",
            embed=False,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """See Tracker."""
        self.tracked.log(values, step=step)

    def close(self) -> None:
        """See Tracker."""
        self.tracked.finish()


# By the names in train.trackers: what opens it, and the package that it needs. The extra of
# setup.cfg is called as the tracker is. "jsonl" stands for metrics.jsonl, which is always written.
TRACKERS: dict[str, tuple[Callable[[Start], Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"),
    "wandb": (Wandb, "wandb"),
    "trackio": (Trackio, "trackio"),
}


def check_installed(names: Sequence[str]) -> None:
    """Raise ConfigError where a tracker's package is missing; nothing is imported."""
    for name in names:
        if name in TRACKERS and importlib.util.find_spec(TRACKERS[name][1]) is None:
            raise ConfigError(
                f"train.trackers={tuple(names)!r}: {name} needs the package {TRACKERS[name][1]}; "
                f"install it with pip install 'nanojaxgpt[{name}]', or leave {name} out"
            )


def open_trackers(
    names: Sequence[str], run: Path, config: dict[str, Any], step: int, report: Report
) -> list["Background"]:
    """Return the trackers of a run, which is at `step`; they are opened by their threads."""
    chosen = [name for name in dict.fromkeys(names) if name in TRACKERS]
    if not chosen:
        return []
    start = Start(Path(run), config, step, tracking_id(Path(run)))
    return [Background(name, lambda n=name: TRACKERS[n][0](start), report) for name in chosen]


def tracking_id(run: Path) -> str:
    """Return the name of this run at its trackers, made and kept in trackers.json if new."""
    path = run / "trackers.json"
    try:
        found = json.loads(read_regular(path))["id"]
        if isinstance(found, str) and found.isalnum():
            return found
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # new, or damaged: then the trackers show another run
    new = secrets.token_hex(4)
    rundir.write_text(path, json.dumps({"id": new}) + "\n")
    return new


class Background:
    """A tracker that is opened and served by a thread, so that nothing waits for it."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], report: Report) -> None:
        self.name, self.report = name, report
        self.queue: queue.Queue[tuple[int, dict[str, float]]] = queue.Queue(QUEUE_RECORDS)
        self.closing, self.dropped, self.dead = threading.Event(), 0, False
        work = (open_tracker,)
        self.thread = threading.Thread(target=self._serve, args=work, daemon=True, name=name)
        self.thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Hand over a record; it is dropped, with one warning, where the tracker is too slow."""
        if self.dead:
            return
        try:
            self.queue.put_nowait((step, values))
        except queue.Full:
            if not self.dropped:
                self.report(
                    f"WARNING: {self.name} can't keep up: records from step {step} on are "
                    "dropped there; metrics.jsonl has them all"
                )
            self.dropped += 1

    def close(self, deadline: float) -> None:
        """Wait for what is left until `deadline`, of time.monotonic; what is late is given up."""
        self.closing.set()
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            process.leave_threads()
            self.report(f"WARNING: {self.name} is still sending; not waiting for it any longer")

    def _serve(self, open_tracker: Callable[[], Tracker]) -> None:
        try:
            tracker = open_tracker()
            while not (self.closing.is_set() and self.queue.empty()):
                try:
                    tracker.log(*self.queue.get(timeout=0.1))
                except queue.Empty:
                    continue
            tracker.close()
        except BaseException as error:  # whatever it is: the training does not depend on it
            self.dead = True
            text = str(error).strip().split("\n")[0][:300]
            self.report(
                f"WARNING: {self.name} stopped ({type(error).__name__}: {text}); training "
                "continues without it"
            )


def close_all(trackers: Sequence[Background]) -> None:
    """Close the trackers side by side, in at most CLOSE_SECONDS."""
    deadline = time.monotonic() + CLOSE_SECONDS
    for tracker in trackers:
        tracker.closing.set()
    for tracker in trackers:
        tracker.close(deadline)
