"""Listening: the socket, uvicorn, signals, and the exit code. `serve` is the public function."""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from nanojaxgpt.adapters import Bases
from nanojaxgpt.console import warn
from nanojaxgpt.errors import INTERRUPTED, ConfigError, Stopped
from nanojaxgpt.language_model import LanguageModel, load
from nanojaxgpt.server.app import make_app
from nanojaxgpt.server.guard import is_loopback
from nanojaxgpt.server.service import Service, Settings

HEADER_BYTES = 64 << 10
MESSAGE_SECONDS = 15.0  # for a client to send a whole request in, and to take what it is sent


class PatientProtocol(H11Protocol):
    """HTTP/1.1 of uvicorn, which closes the connections of clients that send or read too slowly."""

    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request."""
        super().connection_made(transport)
        self.limit()

    def data_received(self, data: bytes) -> None:
        """Read data; a request that has begun must end in time."""
        if self.timer is None:
            self.limit()
        super().data_received(data)
        arriving = self.conn.their_state in (h11.IDLE, h11.SEND_BODY)
        if not (arriving or self.flow.write_paused):
            self.relax()

    def pause_writing(self) -> None:
        """Wait for the client to read."""
        super().pause_writing()
        self.limit()

    def resume_writing(self) -> None:
        """Go on, as the client has read."""
        super().resume_writing()
        self.relax()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self.relax()
        super().connection_lost(exc)

    def limit(self) -> None:
        """Close the connection unless `relax` is called in time."""
        self.relax()
        self.timer = self.loop.call_later(MESSAGE_SECONDS, self.transport.abort)

    def relax(self) -> None:
        """Let the connection be."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class Listener(uvicorn.Server):
    """uvicorn's server, which stops as the service does: answers are given to their end first."""

    def __init__(self, service: Service) -> None:
        self.service, self.interrupted = service, False
        config = uvicorn.Config(
            make_app(service), http=PatientProtocol, ws="none", lifespan="off", loop="asyncio",
            log_config=None, log_level="critical", access_log=False, proxy_headers=False,
            server_header=False, h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop after SIGTERM or Ctrl-C; at once after the second one."""
        self.interrupted = sig == signal.SIGINT
        self.service.stop()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; called ten times a second."""
        self.should_exit = self.should_exit or self.service.finished()
        return await super().on_tick(counter)


class Running:
    """A server in a thread of its own. Leave the context, or call `close`, to stop it."""

    def __init__(self, service: Service, listening: socket.socket) -> None:
        self.service, self.url = service, url_of(listening)
        self.thread = threading.Thread(target=run, args=(service, listening), daemon=True)
        self.thread.start()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop after the answers that are being given, within the settings' grace."""
        if not self.service.stop_at:
            self.service.stop()
        self.thread.join()


def run(service: Service, listening: socket.socket) -> None:
    """Answer requests until a signal, or `service.stop`. Raises what the engines failed of."""
    threading.Thread(target=service.warm_up, daemon=True).start()
    warn(f"serving {', '.join(service.served)} at {url_of(listening)}")
    listener = Listener(service)
    try:
        listener.run(sockets=[listening])
    finally:
        for one in service.served.values():
            if one.engine.ready:  # else it compiles, which can't be stopped
                one.engine.close(drain=False)
    if service.failure is not None:
        raise service.failure
    if listener.interrupted:
        raise Stopped("stopped", INTERRUPTED)


def listen(settings: Settings) -> socket.socket:
    """Return the socket to accept connections from. Raises ConfigError."""
    if not is_loopback(settings.host) and not settings.api_key:
        raise ConfigError(f"{settings.host} can be reached from other machines: set --api-key, or "
                          "leave --host at 127.0.0.1")  # fmt: skip
    if not settings.api_key.isascii() or not settings.api_key.isprintable():
        raise ConfigError("the API key must consist of printable ASCII characters")
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=1024)
    except OSError as error:
        place = f"{settings.host}, port {settings.port}"
        raise ConfigError(f"can't listen on {place}: {error.strerror}; choose another") from error


def url_of(listening: socket.socket) -> str:
    """Return the URL of a server."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    model: LanguageModel | str | Path | Mapping[str, LanguageModel | str | Path],
    *,
    draft: LanguageModel | str | Path | None = None,
    **settings: Any,
) -> Running:
    """Serve a model, or several by their names, over HTTP from a thread; return where, to stop it.

    Adapters that are opened here share the arrays of their base. `draft` is a smaller model that
    guesses the tokens of all, on the devices of the first. `settings` are those of the
    command `serve`: host, port (0: any free one), api_key, slots, context, queue, lookahead,
    seconds, grace, log_prompts. Raises ConfigError, DataError, CheckpointError, MemoryExceeded.
    """
    try:
        chosen = Settings(**settings)
    except TypeError as error:
        raise ConfigError(f"serve: {error}") from None
    named = model if isinstance(model, Mapping) else {"": model}
    bases, models = Bases(), dict[str, LanguageModel]()
    with contextlib.ExitStack() as stack:  # it closes the socket where a model can't be opened
        listening = stack.enter_context(listen(chosen))
        for name, one in named.items():
            opened = one if isinstance(one, LanguageModel) else load(one, bases=bases)
            models[name or model_name(opened.run)] = opened
        if draft is not None and not isinstance(draft, LanguageModel):
            draft = load(draft, mesh=next(iter(models.values())).mesh)
        service = Service(models, chosen, draft)
        stack.pop_all()
    return Running(service, listening)


def model_name(path: Path) -> str:
    """Return the name of a model in requests: that of its folder, or of its file."""
    name = path.resolve().name
    return name.removesuffix(".gguf") or "model"
