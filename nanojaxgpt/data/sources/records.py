"""In: a file of examples for fine-tuning. Out: the examples, whatever format they have.

It is JSON lines, or with KIND:parquet:PATH, KIND:hf:NAME or KIND:tfds:NAME one of these.
The format is that of the first record; a record of another one is an error with its line.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from nanojaxgpt.checks import kind_of, show
from nanojaxgpt.config import sections
from nanojaxgpt.data.sources.documents import Document, Refuse, check_text
from nanojaxgpt.data.sources.files import JSON_ENDINGS, identify_files, read_objects
from nanojaxgpt.data.sources.hub import identify_hub_rows, read_hub_rows
from nanojaxgpt.data.sources.parquet import identify_rows, read_rows
from nanojaxgpt.data.sources.tfds import identify_tfds_records, read_tfds_records

Message = Mapping[str, Any]  # role, content, and what else a template reads

# The fields by which a record is known, and an example of it. Of a kind's formats the first counts.
FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    "messages": (("messages",), '{"messages": [{"role": "user", "content": "..."}, ...]}'),
    "ShareGPT": (("conversations",), '{"conversations": [{"from": "human", "value": "..."}, ...]}'),
    "prompt/completion": (("prompt", "completion"), '{"prompt": "...", "completion": "..."}'),
    "Alpaca": (
        ("instruction", "output"), '{"instruction": "...", "input": "...", "output": "..."}'
    ),
    "text/label": (("text", "label"), '{"text": "...", "label": "..."}'),
    "prompt/chosen/rejected": (
        ("prompt", "chosen", "rejected"), '{"prompt": "...", "chosen": "...", "rejected": "..."}'
    ),
}  # fmt: skip
KINDS: dict[str, tuple[str, ...]] = {
    "chat": ("messages", "ShareGPT", "prompt/completion", "Alpaca"),
    "pairs": ("prompt/completion", "Alpaca"),
    "labels": ("text/label",),
    "preferences": ("prompt/chosen/rejected",),
}
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant",
                  "assistant": "assistant"}  # fmt: skip


# What reads records elsewhere than in JSON lines, and what identifies them; as a Source has them.
CONTAINERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "parquet": (lambda path, _, refuse: read_rows(path, refuse),
                lambda path, _: identify_rows(path)),
    "hf": (lambda name, _, refuse: read_hub_rows(name, refuse),
           lambda name, _: identify_hub_rows(name)),
    "tfds": (read_tfds_records, identify_tfds_records),
}  # fmt: skip


class Example(NamedTuple):
    """A record as it is trained on: a prompt and what may follow it, or a text and its label.

    Texts and messages: of a chat all messages are the answer, of a preference the chosen answer
    comes before the rejected one.
    """

    place: str  # file:line, or a row
    prompt: str | tuple[Message, ...]
    answers: tuple[str | tuple[Message, ...], ...] = ()
    label: str | int = ""


class BadRecordError(Exception):
    """What is wrong with a record; it becomes an error with its line, or the record is skipped."""


def is_examples(source: str) -> bool:
    """Return whether a source holds examples for fine-tuning, not documents."""
    return source.partition(":")[0] in KINDS


def read_examples(
    kind: str,
    location: str,
    data: sections.Data,
    refuse: Refuse,
    report: Callable[[str], object],
) -> Iterator[Example]:
    """Yield the examples of a source; `report` is told which format they have."""
    found, first = "", ""
    for place, record in read_records(kind, location, data, refuse):
        try:
            if not found:
                found, first = detect(kind, record), place
                report(describe_format(kind, location, found, record))
            elif missing := [field for field in FORMATS[found][0] if field not in record]:
                raise BadRecordError(
                    f"has no field {missing[0]!r}, as {found} has, the format of {first}; it has "
                    f"{', '.join(record)}"
                )
            yield READERS[found](place, record)
        except BadRecordError as error:
            refuse(f"{place} {error}")


def read_records(
    kind: str, location: str, data: sections.Data, refuse: Refuse
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (where it stands, fields) of each record."""
    container, path = split_container(location)
    if container in CONTAINERS:
        yield from CONTAINERS[container][0](path, data, refuse)
    else:
        advice = " or ".join(FORMATS[name][1] for name in KINDS[kind])
        lines = read_objects(kind, path, f"write one per line: {advice}", refuse)
        yield from ((place, record) for _, place, record in lines)


