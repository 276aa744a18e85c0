"""The routes: what they read, and what they answer."""

import asyncio
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from nanojaxgpt.server import prompts
from nanojaxgpt.server.answers import ChoiceReply, chat_form, completion_form
from nanojaxgpt.server.guard import Guard, refusal_response
from nanojaxgpt.server.openapi import describe_api
from nanojaxgpt.server.refusals import Refusal
from nanojaxgpt.server.replies import CLIENT_LEFT, response_to
from nanojaxgpt.server.responses import ResponseReply
from nanojaxgpt.server.schema import (
    AnyBody,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Drawing,
    ResponseRequest,
    TokenizeRequest,
    read_body,
)
from nanojaxgpt.server.service import LOADING_SECONDS, Served, Service

PAGE = Path(__file__).parent / "page"
BODY_BYTES = 4 << 20
BODY_SECONDS = 10.0  # for a client to send the body in
DEFAULT_TOKENS = 16  # of a completion, as OpenAI's


class Api:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def read(self, http: Request, kind: type[AnyBody]) -> AnyBody:
        """Return the parsed body of a request. Raises Refusal, ClientDisconnect."""
        media = http.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":
            raise Refusal(415, "the content-type must be application/json", "unsupported_media")
        body, size = bytearray(), 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                # Of a body that is too large the rest is dropped as it comes: a connection that is
                # closed while its client sends is reset, and the client never sees the answer.
                async for part in http.stream():
                    size += len(part)
                    body += part if size <= BODY_BYTES else b""
        except TimeoutError:
            if size <= BODY_BYTES:
                problem = f"the body took longer than {BODY_SECONDS:.0f} s"
                raise Refusal(408, problem, "body_too_slow") from None
        if size > BODY_BYTES:
            raise Refusal(413, f"the body has more than {BODY_BYTES:,} bytes", "body_too_large")
        if self.service.settings.log_prompts:
            http.scope["record"]["body"] = body.decode(errors="replace")
        return read_body(kind, bytes(body))

    def find(self, http: Request, asked: Drawing) -> Served:
        """Return the model that is asked for, if requests are taken now. Raises Refusal."""
        if asked.user is not None:
            http.scope["record"]["user"] = asked.user
        one = self.service.find(asked.model)
        self.service.admit()
        return one

    async def complete(self, http: Request) -> ASGIApp:
        """Answer POST /v1/completions."""
        asked = await self.read(http, CompletionRequest)
        one = self.find(http, asked)
        found = await asyncio.to_thread(prompts.completion_prompts, one, asked.prompt)
        limit = prompts.Limit(asked.max_tokens, "max_tokens", DEFAULT_TOKENS)
        schema = await asyncio.to_thread(prompts.read_schema, one, asked)
        requests = prompts.make_requests(
            one, asked, found, limit, schema, asked.logprobs, bool(asked.echo)
        )
        found = [prompt for prompt in found for _ in range(asked.n or 1)]
        reply = ChoiceReply(one.name, asked, found, completion_form(asked, found, one.spelling))
        return response_to(self.service, http, one, requests, reply, bool(asked.stream))

    async def chat(self, http: Request) -> ASGIApp:
        """Answer POST /v1/chat/completions."""
        asked = await self.read(http, ChatRequest)
        one = self.find(http, asked)
        messages = prompts.plain_messages(asked.messages)
        prompt = await asyncio.to_thread(prompts.chat_prompt, one, messages, "messages")
        limit = prompts.Limit(asked.limit(), "max_completion_tokens")
        scores = (asked.top_logprobs or 0) if asked.logprobs else None
        schema = await asyncio.to_thread(prompts.read_schema, one, asked)
        requests = prompts.make_requests(one, asked, [prompt], limit, schema, scores)
        reply = ChoiceReply(
            one.name, asked, [prompt] * len(requests), chat_form(asked, one.spelling)
        )
        return response_to(self.service, http, one, requests, reply, bool(asked.stream))

    async def respond(self, http: Request) -> ASGIApp:
        """Answer POST /v1/responses."""
        asked = await self.read(http, ResponseRequest)
        one = self.find(http, asked)
        messages = prompts.input_messages(asked)
        prompt = await asyncio.to_thread(prompts.chat_prompt, one, messages, "input")
        limit = prompts.Limit(asked.max_output_tokens, "max_output_tokens")
        schema = await asyncio.to_thread(prompts.read_schema, one, asked)
        requests = prompts.make_requests(one, asked, [prompt], limit, schema)
        reply = ResponseReply(one.name, asked, prompt)
        return response_to(self.service, http, one, requests, reply, bool(asked.stream))

    async def models(self, http: Request) -> Response:
        """Answer GET /v1/models."""
        data = [describe_model(one) for one in self.service.served.values()]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, http: Request) -> Response:
        """Answer GET /v1/models/NAME."""
        return JSONResponse(describe_model(self.service.find(http.path_params["name"])))

    async def tokenize(self, http: Request) -> Response:
        """Answer POST /tokenize, as vLLM does."""
        asked = await self.read(http, TokenizeRequest)
        one = self.service.find(asked.model)
        if asked.messages is not None:
            messages = prompts.plain_messages(asked.messages)
            prompt = await asyncio.to_thread(prompts.chat_prompt, one, messages, "messages")
            ids = list(prompt.ids)
        else:
            start = asked.add_special_tokens is not False
            ids = await asyncio.to_thread(prompts.tokenize, one, asked.prompt or "", start)
        strings = [one.spelling.token(i) for i in ids] if asked.return_token_strs else None
        size = one.engine.context
        return JSONResponse(
            {"count": len(ids), "max_model_len": size, "tokens": ids, "token_strs": strings}
        )

    async def detokenize(self, http: Request) -> Response:
        """Answer POST /detokenize, as vLLM does."""
        asked = await self.read(http, DetokenizeRequest)
        one = self.service.find(asked.model)
        prompts.check_ids(one, asked.tokens, "tokens")
        return JSONResponse({"prompt": one.model.tokenizer.decode(asked.tokens)})

    async def tokenizer_info(self, http: Request) -> Response:
        """Answer GET /tokenizer_info, as vLLM does."""
        one = self.service.find(http.query_params.get("model"))
        tokenizer = one.model.tokenizer
        return JSONResponse({
            "tokenizer_class": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": one.engine.context,
            "chat_template": one.model.chat_template or None,
            "bos_token": one.spelling.named(tokenizer.start_id),
            "eos_token": one.spelling.named(tokenizer.end_id),
            "pad_token": None,
        })  # fmt: skip

    async def health(self, http: Request) -> Response:
        """Answer GET /health: 200 where requests are taken, else 503."""
        state, engines = self.service.state, [one.engine for one in self.service.served.values()]
        body: dict[str, Any] = {"status": state}
        for number in ("queued", "busy", "slots"):
            body[number] = sum(getattr(engine, number) for engine in engines)
        headers = {"retry-after": str(LOADING_SECONDS)} if state == "loading" else {}
        return JSONResponse(body, 200 if state == "ok" else 503, headers)

    async def metrics(self, http: Request) -> Response:
        """Answer GET /metrics."""
        found = self.service.metrics
        return Response(found.text(), media_type=found.content_type)

    async def openapi(self, http: Request) -> Response:
        """Answer GET /openapi.json."""
        return JSONResponse(describe_api())


def describe_model(one: Served) -> dict[str, Any]:
    """Return what /v1/models says of a model."""
    return {
        "id": one.name, "object": "model", "created": one.created, "owned_by": "nanojaxgpt",
        "max_model_len": one.engine.context, "chat": bool(one.model.chat_template),
    }  # fmt: skip


def page_routes() -> list[Route]:
    """Return a route for each file of the page, and for nothing else: no path leads elsewhere."""
    files = {f"/{path.relative_to(PAGE).as_posix()}": path for path in PAGE.rglob("*.*")}

    async def send_file(http: Request) -> Response:
        # Asked for anew each time, so that files of two versions never meet.
        headers = {"cache-control": "no-cache"}
        return FileResponse(files.get(http.url.path, PAGE / "index.html"), headers=headers)

    return [Route(path, send_file) for path in ("/", *sorted(files))]


def make_app(service: Service) -> ASGIApp:
    """Return the ASGI app of a server."""
    api = Api(service)
    routes = [
        Route("/v1/completions", api.complete, methods=["POST"]),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/responses", api.respond, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.model),
        Route("/tokenize", api.tokenize, methods=["POST"]),
        Route("/detokenize", api.detokenize, methods=["POST"]),
        Route("/tokenizer_info", api.tokenizer_info),
        Route("/health", api.health),
        Route("/metrics", api.metrics),
        Route("/openapi.json", api.openapi),
    ]
    page = page_routes()
    handlers: dict[Any, Any] = {
        Refusal: on_refusal, HTTPException: on_http_error, ClientDisconnect: on_disconnect,
        Exception: on_bug,
    }  # fmt: skip
    app = Starlette(routes=[*routes, *page], exception_handlers=handlers)
    app.router.redirect_slashes = False
    public = frozenset({"/health", *(route.path for route in page)})
    return Guard(app, service, public, frozenset(route.path for route in [*routes, *page]))


async def on_refusal(http: Request, error: Refusal) -> Response:
    """Return the response to a request that is refused."""
    http.scope["record"]["error"] = error.message
    return refusal_response(error)


async def on_http_error(http: Request, error: HTTPException) -> Response:
    """Return the response to an unknown path or a wrong method, in the body of all errors."""
    told = {404: "there is nothing at this path", 405: "this path does not have that method"}
    refusal = Refusal(error.status_code, told.get(error.status_code, error.detail), "no_route")
    refusal.headers |= error.headers or {}
    return refusal_response(refusal)


async def on_disconnect(http: Request, error: ClientDisconnect) -> Response:
    """Return a response for the log: the client left before its body was read."""
    return Response(status_code=CLIENT_LEFT)


async def on_bug(http: Request, error: Exception) -> Response:
    """Return the response to a request that met a bug; Guard logs it."""
    return refusal_response(Refusal(500, "the server failed; its log says why", "bug"))
