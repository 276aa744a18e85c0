"""What the processes of a run decide together; alone, every question is answered at once."""

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from nanojaxgpt.errors import UserError
from nanojaxgpt.hosts.lifeline import REPORT_SECONDS, Lifeline

Result = TypeVar("Result")
WAIT_SECONDS = 24 * 3600.0  # for work of process 0, like tokenizing; who dies is noticed at once


class Team:
    """One process that trains alone, and what `Members` answer together."""

    index, count = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is process 0, which alone decides and writes."""
        return self.index == 0

    def name(self, index: int) -> str:
        """Return how a message calls a process."""
        return f"host {index}"

    def gather(self, value: object, doing: str = "") -> list[Any]:
        """Return the values of all processes in their order; they go as JSON.

        What is waited for, and why (`doing`), is told every 30 s. Raises UserError after a day.
        """
        return [value]

    def next_stop(self, step: int, signal: int) -> int:
        """Return the signal to stop for after `step`, the same on all; 0: continue.

        `signal` is what this process was sent, 0 for nothing. A step is asked about once, in
        order.
        """
        return signal

    def decide(self, choose: Callable[[], Result], doing: str = "") -> Result:
        """Return the result of `choose`, which process 0 alone calls and sends as JSON."""
        return self.gather(choose() if self.first else None, doing)[0]

    def first_then_all(self, work: Callable[[], Result], doing: str) -> Result:
        """Return work(), done by process 0 before the others do it too."""
        if not self.first:
            self.gather(None, doing)
        result = work()
        if self.first:
            self.gather(None)
        return result

    def all_or_none(self, work: Callable[[], Result]) -> Result:
        """Return work(), which all do. Raises its error, or ValueError where it fails elsewhere."""
        try:
            result = work()
        except Exception as error:
            self.gather(str(error).strip().split("\n")[0][:300])
            raise
        for index, text in enumerate(self.gather(None)):
            if text is not None:
                raise ValueError(f"on {self.name(index)}: {text}")
        return result

    def differing(self, value: object) -> str:
        """Return the names of the hosts whose value is not that of process 0; "": all are."""
        values = self.gather(value)
        return ", ".join(self.name(i) for i, other in enumerate(values) if other != values[0])

    def bounded(self, work: Callable[[], None]) -> None:
        """Do work() that may need the others, who may be gone: then it gets five seconds."""
        work()


ALONE = Team()


class Members(Team):
    """One of several processes, which speak over a lifeline."""

    def __init__(self, line: Lifeline) -> None:
        self.line, self.index, self.count = line, line.index, line.count
        self.changed = threading.Condition()
        self.round = 0
        self.answers: dict[int, dict[int, Any]] = {}  # of each round, by process
        # The next step after which this process can still stop; what is agreed, when it is.
        self.earliest, self.stop_step, self.signal = 0, -1, 0
        self.earliest_of: dict[int, int] = {}
        line.handlers |= {
            "value": self._on_value,
            "values": self._on_values,
            "hold": self._on_hold,
            "earliest": self._on_earliest,
            "stop": self._on_stop,
        }

    def name(self, index: int) -> str:
        """See Team."""
        return self.line.host(index)

    def gather(self, value: object, doing: str = "") -> list[Any]:
        """See Team."""
        deadline, this = time.monotonic() + WAIT_SECONDS, self.round
        self.round += 1
        if self.first:
            self._on_value(0, {"round": this, "value": value})
        else:
            self.line.send("value", round=this, value=value)
        with self.changed:
            while len(self.answers.get(this, {})) < self.count:
                if not self.changed.wait(REPORT_SECONDS):
                    self._report(this, doing)
                if time.monotonic() > deadline:
                    raise UserError(f"waited {WAIT_SECONDS / 3600:.0f} hours {doing}")
            found = self.answers.pop(this)
        return [found[index] for index in range(self.count)]

    def _report(self, this: int, doing: str) -> None:
        """Say who is waited for; only process 0 knows who has answered."""
        here = self.answers.get(this, {})
        missing = [self.line.host(i) for i in range(self.count) if i not in here]
        who = ", ".join(missing) if self.first else self.line.host(0)
        print(f"waiting for {who} {doing}".rstrip(), flush=True)

    def _on_value(self, sender: int, message: dict[str, Any]) -> None:
        this = message["round"]
        with self.changed:
            got = self.answers.setdefault(this, {})
            got[sender] = message["value"]
            complete = len(got) == self.count
            self.changed.notify_all()
        if complete:
            self.line.send("values", round=this, values=[got[i] for i in range(self.count)])

    def _on_values(self, sender: int, message: dict[str, Any]) -> None:
        with self.changed:
            self.answers[message["round"]] = dict(enumerate(message["values"]))
            self.changed.notify_all()

    def next_stop(self, step: int, signal: int) -> int:
        """See Team. Costs a lock; the answers come from the threads, whatever the steps wait for.

        A process that was told to hold stands still at its next step until all have said where
        they can stop; the latest of these is where all do.
        """
        if signal and not self.signal:
            if self.first:
                self._on_hold(0, {"signal": signal})
            else:
                self.line.send("hold", signal=signal)
        with self.changed:
            while self.signal and self.stop_step < 0:
                self.changed.wait()
            self.earliest = step + 1
            return self.signal if step == self.stop_step else 0

    def _on_hold(self, sender: int, message: dict[str, Any]) -> None:
        """Hold, and say where this process can stop; process 0 passes it on."""
        with self.changed:
            if self.signal:
                return
            self.signal, earliest = message["signal"], self.earliest
        if self.first:
            self.line.send("hold", signal=self.signal)
            self._on_earliest(0, {"step": earliest})
        else:
            self.line.send("earliest", step=earliest)

    def _on_earliest(self, sender: int, message: dict[str, Any]) -> None:
        with self.changed:
            self.earliest_of[sender] = message["step"]
            complete = len(self.earliest_of) == self.count
            step = max(self.earliest_of.values())
        if complete:
            self.line.send("stop", step=step)
            self._on_stop(0, {"step": step})

    def _on_stop(self, sender: int, message: dict[str, Any]) -> None:
        with self.changed:
            self.stop_step = message["step"]
            self.changed.notify_all()

    def bounded(self, work: Callable[[], None]) -> None:
        """See Team."""
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(5)