def split_container(location: str) -> tuple[str, str]:
    """Return (one of CONTAINERS, what follows it), or ("", the path of JSON lines)."""
    container, _, path = location.partition(":")
    return (container, path) if container in CONTAINERS else ("", location)


def detect(kind: str, record: Mapping[str, Any]) -> str:
    """Return the format of a record. Raises BadRecordError where it has none, or two."""
    found = [name for name in KINDS[kind] if all(field in record for field in FORMATS[name][0])]
    if len(found) == 1:
        return found[0]
    has = ", ".join(map(str, record)) or "nothing"
    if found:
        raise BadRecordError(
            f"can be read as {' and as '.join(found)}: it has {has}; remove the fields of one"
        )
    known = " or ".join(FORMATS[name][1] for name in KINDS[kind])
    raise BadRecordError(f"is not a record of {kind}: it has {has}; write {known}")


def describe_format(kind: str, location: str, found: str, record: Mapping[str, Any]) -> str:
    """Return a line about the format, and about the fields that are not read."""
    read = {*FORMATS[found][0], "input"} if found == "Alpaca" else {*FORMATS[found][0]}
    line = f"{kind}:{location}: the format is {found} ({', '.join(FORMATS[found][0])})"
    if found == "ShareGPT":
        line += ", converted to messages: human becomes user, gpt becomes assistant"
    if ignored := [name for name in record if name not in read]:
        line += f"; not read: {', '.join(ignored)}"
    return line


def read_messages(place: str, record: Mapping[str, Any]) -> Example:
    """Return a conversation, each of whose answers is trained on."""
    messages = check_messages("messages", record["messages"])
    if not any(is_trained(message) for message in messages):
        raise BadRecordError("has nothing to train on: no message of the role assistant, or all "
                             "with weight 0")  # fmt: skip
    return Example(place, (), (messages,))


