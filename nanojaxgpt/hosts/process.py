"""The process itself: its allocator, the programs it compiles, and its end by a signal."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from nanojaxgpt.cpu import cpu_identity
from nanojaxgpt.errors import INTERRUPTED, PREEMPTED, Stopped

COMPILED_BYTES = 2**30  # kept at most, those used last
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Tell glibc to keep what the backend frees; call it before the backend starts.

    XLA's CPU client allocates its large buffers anew in every step, and by default glibc hands
    them back to the kernel and faults them in again: 1.4x of a small model's step. Elsewhere
    than on glibc nothing happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_ARENA_MAX, 1)  # large buffers do not fit the arenas of threads
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def keep_compiled_programs(folder: Path) -> None:
    """Have jax keep what it compiles in `folder`, for the next process; call it before its import.

    Programs are for one kind of CPU, so each has a folder of its own; jax tells its versions apart.
    Where the environment names a folder, or this one can't be made, nothing happens.
    """
    folder = folder / cpu_identity()
    with suppress(OSError):
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            folder.mkdir(parents=True, exist_ok=True)
            os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
            os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(COMPILED_BYTES)
            os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


_left_threads: list[bool] = []


def leave_threads() -> None:
    """Note that some thread does not end: `leave` will not wait for what its library does then."""
    _left_threads.append(True)


def leave(code: int) -> NoReturn:
    """End the process with this exit code; at once, where threads were left."""
    if _left_threads:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


class StopRequest:
    """Whether a signal has asked for the end."""

    def __init__(self) -> None:
        self.signal = 0
        self.deferred = False  # True: the work looks at `signal` itself, between its steps

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal; raise at once where nothing looks, or where it comes again.

        A repeated SIGHUP changes nothing: a lost session's shell and the kernel both send one.
        """
        if self.signal and number == signal.SIGHUP:
            return
        again, self.signal = self.signal, number
        if again or not self.deferred:
            raise self.stopped("stopped before the step was saved" if again else "stopped")

    def stopped(self, message: str) -> Stopped:
        """Return the exception that ends the process with the signal's exit code."""
        return Stopped(message, exit_code(self.signal))


def end_signals() -> list[signal.Signals]:
    """Return the signals that ask for the end; SIGHUP not where it is ignored, as under nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT] + ([] if ignored else [signal.SIGHUP])


def exit_code(number: int) -> int:
    """Return the exit code after a signal."""
    return INTERRUPTED if number == signal.SIGINT else PREEMPTED


def end_at_signals() -> dict[int, Any]:
    """Have the end signals end the process with their exit codes; return the handlers before.

    For as long as there is nothing to save. No exception is raised: while libraries are imported
    some swallow it or report another error, and in jaxlib it ends in a segmentation fault. Outside
    the main thread, where Python allows no handlers, nothing changes.
    """
    old = {}
    for number in end_signals():
        code = exit_code(number)
        with suppress(ValueError):
            old[number] = signal.signal(number, lambda *_, code=code: os._exit(code))
    return old


@contextmanager
def ending_at_signals() -> Iterator[None]:
    """Do as `end_at_signals` while the context lasts."""
    old = end_at_signals()
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Turn SIGTERM, SIGHUP and Ctrl-C into a StopRequest for as long as the context lasts.

    Outside the main thread, where Python allows no handlers, the request just never comes.
    """
    request, old = StopRequest(), {}
    try:
        for number in end_signals():
            old[number] = signal.signal(number, request.handle)
    except ValueError:
        pass
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
