"""The description of the API in OpenAPI 3.1, of the models that read the requests."""

from typing import Any

from pydantic.json_schema import models_json_schema

from nanojaxgpt.server.schema import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ResponseRequest,
    TokenizeRequest,
)

BODIES: dict[str, tuple[type[Body], str]] = {
    "/v1/completions": (CompletionRequest, "Continue texts."),
    "/v1/chat/completions": (ChatRequest, "Answer a conversation."),
    "/v1/responses": (ResponseRequest, "Answer a conversation, in the form of Responses."),
    "/tokenize": (TokenizeRequest, "Return the ids of a text or a conversation."),
    "/detokenize": (DetokenizeRequest, "Return the text of ids."),
}
READS = {
    "/v1/models": "List the models.",
    "/v1/models/{name}": "Describe a model.",
    "/tokenizer_info": "Describe the tokenizer of a model.",
    "/health": "Whether requests are taken: loading, ok, stopping or failed.",
    "/metrics": "Numbers for Prometheus.",
    "/openapi.json": "This description.",
}
PARAMETERS = {
    "/v1/models/{name}": {"name": "name", "in": "path", "required": True},
    "/tokenizer_info": {"name": "model", "in": "query", "required": False},
}
REFUSALS = {
    400: "The body is wrong; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "The request comes from another site.",
    404: "There is no such model.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The content is not JSON.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "The server failed.",
    503: "The server is loading, stopping, or has failed.",
    504: "The answer took too long.",
}
READ_REFUSALS = (401, 403, 404, 500, 503)
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def responses(path: str, statuses: tuple[int, ...]) -> dict[str, Any]:
    """Return the responses of a path."""
    refused = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    kind = "text/plain" if path == "/metrics" else "application/json"
    content: dict[str, Any] = {kind: {"schema": {"type": "string" if "text" in kind else "object"}}}
    if path.startswith("/v1/") and path in BODIES:
        content["text/event-stream"] = {}
    found: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    if path == "/health":
        told = {"application/json": {"schema": {"type": "object"}}}
        statuses, found["503"] = (403,), {"description": "Not now.", "content": told}
    return found | {
        str(status): {"description": REFUSALS[status], "content": refused} for status in statuses
    }


def describe_api() -> dict[str, Any]:
    """Return the OpenAPI document."""
    kinds = [(kind, "validation") for kind, _ in BODIES.values()]
    _, models = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore
    paths: dict[str, Any] = {}
    for path, about in READS.items():
        operation: dict[str, Any] = {"summary": about, "responses": responses(path, READ_REFUSALS)}
        if parameter := PARAMETERS.get(path):
            operation["parameters"] = [parameter | {"schema": {"type": "string"}}]
        paths[path] = {"get": operation}
    for path, (kind, about) in BODIES.items():
        schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
        paths[path] = {"post": {
            "summary": about,
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
            "responses": responses(path, tuple(REFUSALS)),
        }}  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "nanojaxgpt", "version": "1"},
        "paths": paths,
        "components": {
            "schemas": models["$defs"] | {"Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }
