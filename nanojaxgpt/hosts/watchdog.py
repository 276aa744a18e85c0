"""A thread that ends a process which no longer gets on, after writing where it stands."""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from nanojaxgpt.errors import INTERNAL

Item = TypeVar("Item")
SLACK = 10  # median steps without an end; and timeouts for the first step, which compiles


def end_process(text: str) -> None:
    """Write the stacks of all threads and end the process with exit code 70."""
    try:
        sys.stdout.flush()
        faulthandler.dump_traceback(all_threads=True)
        print(text, file=sys.stderr, flush=True)
    finally:  # even where nothing can be written
        os._exit(INTERNAL)


class Watchdog:
    """Ends the process when a step takes longer than 10 median ones and than `timeout_seconds`.

    The first step may take ten timeouts. 0 turns it off. Time in which the whole process was
    stopped (Ctrl-Z, a closed laptop) does not count.
    """

    def __init__(self, timeout_seconds: float, leave: Callable[[str], None] = end_process) -> None:
        self.timeout, self.leave = timeout_seconds, leave
        self.took: deque[float] = deque(maxlen=100)
        self.last = 0.0  # when the last step ended; 0: none has yet
        self.idle = 0.0  # seconds since then, as this thread saw them pass
        self.stopped = threading.Event()
        if timeout_seconds:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self) -> None:
        """Note that a step ended."""
        now = time.monotonic()
        if self.last:
            self.took.append(now - self.last)
        self.last, self.idle = now, 0.0

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and note each time that the work on one ended."""
        for item in items:
            yield item
            self.beat()

    def close(self) -> None:
        """Stop watching."""
        self.stopped.set()

    def patience(self) -> float:
        """Return the seconds that a step may take now."""
        if not self.last:
            return SLACK * self.timeout
        median = statistics.median(list(self.took) or [0.0])
        return max(SLACK * median, self.timeout)

    def _watch(self) -> None:
        tick = min(1.0, self.timeout / 4)
        before = time.monotonic()
        while not self.stopped.wait(tick):
            now = time.monotonic()
            self.idle += min(now - before, 2 * tick)
            before = now
            if self.idle > self.patience():
                self.leave(f"no step ended in {self.idle:.0f} s: see the stacks above")
                return
