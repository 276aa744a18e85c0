"""From what a body says to what the engine is asked for: ids, limits, settings."""

import json
import secrets
from collections.abc import Sequence
from typing import Any, NamedTuple

from nanojaxgpt.errors import UserError
from nanojaxgpt.generate.requests import Request
from nanojaxgpt.interchange.templates import Message
from nanojaxgpt.server.answers import ReadPrompt
from nanojaxgpt.server.refusals import Refusal
from nanojaxgpt.server.schema import (
    LARGEST,
    ChatMessage,
    Choices,
    Drawing,
    InputItem,
    JsonFormat,
    NamedSchema,
    ResponseRequest,
    TextFormat,
)
from nanojaxgpt.server.service import Served


class Limit(NamedTuple):
    """The most tokens of an answer, the field that says so, and how many otherwise.

    A default of 0 is what the context has room for.
    """

    tokens: int | None
    field: str
    default: int = 0


def message(role: str, content: str) -> Message:
    """Return a message as chat templates read it."""
    return {"role": "system" if role == "developer" else role, "content": content}


def plain_messages(given: Sequence[ChatMessage | InputItem]) -> list[Message]:
    """Return messages as chat templates read them, the pieces of each as one text."""
    texts = [
        one.content if isinstance(one.content, str) else "".join(part.text for part in one.content)
        for one in given
    ]
    return [message(one.role, text) for one, text in zip(given, texts, strict=True)]


def input_messages(asked: ResponseRequest) -> list[Message]:
    """Return the messages of a ResponseRequest, after its system prompt."""
    begin = [] if asked.instructions is None else [message("system", asked.instructions)]
    if isinstance(asked.input, str):
        return [*begin, message("user", asked.input)]
    return begin + plain_messages(asked.input)


def chat_prompt(one: Served, messages: Sequence[Message], field: str) -> ReadPrompt:
    """Return the prompt of a conversation; control tokens come from the template alone."""
    if not one.model.chat_template:
        raise Refusal(400, f"{one.name} has no chat template: it is a base model, which continues "
                      "texts; use /v1/completions", "no_chat_template", field)  # fmt: skip
    try:
        ids = one.model.template.encode(messages)
    except UserError as error:
        raise Refusal(400, str(error), "invalid_value", field) from None
    if not ids:
        raise Refusal(400, "the conversation has no tokens", "invalid_value", field)
    return ReadPrompt(tuple(ids), "")


def completion_prompts(one: Served, given: Any) -> list[ReadPrompt]:
    """Return the prompts of a completion: of one text or row of ids, or of several."""
    several = isinstance(given, list) and not isinstance(given[0], int)
    return [completion_prompt(one, each) for each in (given if several else [given])]


def completion_prompt(one: Served, given: str | list[int]) -> ReadPrompt:
    """Return a prompt of a text or of ids. Raises Refusal."""
    if isinstance(given, list):
        check_ids(one, given, "prompt")
        return ReadPrompt(tuple(given), one.model.tokenizer.decode(given))
    try:
        return ReadPrompt(tuple(one.model.encode(given)), given)
    except UserError as error:
        raise Refusal(400, str(error), "invalid_value", "prompt") from None


def tokenize(one: Served, text: str, start: bool) -> list[int]:
    """Return the ids of a text, or that of a special token spelled alone. Raises Refusal."""
    if (token := one.spelling.id_of(text)) >= 0:
        return [token]
    try:
        ids = one.model.tokenizer.encode(text).tolist()
    except UserError as error:
        raise Refusal(400, str(error), "invalid_value", "prompt") from None
    begin = one.model.tokenizer.start_id
    return [begin, *ids] if start and begin >= 0 else ids


def check_ids(one: Served, ids: Sequence[int], field: str) -> None:
    """Raise Refusal where an id is not in the vocabulary."""
    last = one.model.tokenizer.vocab_size - 1
    if (largest := max(ids, default=0)) > last:
        problem = f"{field} contains {largest}, but ids are from 0 to {last}"
        raise Refusal(400, problem, "invalid_value", field)


def max_tokens(one: Served, prompt: ReadPrompt, limit: Limit) -> int:
    """Return the most tokens of the answer to a prompt. Raises Refusal."""
    context, read = one.engine.context, len(prompt.ids)
    wanted = 1 if limit.tokens is None else limit.tokens
    if read + wanted > context:
        problem = (
            f"the context has {context:,} tokens, too few for {read:,} of the prompt and "
            f"{wanted:,} of the answer ({limit.field}), {read + wanted:,} together"
        )
        raise Refusal(400, problem, "context_length_exceeded", limit.field)
    return min(limit.default or context, context - read) if limit.tokens is None else wanted


def read_schema(one: Served, asked: Choices | ResponseRequest) -> str:
    """Return the schema that an answer is to fit, "" for none; it is compiled. Raises Refusal."""
    if isinstance(asked, Choices):
        field, form = "response_format", asked.response_format
    else:
        field, form = "text", asked.text and asked.text.format
    if form is None or isinstance(form, TextFormat):
        return ""
    if isinstance(form, JsonFormat):
        given = {"type": "object"}
    else:
        named = form if isinstance(form, NamedSchema) else form.json_schema
        given = named.json_schema
    try:
        text = json.dumps(given, ensure_ascii=False)
        one.engine.grammars.begin(text)
    except (UserError, RecursionError) as error:
        raise Refusal(400, f"{field}: {error}", "invalid_schema", field) from None
    return text


def make_requests(
    one: Served,
    asked: Drawing,
    prompts: Sequence[ReadPrompt],
    limit: Limit,
    schema: str,
    scores: int | None = None,
    echo: bool = False,
) -> list[Request]:
    """Return what the engine is asked for: `n` requests for each prompt.

    The i-th answer to a prompt has the seed + i. Raises Refusal.
    """
    times = (asked.n or 1) if isinstance(asked, Choices) else 1
    seed = secrets.randbelow(LARGEST) if asked.seed is None else asked.seed
    biases = [(int(token), float(bias)) for token, bias in (asked.logit_bias or {}).items()]
    check_ids(one, [token for token, _ in biases], "logit_bias")
    limits = [max_tokens(one, prompt, limit) for prompt in prompts]
    return [
        Request(
            ids=prompt.ids,
            max_tokens=most,
            temperature=1.0 if asked.temperature is None else float(asked.temperature),
            top_k=asked.top_k or 0,
            top_p=1.0 if asked.top_p is None else float(asked.top_p),
            min_p=float(asked.min_p or 0),
            seed=(seed + number) % (LARGEST + 1),
            stop=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ()),
            logit_bias=tuple(biases),
            presence_penalty=float(asked.presence_penalty or 0),
            frequency_penalty=float(asked.frequency_penalty or 0),
            alternatives=-1 if scores is None else scores,
            echo=echo and scores is not None,
            schema=schema,
        )
        for prompt, most in zip(prompts, limits, strict=True)
        for number in range(times)
    ]
