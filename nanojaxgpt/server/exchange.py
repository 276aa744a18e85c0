"""One HTTP request's share of the engine: it is submitted, awaited, and given up as a whole."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Sequence

from starlette.types import Receive

from nanojaxgpt.errors import ConfigError
from nanojaxgpt.generate.answers import Ticket
from nanojaxgpt.generate.engine import Engine
from nanojaxgpt.generate.requests import EngineFailed, Part, QueueFull, Request
from nanojaxgpt.server.refusals import Refusal

FIELDS = frozenset(field.name for field in dataclasses.fields(Request))
RETRY_SECONDS = 1  # after which a refused request may find a place


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class Exchange:
    """The requests of one HTTP request, which end together.

    `parts` gives what becomes final. However it is left, `close` frees what the requests hold.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], seconds: float) -> None:
        self.engine, self.requests, self.seconds = engine, requests, seconds
        self.loop = asyncio.get_running_loop()
        self.arrived: asyncio.Queue[tuple[int, Part] | Exception] = asyncio.Queue()
        self.tickets: list[Ticket] = []
        self.began = time.monotonic()
        self.first_token_seconds = 0.0  # 0: there has been none
        self.generated = 0
        self.watcher: asyncio.Task[None] | None = None

    def submit(self) -> None:
        """Queue all requests. Raises Refusal where the engine does not take all of them."""
        if len(self.requests) > self.engine.queue:
            problem = (
                f"{len(self.requests)} answers are more than the {self.engine.queue} that wait"
            )
            raise Refusal(400, f"{problem} at most", "too_many_answers")
        try:
            for index, request in enumerate(self.requests):
                self.tickets.append(self.engine.submit(request, self.receiver(index)))
        except QueueFull:
            raise Refusal(429, "the queue is full; try again later", "queue_full",
                          retry_after=RETRY_SECONDS) from None  # fmt: skip
        except EngineFailed:
            raise Refusal(503, "the engine has stopped working", "engine_failed") from None
        except ConfigError as error:
            field = str(error).partition(" ")[0].partition("=")[0]
            raise Refusal(
                400, str(error), "invalid_value", field if field in FIELDS else ""
            ) from None

    def receiver(self, index: int) -> Callable[[Part], None]:
        """Return what the engine's thread calls with each part of a request."""

        def receive(part: Part) -> None:
            self.loop.call_soon_threadsafe(self.arrived.put_nowait, (index, part))

        return receive

    def watch(self, receive: Receive) -> None:
        """End the exchange when the client leaves. Its body has been read."""

        async def wait() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.fail(ClientLeft())

        self.watcher = asyncio.create_task(wait())

    def fail(self, error: Exception) -> None:
        """End the exchange: `parts` raises the error."""
        self.close()
        self.arrived.put_nowait(error)

    async def parts(self) -> AsyncIterator[tuple[int, Part]]:
        """Yield (index of the request, part) up to the last of all. Raises Refusal, ClientLeft."""
        left, end = len(self.tickets), self.began + self.seconds
        while left:
            try:
                async with asyncio.timeout_at(self.loop.time() + end - time.monotonic()):
                    found = await self.arrived.get()
            except TimeoutError:
                raise Refusal(504, f"there was no whole answer within {self.seconds:g} s; ask for "
                              "fewer tokens", "timeout") from None  # fmt: skip
            if isinstance(found, Exception):
                raise found
            index, part = found
            if part.finish == "error":
                raise Refusal(500, "the engine could not answer this request", "engine_error")
            if part.finish == "cancelled":
                raise Refusal(503, "the server is stopping", "stopping")
            if part.ids and not self.first_token_seconds:
                self.first_token_seconds = time.monotonic() - self.began
            self.generated += len(part.ids)
            left -= bool(part.finish)
            yield index, part

    def later_seconds(self) -> float:
        """Return the seconds since the first token."""
        return time.monotonic() - self.began - self.first_token_seconds

    def close(self) -> None:
        """Give up what is not finished; afterwards the slots are free for others."""
        for ticket in self.tickets:
            ticket.cancel()
        if self.watcher:
            self.watcher.cancel()
