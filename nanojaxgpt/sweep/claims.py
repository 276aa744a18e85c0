"""A sweep's folder: which trials are done, and which process has the right to run one.

    FOLDER/trials/NAME/            a run directory; its trial.json says that and how it ended
    FOLDER/claims/NAME.GENERATION  who runs it; held by a lock, kept alive by its mtime

A claim is never deleted. Who finds the newest one dead makes the next generation, and of all
that try only one can. On the machine of its owner a claim is dead when its lock is free, from
another machine when it has not been touched for STALE_SECONDS by the file system's own clock.
"""

import fcntl
import functools
import json
import os
import platform
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from nanojaxgpt import console
from nanojaxgpt.errors import PREEMPTED, ConfigError
from nanojaxgpt.regular import read_regular
from nanojaxgpt.rundir import write_text

STATES = ("finished", "non-finite", "pruned")  # in which a trial ends
BEAT_SECONDS, STALE_SECONDS = 10.0, 120.0


def run_path(folder: Path, name: str) -> Path:
    """Return the run directory of a trial."""
    return folder / "trials" / name


def read_outcome(folder: Path, name: str) -> dict[str, Any]:
    """Return how a trial ended: state, seconds, message; nothing where it has not.

    A damaged file counts as none, with a warning, so that the trial runs again.
    """
    path = run_path(folder, name) / "trial.json"
    try:
        outcome: Any = json.loads(read_regular(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        outcome = None
    if is_outcome(outcome):
        return outcome
    warn_damaged(path)
    return {}


def is_outcome(value: Any) -> bool:
    """Return whether a value read from a trial.json is what `write_outcome` writes."""
    return (
        isinstance(value, dict)
        and value.get("state") in STATES
        and type(value.get("seconds")) in (int, float)
        and isinstance(value.get("message"), str)
    )


@functools.cache  # a sweep reads its outcomes again and again
def warn_damaged(path: Path) -> None:
    """Warn of a trial.json that can't be read, once."""
    console.warn(f"WARNING: {path} is damaged, so the trial counts as not finished")


def write_outcome(folder: Path, name: str, outcome: dict[str, Any]) -> None:
    """Write how a trial ended; its claim must be held."""
    write_text(run_path(folder, name) / "trial.json", json.dumps(outcome, indent=2) + "\n")


def machine() -> str:
    """Return the name of the running kernel, the same for all that share its locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


class Claims:
    """The claims of this process on the trials of a sweep, and the thread that keeps them alive."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "claims"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"can't write to the sweep's folder {folder}: {error}") from error
        self.held: dict[str, tuple[Path, TextIO]] = {}
        self.lock = threading.Lock()  # of `held`: a claim that is given up is not taken over
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.beat, daemon=True)

    def __enter__(self) -> "Claims":
        self.thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        for name in list(self.held):
            self.release(name)

    def take(self, name: str) -> bool:
        """Return whether the trial is this process's own from now on."""
        newest = newest_claim(self.folder, name)
        if newest and is_alive(newest):
            return False
        path = self.folder / f"{name}.{generation(newest) + 1 if newest else 1}"
        draft = self.folder / f".{name}.{machine()}.{os.getpid()}"
        file = open(draft, "w")  # noqa: SIM115
        # Locked and written before it is renamed: nobody ever sees a claim that looks dead.
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(machine())
        file.flush()
        try:
            os.link(draft, path)
        except FileExistsError:
            file.close()
            return False
        finally:
            draft.unlink()
        self.held[name] = path, file
        return True

    def release(self, name: str) -> None:
        """Give a claim up, whether or not its trial is done."""
        with self.lock:
            path, file = self.held.pop(name)
        os.utime(path, (0, 0))
        file.close()

    def beat(self) -> None:
        """Touch the claims held; end the process if another took one over."""
        while not self.ended.wait(BEAT_SECONDS):
            for name in list(self.held):
                with self.lock:
                    path, _ = self.held.get(name, (None, None))
                    if path and newest_claim(self.folder, name) != path:
                        print(
                            f"error: {name} was taken over by another process while this one "
                            "was suspended; start it again",
                            file=sys.stderr,
                            flush=True,
                        )
                        os._exit(PREEMPTED)  # at once: two processes must not write to one run
                    if path:
                        os.utime(path)


def generation(claim: Path) -> int:
    """Return the number at the end of a claim's name."""
    return int(claim.suffix[1:])


def newest_claim(folder: Path, name: str) -> Path | None:
    """Return the claim of the highest generation."""
    return max(folder.glob(f"{name}.*"), key=generation, default=None)


def is_alive(claim: Path) -> bool:
    """Return whether the owner of a claim still runs."""
    with open(claim, "r+") as file:  # NFS locks only what can be written
        if file.read() == machine():
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return False
            return True
    clock = claim.with_name(f".clock.{machine()}.{os.getpid()}")
    clock.touch()  # machines disagree about the time; the file system that they share does not
    now = clock.stat().st_mtime
    clock.unlink()
    return now - claim.stat().st_mtime < STALE_SECONDS


def is_running(folder: Path, name: str) -> bool:
    """Return whether a process runs the trial now."""
    newest = newest_claim(folder / "claims", name)
    return bool(newest and is_alive(newest))
