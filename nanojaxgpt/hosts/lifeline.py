"""One TCP connection from every process to process 0: values go round, and an end is heard by all.

It stands before jax.distributed does, whose own errors abort the process where nothing can say
which host was the cause, and it needs no collective: it speaks while the devices are stuck.
"""

import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from nanojaxgpt.errors import INTERNAL, OK, ConfigError

PORT_OFFSET = -100  # from jax's coordinator; SLURM jobs next to each other have ports so too
BEAT_SECONDS = 1.0
SILENCE_SECONDS = 10.0  # after which a host counts as gone
GRACE_SECONDS = 8.0  # to leave by oneself when another host has said why it leaves
REPORT_SECONDS = 30.0


class Lifeline:
    """The connections of one process: to all others from process 0, to process 0 from the others.

    `handlers` maps a kind of message to what the thread does with it, as (sender, message).
    """

    def __init__(
        self, index: int, count: int, links: dict[int, socket.socket], names: list[str]
    ) -> None:
        self.index, self.count, self.names = index, count, names
        self.links = links
        self.handlers: dict[str, Callable[[int, dict[str, Any]], None]] = {"end": self._on_end}
        self.ended: tuple[int, str] | None = None  # exit code and text of the first host to leave
        self.closing = False
        self.stood_still = 0.0  # seconds in which this process itself was stopped, if too many
        self.sending = threading.Lock()
        self.heard = dict.fromkeys(links, time.monotonic())
        self.buffers = dict.fromkeys(links, b"")
        self.thread = threading.Thread(target=self._listen, daemon=True, name="lifeline")

    def start(self) -> None:
        """Begin to listen and to give signs of life."""
        self.thread.start()

    def host(self, index: int) -> str:
        """Return how a message calls a process."""
        return f"host {index} ({self.names[index]})"

    def send(self, kind: str, **content: Any) -> None:
        """Send a message to process 0, or from process 0 to all others."""
        line = json.dumps({"kind": kind, **content}).encode() + b"\n"
        with self.sending:
            for link in list(self.links.values()):
                try:
                    link.sendall(line)
                except OSError:
                    continue  # the thread notices why

    def leave(self, code: int, text: str) -> None:
        """Tell the others that this process ends, and why; process 0 waits until they are gone."""
        self.ended = self.ended or (code, text)  # process 0 sends it back to this one, too
        self.send("end", index=self.index, code=code, text=text)
        self._outlast_the_others()

    def _outlast_the_others(self) -> None:
        """Keep process 0 alive a while: when jax's coordinator dies, all that use it abort."""
        self.closing = True
        deadline = time.monotonic() + GRACE_SECONDS + 2
        while self.index == 0 and self.links and time.monotonic() < deadline:
            time.sleep(0.05)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for index, link in self.links.items():
                selector.register(link, selectors.EVENT_READ, index)
            next_beat = 0.0
            while self.links:
                if time.monotonic() >= next_beat:
                    self.send("beat")
                    next_beat = time.monotonic() + BEAT_SECONDS
                began = time.monotonic()
                ready = selector.select(BEAT_SECONDS / 2)
                pause = time.monotonic() - began
                if pause > SILENCE_SECONDS / 2:  # the others counted from the beat before it
                    self.stood_still = pause
                for key, _ in ready:
                    if not self._receive(key.data):
                        selector.unregister(key.fileobj)
                        self._drop(key.data, "is gone: killed, or its machine is down")
                for index in [i for i in self.links if self._silent(i)]:
                    selector.unregister(self.links[index])
                    self._drop(index, f"sent no heartbeat for {SILENCE_SECONDS:.0f} s")

    def _silent(self, index: int) -> bool:
        return time.monotonic() - self.heard[index] > SILENCE_SECONDS

    def _receive(self, index: int) -> bool:
        """Handle what has come from a process; False where its connection is closed."""
        try:
            data = self.links[index].recv(1 << 16)
        except OSError:
            data = b""
        self.heard[index] = time.monotonic()
        *lines, self.buffers[index] = (self.buffers[index] + data).split(b"\n")
        for message in map(json.loads, lines):
            if message["kind"] in self.handlers:
                self.handlers[message["kind"]](index, message)
        return bool(data)

    def _drop(self, index: int, what: str) -> None:
        self.links.pop(index).close()
        if self.stood_still:
            index, what = self.index, f"was suspended for {self.stood_still:.0f} s, and others left"
        if not self.closing and self.ended is None:
            self._on_end(index, {"index": index, "code": INTERNAL, "text": what})

    def _on_end(self, sender: int, message: dict[str, Any]) -> None:
        """Say which host ended, pass it on, and end this process too."""
        if self.ended is not None:
            return
        index, code, text = message["index"], message["code"], message["text"]
        self.ended = code, text
        if self.index == 0:
            self.send("end", index=index, code=code, text=text)
        if code != OK:
            threading.Thread(target=self._follow, args=(index, code, text), daemon=True).start()

    def _follow(self, index: int, code: int, text: str) -> None:
        """End this process because another did; what all raise alike it may first raise itself."""
        if code != INTERNAL:
            time.sleep(GRACE_SECONDS)
        print(f"{self.host(index)} {text}", file=sys.stderr, flush=True)
        self._outlast_the_others()
        os._exit(code)


