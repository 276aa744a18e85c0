"""In: a source of examples for fine-tuning. Out: shards of tokens and their weights."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from nanojaxgpt.config import sections
from nanojaxgpt.data import shards
from nanojaxgpt.data.chat import Encoded, encode_example
from nanojaxgpt.data.exactness import Loss, count_loss
from nanojaxgpt.data.shards import describe_file, token_dtype, write_whole
from nanojaxgpt.data.sources.documents import BadTexts
from nanojaxgpt.data.sources.records import Example, example_texts, read_examples
from nanojaxgpt.data.tokenizers import Tokenizer
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.interchange.templates import (
    LARGEST_TEMPLATE,
    PLAIN,
    ChatTemplate,
    TemplateError,
    open_template,
)
from nanojaxgpt.regular import read_regular

FORMAT = 1  # raise it whenever the same examples and template would give other ids or weights
NO_LOSS = Loss(0, 0, 0)
TEMPLATED = ("chat", "pairs", "preferences")


@dataclass
class Recipe:
    """How the examples of a source become tokens; what is found on the way is added."""

    kind: str
    location: str
    data: sections.Data
    template: str  # the text of a chat template, or ""
    labels: tuple[str, ...] = ()  # (): those of the source itself
    lossy: bool = False  # the tokenizer may alter texts
    ends: dict[int, int] = field(default_factory=dict)  # how often which id ends a document

    def key(self) -> dict[str, Any]:
        """Return what tells its tokens from others of the same source and tokenizer."""
        template = self.template if self.kind in TEMPLATED else ""
        return dict(format=FORMAT, template=template, labels=self.labels)


def find_template(data: sections.Data, own: str) -> str:
    """Return the text of the chat template that `data` asks for; `own` is the model's.

    Raises DataError where its file can't be read.
    """
    name = data.chat_template
    if name in ("", "none", "plain"):
        return {"": own, "none": "", "plain": PLAIN}[name]
    try:
        content = read_regular(Path(name).expanduser())
        if len(content) > LARGEST_TEMPLATE:
            raise DataError(f"data.chat_template={name} has {len(content):,} bytes, more than "
                            f"{LARGEST_TEMPLATE:,}")  # fmt: skip
        return content.decode()
    except OSError as error:
        raise DataError(f"data.chat_template={name} can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"data.chat_template={name} is not UTF-8: {error}") from error


def open_chosen(recipe: Recipe, tokenizer: Tokenizer) -> ChatTemplate | None:
    """Return the template of a recipe, tried if somebody else wrote it. Raises ConfigError."""
    if recipe.kind not in TEMPLATED or not recipe.template:
        if recipe.kind == "chat":
            raise ConfigError(
                f"chat:{recipe.location} needs a chat template, and the model has none: set "
                "data.chat_template=plain, or the path of a Jinja file"
            )
        return None
    if recipe.template != PLAIN:
        return open_template(recipe.template, tokenizer)
    if tokenizer.end_id < 0:
        raise ConfigError(
            "data.chat_template=plain needs a tokenizer with an end token, which "
            f"{tokenizer.kind} does not have; use data.tokenizer=bytes or sentencepiece"
        )
    return ChatTemplate(PLAIN, tokenizer)


def write_example_shards(
    folder: Path, recipe: Recipe, tokenizer: Tokenizer, bad: BadTexts
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Write the examples' tokens and weights into `folder`; return each shard and what they are.

    Raises DataError for an example that can't be used, unless `bad` skips it, and where nothing is
    trained on.
    """
    source, template = f"{recipe.kind}:{recipe.location}", open_chosen(recipe, tokenizer)
    labels = recipe.labels or find_labels(recipe, bad.skip)
    examples = encode_examples(recipe, tokenizer, template, labels, bad)
    found = list(write_all(folder, examples, tokenizer, recipe.kind == "labels"))
    bad.close(source)
    trained = sum(shard["trained"] for shard in found)
    if not trained:
        raise DataError(f"{source} has no example to train on; correct it or data.source")
    report_ends(recipe, tokenizer, template, bad)
    facts = dict(kind=recipe.kind, trained=trained, labels=labels, skipped=bad.count)
    return found, facts


def encode_examples(
    recipe: Recipe,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    labels: tuple[str, ...],
    bad: BadTexts,
) -> Iterator[tuple[tuple[Encoded, ...], Loss]]:
    """Yield the documents of each example that can be used, and what its texts lose."""
    numbers = {label: number for number, label in enumerate(labels)}
    bytes_V = tokenizer.token_bytes()
    for example in read_examples(recipe.kind, recipe.location, recipe.data, bad, bad.report):
        if labels and str(example.label) not in numbers:
            known = ", ".join(labels)
            bad(f"{example.place} has an unknown label, {example.label!r}; known: {known}")
            continue
        try:
            encoded = encode_example(recipe.kind, example, tokenizer, template, numbers)
        except TemplateError as error:
            bad(f"{example.place}: {error}")
            continue
        except DataError as error:
            raise DataError(f"{example.place}: {error}") from error
        for ids, _ in encoded:
            recipe.ends[ids[-1]] = recipe.ends.get(ids[-1], 0) + 1
        yield encoded, lost_by(tokenizer, bytes_V, example) if recipe.lossy else NO_LOSS


