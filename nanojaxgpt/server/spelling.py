"""In: ids with their log-probabilities. Out: what OpenAI's log-probabilities say of them."""

from collections.abc import Sequence
from typing import Any

from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.generate.requests import TokenScore
from nanojaxgpt.text_stream import TextStream

LOWEST = -9999.0  # stands for minus infinity, which JSON can't express; OpenAI's is the same


class Spelling:
    """The spelling of each id: its text, and where it is none, its name or its bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.names = {token: name for name, token in tokenizer.control.items()}

    def token(self, token: int) -> str:
        """Return the text of an id, `bytes:\\xe2\\x82` for a part of a character."""
        piece = self.tokenizer.piece(token)
        if not piece:
            return self.names.get(token, f"<|id {token}|>")
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def named(self, token: int) -> str | None:
        """Return how /tokenize takes a special id; None for -1."""
        return self.token(token) if token >= 0 else None

    def id_of(self, name: str) -> int:
        """Return the id of a special token that is spelled alone, else -1."""
        known = self.tokenizer.control | {
            self.token(i): i for i in (self.tokenizer.end_id, self.tokenizer.start_id) if i >= 0
        }
        return known.get(name, -1)

    def entry(self, token: int, log_probability: float | None) -> dict[str, Any]:
        """Return a token of a chat's log-probabilities."""
        piece = self.tokenizer.piece(token)
        return {
            "token": self.token(token),
            "logprob": finite(log_probability),
            "bytes": list(piece) or None,
        }

    def entries(self, scores: Sequence[TokenScore]) -> list[dict[str, Any]]:
        """Return a chat's log-probabilities: of each token, and of its alternatives."""
        return [
            self.entry(score.id, score.log_probability)
            | {"top_logprobs": [self.entry(*other) for other in score.alternatives]}
            for score in scores
        ]


def finite(log_probability: float | None) -> float | None:
    """Return a number that JSON can express."""
    return None if log_probability is None else max(log_probability, LOWEST)


class Offsets:
    """At which character each token of a text begins, as its ids arrive."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        self.stream = TextStream(tokenizer, before)

    def add(self, ids: Sequence[int]) -> list[int]:
        """Return the offsets of further ids; within a character, that of its beginning."""
        found = []
        for token in ids:
            found.append(len(self.stream.text))
            self.stream.add([token])
        return found


def completion_logprobs(
    spelling: Spelling, scores: Sequence[TokenScore], offsets: Sequence[int]
) -> dict[str, Any]:
    """Return a completion's log-probabilities.

    The token itself is among the alternatives. Of two that are spelled alike the likelier is.
    """
    tops: list[dict[str, float | None] | None] = []
    for score in scores:
        top: dict[str, float | None] = {}
        for token, number in (*score.alternatives, (score.id, score.log_probability)):
            top.setdefault(spelling.token(token), finite(number))
        tops.append(top if score.log_probability is not None else None)
    return {
        "tokens": [spelling.token(score.id) for score in scores],
        "token_logprobs": [finite(score.log_probability) for score in scores],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }
