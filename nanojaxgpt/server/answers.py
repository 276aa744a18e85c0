"""In: what has become final of answers. Out: the bodies and stream events of completions, chats."""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nanojaxgpt.generate.requests import Part
from nanojaxgpt.server.refusals import Refusal
from nanojaxgpt.server.schema import ChatRequest, Choices, CompletionRequest
from nanojaxgpt.server.spelling import Offsets, Spelling, completion_logprobs

Event = tuple[str, Any]  # its name, "" for none; its data, JSON or text


class ReadPrompt(NamedTuple):
    """What an answer continues."""

    ids: tuple[int, ...]
    text: str


class Form(NamedTuple):
    """The form of an answer: the prefix of its id, the names of the whole and of a part of it.

    `choice(index, part, first, streamed)` is what a part, `first` of its choice or not, becomes.
    """

    prefix: str
    whole: str
    part: str
    choice: Callable[[int, Part, bool, bool], dict[str, Any]]


class ChoiceReply:
    """An answer of several choices; `prompts` are those of the choices, in their order."""

    def __init__(
        self, name: str, asked: Choices, prompts: Sequence[ReadPrompt], form: Form
    ) -> None:
        self.asked, self.prompts, self.form = asked, prompts, form
        self.id, self.created, self.name = make_id(form.prefix), int(time.time()), name
        # A prompt with several answers counts once.
        self.prompt_tokens = sum(len(prompt.ids) for prompt in prompts[:: asked.n or 1])
        self.generated = 0
        self.started: set[int] = set()
        self.counts = bool(asked.stream_options and asked.stream_options.include_usage)

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a body with these choices."""
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.name,
            "choices": choices,
        }  # fmt: skip

    def choice(self, index: int, part: Part, streamed: bool) -> dict[str, Any]:
        """Return what a part of a choice becomes, and count it."""
        first = index not in self.started
        self.started.add(index)
        self.generated += len(part.ids)
        found = self.form.choice(index, part, first, streamed)
        found["finish_reason"] = part.finish or None
        if self.asked.return_token_ids:
            found["token_ids"] = list(part.ids)
            found["prompt_token_ids"] = list(self.prompts[index].ids) if first else None
        return found

    def usage(self) -> dict[str, int]:
        """Return the numbers of tokens."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt_tokens + self.generated,
        }

    def body(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Return the body of a whole answer: a part for each choice."""
        choices = [self.choice(index, part, False) for index, part in enumerate(parts)]
        return self.envelope(self.form.whole, choices) | {"usage": self.usage()}

    def begin(self) -> list[Event]:
        """Return the events before the first part."""
        return []

    def add(self, index: int, part: Part) -> list[Event]:
        """Return the events of a part."""
        chunk = self.envelope(self.form.part, [self.choice(index, part, True)])
        return [("", chunk | {"usage": None} if self.counts else chunk)]

    def end(self) -> list[Event]:
        """Return the events after the last part of all choices."""
        usage = ("", self.envelope(self.form.part, []) | {"usage": self.usage()})
        return [usage, ("", "[DONE]")] if self.counts else [("", "[DONE]")]

    def fail(self, refusal: Refusal) -> list[Event]:
        """Return the events that end a stream early."""
        return [("error", refusal.body())]


def make_id(prefix: str) -> str:
    """Return a new name for an answer or a part of one."""
    return f"{prefix}-{uuid.uuid4().hex}"


def completion_form(
    asked: CompletionRequest, prompts: Sequence[ReadPrompt], spelling: Spelling
) -> Form:
    """Return the form of the answer to a CompletionRequest."""
    # Offsets are those of the text, of which the prompt may be a part.
    before = [() if asked.echo else prompt.ids for prompt in prompts]
    offsets = [Offsets(spelling.tokenizer, ids) for ids in before]

    def choice(index: int, part: Part, first: bool, streamed: bool) -> dict[str, Any]:
        echoed = prompts[index].text if first and asked.echo else ""
        found: dict[str, Any] = {"index": index, "text": echoed + part.text, "logprobs": None}
        if asked.logprobs is not None:
            scores = (*part.prompt_scores, *part.scores)
            places = offsets[index].add([score.id for score in scores])
            found["logprobs"] = completion_logprobs(spelling, scores, places)
        return found

    return Form("cmpl", "text_completion", "text_completion", choice)


def chat_form(asked: ChatRequest, spelling: Spelling) -> Form:
    """Return the form of the answer to a ChatRequest."""

    def choice(index: int, part: Part, first: bool, streamed: bool) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant"} if first else {}
        if part.text or first:
            message["content"] = part.text
        name = "delta" if streamed else "message"
        found: dict[str, Any] = {"index": index, name: message, "logprobs": None}
        if asked.logprobs:
            found["logprobs"] = {"content": spelling.entries(part.scores), "refusal": None}
        return found

    return Form("chatcmpl", "chat.completion", "chat.completion.chunk", choice)
