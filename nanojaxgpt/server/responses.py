"""The answer to a ResponseRequest: OpenAI's Responses, of one message of text, not stored."""

import time
from collections.abc import Sequence
from typing import Any

from nanojaxgpt.generate.requests import Part
from nanojaxgpt.server.answers import Event, ReadPrompt, make_id
from nanojaxgpt.server.refusals import Refusal
from nanojaxgpt.server.schema import ResponseRequest


class ResponseReply:
    """One message; its events are numbered and named by their type."""

    def __init__(self, name: str, asked: ResponseRequest, prompt: ReadPrompt) -> None:
        self.name, self.asked, self.prompt_tokens = name, asked, len(prompt.ids)
        self.id, self.item_id, self.created = make_id("resp"), make_id("msg"), int(time.time())
        self.number = 0
        self.text, self.finish, self.generated = "", "", 0

    def status(self) -> str:
        """Return how far the answer is."""
        return {"": "in_progress", "stop": "completed"}.get(self.finish, "incomplete")

    def content(self) -> dict[str, Any]:
        """Return the message's only piece."""
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def item(self, empty: bool = False) -> dict[str, Any]:
        """Return the message."""
        content = [] if empty else [self.content()]
        return {
            "type": "message", "id": self.item_id, "status": self.status(), "role": "assistant",
            "content": content,
        }  # fmt: skip

    def whole(self) -> dict[str, Any]:
        """Return the response as it stands."""
        asked, read = self.asked, self.prompt_tokens
        cut = {"reason": "max_output_tokens"} if self.status() == "incomplete" else None
        given = asked.text and asked.text.format
        form = given and given.model_dump(by_alias=True, exclude_unset=True)
        usage = {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": self.generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + self.generated,
        }
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": self.status(),
            "error": None,
            "incomplete_details": cut,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": {},
            "model": self.name,
            "output": [self.item()] if self.finish else [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": usage if self.finish else None,
            "user": asked.user,
        }

    def read(self, part: Part) -> None:
        """Add a part of the answer."""
        self.text += part.text
        self.generated += len(part.ids)
        self.finish = part.finish

    def body(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Return the body of the whole answer."""
        self.read(parts[0])
        return self.whole()

    def event(self, kind: str, **fields: Any) -> Event:
        """Return a numbered event."""
        data = {"type": f"response.{kind}", "sequence_number": self.number} | fields
        self.number += 1
        return data["type"], data

    def place(self) -> dict[str, Any]:
        """Return where the text stands in the response."""
        return {"item_id": self.item_id, "output_index": 0, "content_index": 0}

    def begin(self) -> list[Event]:
        """Return the events before the first part."""
        return [
            self.event("created", response=self.whole()),
            self.event("in_progress", response=self.whole()),
            self.event("output_item.added", output_index=0, item=self.item(empty=True)),
            self.event("content_part.added", **self.place(), part=self.content()),
        ]

    def add(self, index: int, part: Part) -> list[Event]:
        """Return the events of a part."""
        self.read(part)
        if not part.text:
            return []
        return [self.event("output_text.delta", **self.place(), delta=part.text, logprobs=[])]

    def end(self) -> list[Event]:
        """Return the events after the last part."""
        return [
            self.event("output_text.done", **self.place(), text=self.text, logprobs=[]),
            self.event("content_part.done", **self.place(), part=self.content()),
            self.event("output_item.done", output_index=0, item=self.item()),
            self.event(self.status(), response=self.whole()),
        ]

    def fail(self, refusal: Refusal) -> list[Event]:
        """Return the event that ends a stream early."""
        error = {"code": "server_error", "message": refusal.message}
        return [self.event("failed", response=self.whole() | {"status": "failed", "error": error})]