def lost_by(tokenizer: Tokenizer, bytes_V: np.ndarray, example: Example) -> Loss:
    """Return what the texts of an example lose as they become tokens."""
    total = np.zeros(len(NO_LOSS), np.int64)
    for text in example_texts(example):
        ids = tokenizer.encode(text)
        total += count_loss(tokenizer, text, ids, int(bytes_V[ids].sum()))
    return Loss(min(1, int(total[0])), *total[1:].tolist())


def find_labels(recipe: Recipe, skip: bool) -> tuple[str, ...]:
    """Return the labels of a source, sorted as numbers or by their spelling; () if it has none.

    Raises DataError where there is only one.
    """
    if recipe.kind != "labels":
        return ()
    quiet = BadTexts("skip" if skip else "error", lambda _: None)
    first: dict[str, Example] = {}
    found = read_examples(recipe.kind, recipe.location, recipe.data, quiet, lambda _: None)
    for example in found:
        first.setdefault(str(example.label), example)
    if len(first) == 1:
        (name,) = first
        raise DataError(f"labels:{recipe.location} has the one label {name!r}; classification "
                        "needs two")  # fmt: skip
    numeric = all(isinstance(example.label, int) for example in first.values())
    return tuple(sorted(first, key=int) if numeric else sorted(first))


def report_ends(
    recipe: Recipe, tokenizer: Tokenizer, template: ChatTemplate | None, bad: BadTexts
) -> None:
    """Say where a sampled answer would not stop: nothing ends it, or not the end token does."""
    if recipe.kind == "labels":
        return
    known = {i: name for name, i in (template.control if template else {}).items()}
    if unended := sum(n for i, n in recipe.ends.items() if i not in {*known, tokenizer.end_id}):
        bad.report(f"{unended:,} answers have no end token: a model won't learn where to stop")
    for number in recipe.ends.keys() & known.keys() - {tokenizer.end_id}:
        bad.report(f"answers end with {known[number]}, not with the tokenizer's end token: to stop "
                   f"there, set sample.end_ids=({number},)")  # fmt: skip


def write_all(
    folder: Path,
    examples: Iterator[tuple[tuple[Encoded, ...], Loss]],
    tokenizer: Tokenizer,
    labelled: bool,
) -> Iterator[dict[str, Any]]:
    """Write shards of whole examples; yield what describes each."""
    bytes_V, numbers = tokenizer.token_bytes(), count()
    held: list[Encoded] = []
    sums = np.zeros(1 + len(NO_LOSS), np.int64)  # bytes of text, and what was lost

    def describe() -> dict[str, Any]:
        path = folder / f"{next(numbers):05}.tokens"
        text_bytes, *lost = sums.tolist()
        counts = dict(text_bytes=text_bytes, **Loss(*lost)._asdict())
        return write_weighted(path, held, tokenizer) | counts

    for documents, loss in examples:
        held += documents
        size = sum(int(bytes_V[ids[: len(ids) - labelled]].sum()) for ids, _ in documents)
        sums += (size, *loss)
        if sums[0] >= shards.SHARD_BYTES:
            yield describe()
            held.clear()
            sums[:] = 0
    if held:
        yield describe()


def write_weighted(path: Path, documents: list[Encoded], tokenizer: Tokenizer) -> dict[str, Any]:
    """Write a shard's tokens, weights and its documents' lengths; return what describes it."""
    tokens = np.concatenate([ids for ids, _ in documents]).astype(token_dtype(tokenizer))
    weights = np.concatenate([weights for _, weights in documents]).astype(np.uint8)
    lengths = np.array([len(ids) for ids, _ in documents], "<i8")
    weights_path = path.with_suffix(".weights")
    write_whole(path, tokens.tobytes())
    write_whole(weights_path, weights.tobytes())
    write_whole(path.with_suffix(".lengths"), lengths.tobytes())
    return dict(
        file=path.name,
        tokens=len(tokens),
        documents=len(documents),
        trained=int(weights.sum()),
        **describe_file(path),
        weights=dict(file=weights_path.name, **describe_file(weights_path)),
    )


def describe_facts(facts: dict[str, Any], num_tokens: int) -> str:
    """Return what a store of examples says of itself, in one line."""
    line = f"{facts['kind']}: {facts['trained']:,} of {num_tokens:,} tokens are trained on "
    line += f"({facts['trained'] / num_tokens:.1%})"
    if facts["labels"]:
        line += f"; labels: {json.dumps(facts['labels'], ensure_ascii=False)}"
    return line + (f"; {facts['skipped']:,} bad examples were skipped" if facts["skipped"] else "")