def read_sharegpt(place: str, record: Mapping[str, Any]) -> Example:
    """Return a ShareGPT conversation as messages."""
    turns = record["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRecordError("has conversations that are not a list of objects")
    messages = []
    for number, turn in enumerate(turns, 1):
        if turn.get("from") not in SHAREGPT_ROLES:
            raise BadRecordError(
                f"has a turn {number} from {show(turn.get('from'))}; known: "
                f"{', '.join(SHAREGPT_ROLES)}"
            )
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")})
    return read_messages(place, {"messages": messages})


def read_completion(place: str, record: Mapping[str, Any]) -> Example:
    """Return a prompt and its completion."""
    return Example(
        place, check_prompt(record["prompt"]), (check_answer("completion", record["completion"]),)
    )


def read_alpaca(place: str, record: Mapping[str, Any]) -> Example:
    """Return an instruction, with its input after a blank line, and the output."""
    parts = [check_string("instruction", record["instruction"])]
    parts += [check_string("input", record.get("input") or "")]
    prompt = "\n\n".join(part for part in parts if part.strip())
    return Example(place, prompt, (check_answer("output", record["output"]),))


def read_label(place: str, record: Mapping[str, Any]) -> Example:
    """Return a text and its label."""
    text, label = check_string("text", record["text"]), record["label"]
    if not text.strip():
        raise BadRecordError("has an empty text")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise BadRecordError(f"has {show(label)} as its label, which must be text or an integer")
    return Example(place, text, label=label)


def read_preference(place: str, record: Mapping[str, Any]) -> Example:
    """Return a prompt, the answer that is preferred, and the other one."""
    answers = tuple(check_answer(name, record[name]) for name in ("chosen", "rejected"))
    if answers[0] == answers[1]:
        raise BadRecordError("has the same answer as chosen and as rejected")
    return Example(place, check_prompt(record["prompt"]), answers)


READERS: dict[str, Callable[[str, Mapping[str, Any]], Example]] = {
    "messages": read_messages,
    "ShareGPT": read_sharegpt,
    "prompt/completion": read_completion,
    "Alpaca": read_alpaca,
    "text/label": read_label,
    "prompt/chosen/rejected": read_preference,
}


def check_prompt(value: Any) -> str | tuple[Message, ...]:
    """Return a prompt: text, or messages that do not end with an answer."""
    if isinstance(value, str):
        return check_string("prompt", value)
    messages = check_messages("prompt", value)
    if messages[-1]["role"] == "assistant":
        raise BadRecordError("has a prompt that ends with an answer of the assistant")
    return messages


def check_answer(field: str, value: Any) -> str | tuple[Message, ...]:
    """Return a text that is not blank, or messages, the last one of the assistant."""
    if not isinstance(value, str):
        messages = check_messages(field, value)
        if not is_trained(messages[-1]):
            raise BadRecordError(f"has a {field} that does not end with an answer of the assistant")
        return messages
    if not value.strip():
        raise BadRecordError(f"has an empty {field}")
    return check_string(field, value)


def check_messages(field: str, value: Any) -> tuple[Message, ...]:
    """Return a list of messages as it is. Raises BadRecordError."""
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else kind_of(value)
        raise BadRecordError(f"holds {what} as its {field}, not a list of messages")
    for number, message in enumerate(value, 1):
        where = f"{field}, message {number}"
        if not isinstance(message, dict):
            raise BadRecordError(f"({where}) holds {kind_of(message)}, not an object")
        role, weight = message.get("role"), message.get("weight")
        if role not in ROLES:
            raise BadRecordError(f"({where}) has the role {show(role)}; known: {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise BadRecordError(f"({where}) has tool_calls, which are not supported")
        content = check_string(f"content of {where}", message.get("content"))
        if role == "assistant" and not content.strip():
            raise BadRecordError(f"({where}) is an empty answer")
        if weight not in (None, 0, 1):
            raise BadRecordError(f"({where}) has the weight {show(weight)}, which must be 0 or 1")
    return tuple(value)


def is_trained(message: Message) -> bool:
    """Return whether a message is an answer to train on: weight 0 excludes one."""
    return message["role"] == "assistant" and message.get("weight") in (None, 1)


def check_string(field: str, value: object) -> str:
    """Return a text that UTF-8 can hold. Raises BadRecordError."""

    def refuse(problem: str) -> None:
        raise BadRecordError(problem)

    return check_text(f"has a {field} that", value, refuse)


def read_texts(kind: str, location: str, data: sections.Data, refuse: Refuse) -> Iterator[Document]:
    """Yield the texts of each example as a document, for a tokenizer that learns from them."""
    for example in read_examples(kind, location, data, refuse, lambda _: None):
        yield Document(example.place, "\n".join(example_texts(example)))


def example_texts(example: Example) -> list[str]:
    """Return the texts of a prompt and of its answers."""
    texts: list[str] = []
    for part in (example.prompt, *example.answers):
        texts += [part] if isinstance(part, str) else [message["content"] for message in part]
    return texts


def identify_examples(kind: str, location: str, data: sections.Data) -> dict[str, Any]:
    """Return what tells the examples from any others."""
    container, path = split_container(location)
    if container in CONTAINERS:
        return {"container": container, **CONTAINERS[container][1](path, data)}
    return identify_files(kind, path, JSON_ENDINGS)


def readers(kind: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return `read` and `identify` as a Source has them."""

    def read(location: str, data: sections.Data, refuse: Refuse) -> Iterator[Document]:
        return read_texts(kind, location, data, refuse)

    def identify(location: str, data: sections.Data) -> dict[str, Any]:
        return identify_examples(kind, location, data)

    return read, identify
