"""In: the ids of one row as they are drawn. Out: its text, cut at a stop string or an end id."""

import functools
from collections.abc import Callable, Sequence

from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.errors import ConfigError

INCOMPLETE = "\ufffd"  # what a tokenizer makes of the first bytes of a character


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a prompt, after the start token where the tokenizer has one.

    Without one, an empty prompt is the end token, after which a document begins. Raises ConfigError
    for an empty one where there is no such token either, DataError for text that the tokenizer
    can't encode.
    """
    start = [tokenizer.start_id] if tokenizer.start_id >= 0 else []
    if ids := start + tokenizer.encode(text).tolist():
        return ids
    if tokenizer.end_id >= 0:
        return [tokenizer.end_id]
    raise ConfigError(
        f"the prompt {text!r} has no tokens, and this tokenizer has no end token to start from; "
        "give text to continue, as in --prompt=TEXT"
    )


def encode_pair(
    tokenizer: Tokenizer,
    context: str,
    continuation: str,
    encode: Callable[[str], list[int]] | None = None,
) -> tuple[list[int], list[int]]:
    """Return the ids of a context, and of the continuation after it.

    As lm-eval does it: the context's last spaces belong to the continuation, and both are tokenized
    as one text, of which the context's own ids are cut off. An empty context is a new document.
    `encode` replaces `encode_prompt`. Raises what that raises.
    """
    encode = encode or functools.partial(encode_prompt, tokenizer)
    kept, text = context.rstrip(), context + continuation
    first, whole = encode(kept), encode(text) if text else []
    if not kept and tokenizer.start_id < 0:  # `first` is the end token, which `whole` lacks
        return first, whole
    return first, whole[len(first) :]


class TextStream:
    """The text that follows a prompt.

    Text is held back while it may still change: an incomplete character, or what could be the
    beginning of a stop string. Text that was returned is final; all of it together is `text`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        end_ids: Sequence[int] = (),
    ) -> None:
        self.text = ""
        self.finish = ""  # why the text has ended: end, stop or length; "" while it has not
        self._tokenizer, self._stop, self._end_ids = tokenizer, tuple(stop), frozenset(end_ids)
        self._held = ""
        # Only a window of the ids is decoded: new ones, after some whose text is complete, as the
        # text of an id can depend on there being one before (a space between words).
        self._window = list(prompt)
        self._num_complete = len(self._window)
        self._num_read = len(tokenizer.decode(self._window))  # characters of the window's text

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that has become final; `finish` says whether it is the last."""
        if self.finish:
            return ""
        ends = [place for place, token in enumerate(ids) if token in self._end_ids]
        self._window += ids[: ends[0]] if ends else ids
        if ends:
            return self.close("end")
        text = self._tokenizer.decode(self._window)
        complete = text.rstrip(INCOMPLETE)
        self._held += complete[self._num_read :]
        if len(complete) == len(text) > self._num_read:
            self._window = self._window[self._num_complete :]
            self._num_complete = len(self._window)
            self._num_read = len(self._tokenizer.decode(self._window))
        else:
            self._num_read = max(self._num_read, len(complete))
        return self._release()

    def close(self, finish: str = "length") -> str:
        """Return the text that was held back, as nothing follows."""
        if self.finish:
            return ""
        self._held += self._tokenizer.decode(self._window)[self._num_read :]
        return self._release(finish)

    def _release(self, finish: str = "") -> str:
        """Return the held text up to a stop string, or to what may become one."""
        places = [self._held.find(stop) for stop in self._stop if stop in self._held]
        if places:
            keep, finish = min(places), "stop"
        elif finish:
            keep = len(self._held)
        else:
            keep = len(self._held) - max(map(self._overlap, self._stop), default=0)
        text, self._held = self._held[:keep], self._held[keep:]
        self.text += text
        self.finish = finish
        return text

    def _overlap(self, stop: str) -> int:
        """Return how many characters at the end of the held text could begin `stop`."""
        sizes = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((size for size in sizes if self._held.endswith(stop[:size])), 0)
