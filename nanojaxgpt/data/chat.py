"""In: an example, a tokenizer and a chat template. Out: ids, and the weight of each in the loss.

Both are made together, turn by turn: which ids are trained on follows from the lengths of the
parts, never from the ids themselves or from a search.
"""

from collections.abc import Sequence
from typing import NamedTuple

from nanojaxgpt.data.sources.records import Example, Message, is_trained
from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.interchange.templates import ChatTemplate, control_pattern, without_marks
from nanojaxgpt.text_stream import encode_prompt

Parts = str | Sequence[Message]


class Encoded(NamedTuple):
    """A document of ids; weight 1: a model learns to write this id, 0: it only reads it."""

    ids: list[int]
    weights: list[int]


def encode_answer(
    prompt: Parts, answer: Parts, tokenizer: Tokenizer, template: ChatTemplate | None
) -> Encoded:
    """Return a prompt and its answer, which is trained on; texts become messages for a template.

    Raises ConfigError for messages without a template, and what `encode_turns` raises.
    """
    if template:
        before = as_messages("user", prompt)
        return encode_turns(template, (*before, *as_messages("assistant", answer)), len(before))
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise ConfigError(
            "messages need a chat template, and the model has none: set "
            "data.chat_template=plain, or the path of a Jinja file"
        )
    ids = encode_prompt(tokenizer, prompt)
    trained = tokenizer.encode(answer).tolist() + [tokenizer.end_id] * (tokenizer.end_id >= 0)
    return Encoded(ids + trained, [0] * len(ids) + [1] * len(trained))


def as_messages(role: str, part: Parts) -> tuple[Message, ...]:
    """Return messages as they are, and a text as one of this role."""
    return ({"role": role, "content": part},) if isinstance(part, str) else tuple(part)


def encode_turns(template: ChatTemplate, messages: Sequence[Message], first: int = 0) -> Encoded:
    """Return a conversation up to the last answer that is trained on.

    Answers from message `first` on are, each with its end of turn; the role's header and all else
    that the template writes by itself is not. Raises TemplateError where the template refuses the
    conversation, DataError where what it writes of one message depends on later ones.
    """
    ids: list[int] = []
    weights: list[int] = []
    done = ""
    for number, message in enumerate(messages):
        if number < first or not is_trained(message):
            continue
        before = template.text(messages[:number], answer=True)
        check_prefix(done, before, number, "the messages before it")
        whole = template.text(messages[: number + 1], answer=False)
        check_prefix(before, whole, number, "its generation prompt")
        answer = cut_turn(whole[len(before) :], template)
        check_content(message, answer, number)
        for text, weight in ((before[len(done) :], 0), (answer, 1)):
            part = template.encode_text(text)
            ids += part
            weights += [weight] * len(part)
        done = before + answer
    start = template.tokenizer.start_id
    if start >= 0 and ids[:2] == [start, start]:
        raise DataError(f"the chat template begins with the start token (id {start}) twice")
    return Encoded(ids, weights)


def cut_turn(text: str, template: ChatTemplate) -> str:
    """Return an answer up to its end of turn, the control token after its last text.

    All of it where there is no such token. What follows, a newline say, is the template's own, and
    belongs to the next turn.
    """
    if not template.control:
        return text
    parts = control_pattern(tuple(template.control)).split(text)  # texts, and tokens between them
    last = max((i for i in range(0, len(parts), 2) if parts[i].strip()), default=0)
    return "".join(parts[: last + 2])


def check_prefix(beginning: str, text: str, number: int, what: str) -> None:
    """Raise DataError where a template writes `beginning` otherwise once a message follows."""
    if text.startswith(beginning):
        return
    same = next(i for i in range(len(beginning) + 1) if not text.startswith(beginning[: i + 1]))
    place = max(0, same - 20)
    raise DataError(
        f"the chat template can't be trained with: at message {number + 1} it changes {what}, "
        f"from {visible(beginning[place : same + 20])} to {visible(text[place : same + 20])}; "
        "choose another with data.chat_template"
    )


def check_content(message: Message, answer: str, number: int) -> None:
    """Raise DataError where a template does not write an answer's text as it is."""
    if without_marks(message["content"]).strip() not in without_marks(answer):
        raise DataError(
            f"the chat template does not write the answer of message {number + 1} as it is: "
            f"{visible(message['content'][:40])} becomes {visible(answer[:40])}; choose another "
            "with data.chat_template"
        )


def visible(text: str) -> str:
    """Return text in quotes, as a person wrote it."""
    return repr(without_marks(text))


def encode_example(
    kind: str,
    example: Example,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    numbers: dict[str, int],
) -> tuple[Encoded, ...]:
    """Return the documents of an example: two of a preference, one of any other.

    The last "id" of a labelled text is the number of its label, by `numbers`.
    """
    if kind == "labels":
        ids = encode_prompt(tokenizer, str(example.prompt))
        return (Encoded([*ids, numbers[str(example.label)]], [0] * len(ids) + [1]),)
    return tuple(
        encode_answer(example.prompt, answer, tokenizer, template) for answer in example.answers
    )
