"""From the parts of answers to an HTTP response: one JSON body, or server-sent events."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from nanojaxgpt.generate.requests import Part, Request, join_parts
from nanojaxgpt.server.answers import ChoiceReply, Event
from nanojaxgpt.server.exchange import ClientLeft, Exchange
from nanojaxgpt.server.refusals import Refusal
from nanojaxgpt.server.responses import ResponseReply
from nanojaxgpt.server.service import Served, Service

CLIENT_LEFT = 499  # as nginx logs it; nobody receives it
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]


def response_to(
    service: Service,
    http: HttpRequest,
    one: Served,
    requests: Sequence[Request],
    reply: ChoiceReply | ResponseReply,
    streamed: bool,
) -> ASGIApp:
    """Return the response that asks the engine, and sends what the reply makes of the answers.

    The status is sent with the first part, so that what fails before has one of its own.
    """
    record = http.scope["record"]
    record["model"], record["prompt_tokens"] = one.name, reply.prompt_tokens

    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        async def push(events: list[Event], more: bool = True) -> None:
            body = b"".join(encode_event(*event) for event in events)
            await send({"type": "http.response.body", "body": body, "more_body": more})

        with exchanging(service, one, requests, record) as exchange:
            exchange.watch(receive)
            parts, began = exchange.parts(), False
            found: list[list[Part]] = [[] for _ in requests]
            try:
                async for index, part in parts:
                    if not streamed:
                        found[index].append(part)
                        continue
                    if not began:
                        start = {"type": "http.response.start", "status": 200}
                        await send(start | {"headers": STREAM_HEADERS})
                        await push(reply.begin())
                        began = True
                    await push(reply.add(index, part))
                if streamed:
                    await push(reply.end(), more=False)
                else:
                    body = reply.body([join_parts(some) for some in found])
                    await JSONResponse(body)(scope, receive, send)
            except ClientLeft:
                record["error"] = "the client left"
                if not began:
                    await Response(status_code=CLIENT_LEFT)(scope, receive, send)
            except Refusal as refusal:
                if not began:
                    raise
                record["error"] = refusal.message
                await push(reply.fail(refusal), more=False)

    return respond


def encode_event(name: str, data: Any) -> bytes:
    """Return a server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, allow_nan=False)
    return f"{f'event: {name}' + chr(10) if name else ''}data: {text}\n\n".encode()


@contextlib.contextmanager
def exchanging(
    service: Service, one: Served, requests: Sequence[Request], record: dict[str, Any]
) -> Iterator[Exchange]:
    """Yield an exchange that is under way; afterwards nothing of it is left but its numbers."""
    exchange = Exchange(one.engine, requests, service.settings.seconds)
    service.active.add(exchange)
    try:
        exchange.submit()
        yield exchange
    finally:
        exchange.close()
        service.active.discard(exchange)
        record["generated_tokens"] = exchange.generated
        if first := exchange.first_token_seconds:
            record["first_token_seconds"] = round(first, 4)
            service.metrics.first_token.labels(one.name).observe(first)
            # Answers at once take the time of one.
            if (more := exchange.generated / len(requests) - 1) > 0:
                per_token = exchange.later_seconds() / more
                service.metrics.per_token.labels(one.name).observe(per_token)
