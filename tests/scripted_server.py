"""A server with OpenAI's API whose answers a test writes, for the states a real one rarely has.

A test appends a Reply to `replies`; a request without one gets `Reply()`. All requests are kept.
"""

import asyncio
import json
import math
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

POLICY = {"Content-Security-Policy": "default-src 'self'"}
WORDS = ("The", " sea", " is", " wide", " deep,", " and", " blue", " 🌊", ".")


@dataclass
class Reply:
    """An answer of these tokens, `delay` seconds apart; or a refusal; or one that breaks off.

    `fails_after` is the number of tokens after which the stream has an error ("" closes it).
    """

    tokens: tuple[str, ...] = WORDS
    delay: float = 0.0
    before: float = 0.0  # seconds until the first one
    finish: str = "stop"
    status: int = 200
    message: str = ""
    retry_after: int = 0  # 0: the refusal is final
    code: str = ""
    fails_after: int | None = None


@dataclass
class ScriptedServer:
    """What it answers, and what it was asked: (path, body)."""

    page: Path
    replies: list[Reply] = field(default_factory=list)
    requests: list[tuple[str, dict]] = field(default_factory=list)
    models: list[dict] = field(default_factory=lambda: [{"id": "scripted", "chat": True}])
    loading: bool = False
    queued: int = 0
    key: str = ""
    closed_early: int = 0  # streams whose reader has left
    url: str = ""

    def app(self) -> Starlette:
        """Return the application."""
        names = {"/": "index.html"} | {f"/{p.name}": p.name for p in self.page.iterdir()}
        files = [Route(path, self.serve_file(name)) for path, name in names.items()]
        return Starlette(routes=[
            *files,
            Route("/health", self.health),
            Route("/v1/models", self.list_models),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
            Route("/v1/completions", self.answer, methods=["POST"]),
        ])  # fmt: skip

    def serve_file(self, name: str):
        """Return the endpoint of a file of the page."""

        def endpoint(request: Request) -> Response:
            return FileResponse(self.page / name, headers=POLICY)

        return endpoint

    def health(self, request: Request) -> Response:
        """Answer 503 while `loading`."""
        if self.loading:
            return JSONResponse({"status": "loading"}, 503, {"Retry-After": "1"})
        return JSONResponse({"status": "ok", "queued": self.queued})

    def list_models(self, request: Request) -> Response:
        """Answer with `models`."""
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return refusal(401, "The API key is missing or wrong.")
        return JSONResponse({"object": "list", "data": self.models})

    async def tokenize(self, request: Request) -> Response:
        """Answer with an id for each character of a prompt, or of all messages."""
        body = await request.json()
        self.requests.append((request.url.path, body))
        messages = body.get("messages", [])
        text = body.get("prompt") or "".join(message["content"] for message in messages)
        return JSONResponse({"tokens": [ord(letter) for letter in text]})

    async def answer(self, request: Request) -> Response:
        """Answer with the next reply."""
        body = await request.json()
        self.requests.append((request.url.path, body))
        reply = self.replies.pop(0) if self.replies else Reply()
        if reply.status != 200:
            headers = {"Retry-After": str(reply.retry_after)} if reply.retry_after else {}
            return refusal(reply.status, reply.message, headers, reply.code)
        events = self.stream(reply, "chat" in request.url.path)
        return StreamingResponse(events, media_type="text/event-stream")

    async def stream(self, reply: Reply, chat: bool) -> AsyncIterator[str]:
        """Yield the events of a reply."""
        form = chat_choice if chat else completion_choice
        finished = False
        await asyncio.sleep(reply.before)
        try:
            for index, token in enumerate(reply.tokens):
                if index == reply.fails_after:
                    if reply.message:
                        yield event({"error": {"message": reply.message}}, "error")
                    return
                yield event({"choices": [form(token, index)]})
                await asyncio.sleep(reply.delay)
            last = {"delta": {}} if chat else {"text": ""}
            yield event({"choices": [last | {"index": 0, "finish_reason": reply.finish}]})
            counts = {"prompt_tokens": 3, "completion_tokens": len(reply.tokens)}
            yield event({"choices": [], "usage": counts})
            yield "data: [DONE]\n\n"
            finished = True
        finally:
            self.closed_early += not finished


def event(data: dict, name: str = "") -> str:
    """Return a server-sent event."""
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"


def refusal(
    status: int, message: str, headers: dict[str, str] | None = None, code: str = ""
) -> JSONResponse:
    """Return an error in OpenAI's form."""
    return JSONResponse({"error": {"message": message, "code": code}}, status, headers)


def scores_of(token: str, index: int) -> dict[str, float]:
    """Return log-probabilities of a token and of two others, less likely the later it comes."""
    others = {" otherwise": math.log(0.11), " nothing": math.log(0.02)}
    return {token: math.log(0.9 / (index % 5 * 3 + 1))} | others


def chat_choice(token: str, index: int) -> dict:
    """Return the choice of a chat's chunk."""
    scores = [
        {"token": name, "bytes": list(name.encode()), "logprob": value}
        for name, value in scores_of(token, index).items()
    ]
    content = [scores[0] | {"top_logprobs": scores}]
    role = {} if index else {"role": "assistant"}
    delta = role | {"content": token}
    return {"index": 0, "delta": delta, "logprobs": {"content": content}, "finish_reason": None}


def completion_choice(token: str, index: int) -> dict:
    """Return the choice of a completion's chunk."""
    scores = scores_of(token, index)
    logprobs = {"tokens": [token], "token_logprobs": [scores[token]], "top_logprobs": [scores]}
    return {"index": 0, "text": token, "logprobs": logprobs, "finish_reason": None}


@contextmanager
def running(server: ScriptedServer) -> Iterator[ScriptedServer]:
    """Serve on a free port of this machine until the end of the block."""
    config = uvicorn.Config(server.app(), port=0, log_level="warning", timeout_graceful_shutdown=1)
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        thread.join(0.02)
        assert thread.is_alive()
    port = runner.servers[0].sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{port}"
    yield server
    runner.should_exit = True
    thread.join()
