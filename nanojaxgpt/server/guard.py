"""Around the app: who may ask, what is logged and counted, and what the app's bugs become."""

import hmac
import ipaddress
import json
import time
import traceback
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanojaxgpt.console import warn
from nanojaxgpt.server.refusals import Refusal
from nanojaxgpt.server.service import Service

# A page of this server runs its own files alone, in no other page's frame.
POLICY = "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
LONGEST_SHOWN = 200  # characters of a path or a client's name in the log


class Guard:
    """An ASGI app around another one. `public` paths need no key; `paths` are counted by name."""

    def __init__(
        self, app: ASGIApp, service: Service, public: frozenset[str], paths: frozenset[str]
    ) -> None:
        self.app, self.service, self.public, self.paths = app, service, public, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        began, status = time.monotonic(), 0
        record: dict[str, Any] = {}
        scope["record"] = record  # for what the app knows of the request

        async def send_safely(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self.check(scope)
            await self.app(scope, receive, send_safely)
        except Refusal as refusal:
            record["error"] = refusal.message
            await refusal_response(refusal)(scope, receive, send_safely)
        except Exception as error:  # a bug
            record["error"] = "".join(traceback.format_exception(error))
            if status != 500:  # the app had begun to answer: the connection is closed
                raise
        finally:
            self.note(scope, record, status, time.monotonic() - began)

    def check(self, scope: Scope) -> None:
        """Raise Refusal where the request comes from another site, or has not the key."""
        headers, settings = Headers(scope=scope), self.service.settings
        host = headers.get("host", "")
        names = (*LOOPBACK_NAMES, settings.host)
        if is_loopback(settings.host) and host_name(host) not in names:
            # Another site's name that was made to lead here (DNS rebinding).
            raise Refusal(403, f"no host {host[:LONGEST_SHOWN]!r} here", "unknown_host")
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            raise Refusal(403, "requests from pages of other sites are refused", "foreign_origin")
        if settings.api_key and scope["path"] not in self.public:
            kind, _, key = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(key.strip().encode(), settings.api_key.encode())
            if kind.lower() != "bearer" or not same:
                raise Refusal(401, "the API key is missing or wrong", "invalid_api_key")

    def note(self, scope: Scope, record: dict[str, Any], status: int, seconds: float) -> None:
        """Log a request in one line of JSON, and count it."""
        path = scope["path"] if scope["path"] in self.paths else "other"
        self.service.metrics.requests.labels(path, str(status)).inc()
        self.service.metrics.seconds.labels(path).observe(seconds)
        client = scope.get("client")
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "client": client[0] if client else "",
            "method": scope["method"][:LONGEST_SHOWN],
            "path": scope["path"][:LONGEST_SHOWN],
            "status": status,
            "seconds": round(seconds, 4),
        }
        warn(json.dumps(line | record))


def refusal_response(refusal: Refusal) -> JSONResponse:
    """Return the response to a request that can't be answered."""
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


def host_name(host: str) -> str:
    """Return the name in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