def connect(index: int, count: int, coordinator: str, seconds: float) -> Lifeline:
    """Return the lifeline of process `index` of `count`, when all have come.

    `coordinator` is jax's HOST:PORT; this listens at PORT - 100. Raises ConfigError with the
    processes that did not come within `seconds`.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 1024 < int(port) + PORT_OFFSET < 65536:
        raise ConfigError(f"--coordinator={coordinator} is not HOST:PORT with a port above 1124")
    address = host.strip("[]"), int(port) + PORT_OFFSET
    deadline = time.monotonic() + seconds
    meet = _welcome if index == 0 else _join
    links, names = meet(index, count, address, deadline, seconds)
    for link in links.values():
        link.settimeout(SILENCE_SECONDS)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Lifeline(index, count, links, names)


def _welcome(
    index: int, count: int, address: tuple[str, int], deadline: float, seconds: float
) -> tuple[dict[int, socket.socket], list[str]]:
    """Wait for all others, as process 0; tell all of them who came, or the problem."""
    try:
        server = socket.create_server(("", address[1]), backlog=count)
    except OSError as error:
        text = f"process 0 can't listen at port {address[1]}: {error.strerror}"
        raise ConfigError(text) from None
    links, names, problem = {}, {0: socket.gethostname()}, ""
    with server:
        while len(names) < count and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                link, _ = server.accept()
                link.settimeout(SILENCE_SECONDS)
                hello = json.loads(_read_line(link))
                number, told, name = int(hello["index"]), int(hello["count"]), str(hello["name"])
            except TimeoutError:
                if time.monotonic() >= deadline:
                    missing = ", ".join(str(i) for i in range(count) if i not in names)
                    problem = f"no answer from process {missing} of {count} in {seconds:.0f} s"
                continue
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not one of our processes
            if told != count:
                problem = f"{name} was started as one of {told}, not {count}"
            elif number in names:
                problem = f"two processes have --process_id={number}: {names[number]}, {name}"
            names.setdefault(number, name)
            links[number if number not in links else -1] = link  # a double is only answered
    reply = {"problem": problem, "names": [names[i] for i in sorted(names)]}
    for link in links.values():
        link.sendall(json.dumps(reply).encode() + b"\n")
    if problem:
        raise ConfigError(problem)
    return links, reply["names"]


def _join(
    index: int, count: int, address: tuple[str, int], deadline: float, seconds: float
) -> tuple[dict[int, socket.socket], list[str]]:
    """Find process 0 and wait for its answer."""
    place = f"process 0 at {address[0]}:{address[1]}"
    hello = {"index": index, "count": count, "name": socket.gethostname()}
    while True:
        try:
            link = socket.create_connection(address, timeout=1.0)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(f"no answer from {place} in {seconds:.0f} s ({error})") from None
            time.sleep(0.2)
    # Process 0 names whoever is missing: give it the time to.
    link.settimeout(max(deadline - time.monotonic(), 0) + SILENCE_SECONDS)
    try:
        link.sendall(json.dumps(hello).encode() + b"\n")
        reply = json.loads(_read_line(link))
    except (OSError, ValueError):
        raise ConfigError(
            f"{place} closed the connection before all processes had joined"
        ) from None
    if reply["problem"]:
        raise ConfigError(reply["problem"])
    return {0: link}, reply["names"]


def _read_line(link: socket.socket) -> bytes:
    """Return the bytes up to the line's end, read one by one: the rest is for the thread."""
    line = b""
    while not line.endswith(b"\n"):
        byte = link.recv(1)
        if not byte:
            raise ConnectionResetError
        line += byte
        if len(line) > 1 << 20:
            raise ValueError("no line")
    return line
