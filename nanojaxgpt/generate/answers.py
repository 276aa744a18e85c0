"""A request on its way: the ticket that its sender holds, and the answer as its ids arrive."""

import dataclasses
import queue
import time
from collections.abc import Callable, Iterator, Sequence

from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.generate.drafts import Repeats
from nanojaxgpt.generate.grammar import Grammar
from nanojaxgpt.generate.requests import Limits, Part, Request, TokenScore, join_parts
from nanojaxgpt.text_stream import TextStream


class Ticket:
    """A request that an engine has taken: iterate over its parts as they become final.

    `queued_seconds` and `first_token_seconds` count from its submission, 0 until they are known.
    """

    def __init__(
        self,
        request: Request,
        on_part: Callable[[Part], None] | None,
        wake: Callable[[], None],
        grammar: Grammar | None = None,
    ) -> None:
        self.request, self.grammar, self.prompt_tokens = request, grammar, len(request.ids)
        self.queued_seconds = self.first_token_seconds = 0.0
        self.cancelled = self.finished = False
        self._on_part, self._wake, self._began = on_part, wake, time.monotonic()
        self._parts: queue.SimpleQueue[Part] = queue.SimpleQueue()
        self._taken: list[Part] = []

    def __iter__(self) -> Iterator[Part]:
        """Yield the parts that were not yet taken, up to the last; each is given once."""
        while not (self._taken and self._taken[-1].finish):
            self._taken.append(self._parts.get())
            yield self._taken[-1]

    def result(self) -> Part:
        """Return all parts as one, once the last is there."""
        for _ in self:
            pass
        return join_parts(self._taken)

    def cancel(self) -> None:
        """Ask for the end: the slot is free at the next step."""
        self.cancelled = True
        self._wake()

    def age(self) -> float:
        """Return the seconds since the submission."""
        return time.monotonic() - self._began

    def put(self, part: Part) -> None:
        """Hand on a part; nothing follows the one with a `finish`."""
        if self.finished:
            return
        self.finished = bool(part.finish)
        self._parts.put(part)
        if self._on_part:
            self._on_part(part)


@dataclasses.dataclass
class Answer:
    """The text of a request while its ids arrive. `left` is how many more there may be."""

    request: Request
    stream: TextStream
    left: int
    ends: frozenset[int]
    repeats: Repeats | None
    grammar: Grammar | None

    @classmethod
    def begin(
        cls, ticket: Ticket, tokenizer: Tokenizer, end_ids: Sequence[int], limits: Limits,
        repeats: bool,
    ) -> "Answer":  # fmt: skip
        """Return the answer before its first token; the last one of a context is never read.

        One with a grammar has no drafts: what may follow a token is known once it was drawn. The
        others are guessed from what `repeats` itself, if asked for.
        """
        request, grammar = ticket.request, ticket.grammar
        ends = frozenset((*end_ids, *request.end_ids))
        stream = TextStream(tokenizer, request.ids, request.stop, tuple(ends))
        left = min(request.max_tokens, limits.context + 1 - len(request.ids))
        found = Repeats(request.ids) if repeats and grammar is None else None
        return cls(request, stream, left, ends, found, grammar)

    def goes_on_after(self, ids: Sequence[int] | None) -> bool:
        """Return whether tokens may be needed after these; None: after one that is not known."""
        if ids is None:
            return self.left > 1
        return self.left > len(ids) and self.ends.isdisjoint(ids)

    def add(self, ids: Sequence[int], scores: Sequence[TokenScore]) -> Part:
        """Return what becomes final with these ids; those after the end are dropped."""
        text, used, finish = "", 0, ""
        for token in ids:
            text += self.stream.add([token])
            used, self.left = used + 1, self.left - 1
            if self.stream.finish:
                finish = "stop"
            elif self.is_complete_after(token):
                text, finish = text + self.stream.close(), "stop"
            elif not self.left:
                text, finish = text + self.stream.close(), "length"
            if finish:
                break
        return Part(text, tuple(ids[:used]), tuple(scores[:used]), (), finish)

    def is_complete_after(self, token: int) -> bool:
        """Return whether a token has completed the JSON. Raises ConfigError, as Grammar does."""
        if self.grammar is None:
            return False
        self.grammar.take(token)
        return self.grammar.is_complete
