"""In: descriptions of benchmarks in JSON, and their files. Out: questions, as texts.

A template is a text with fields of a record in braces: "{question}\\nAnswer:", "{answers.0}",
"{ctx|capitalize}". One that is a single field may stand for a list. No code runs in it.
"""

import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from nanojaxgpt.console import warn
from nanojaxgpt.data.sources.documents import find_field
from nanojaxgpt.data.sources.files import identify_files, read_objects
from nanojaxgpt.data.sources.hub import identify_hub_rows, read_hub_rows
from nanojaxgpt.errors import ConfigError, DataError
from nanojaxgpt.names import unknown_name
from nanojaxgpt.regular import read_regular

CATALOG = Path(__file__).parent / "catalog"
HUB = "hf:"
FIELD = re.compile(r"\{([\w.]+)(?:\|(\w+))?\}")
FILTERS: dict[str, Callable[[str], str]] = {"capitalize": str.capitalize, "strip": str.strip}
# The templates that a kind needs.
KINDS: dict[str, tuple[str, ...]] = {
    "multiple_choice": ("context", "choices", "gold"),  # one context, several continuations
    "schema": ("context", "continuation", "gold"),  # several contexts, one continuation
    "cloze": ("context", "continuation"),  # one continuation, which greedy decoding may give
    "generate": ("context", "references"),
    "perplexity": ("continuation",),
}


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A task as data: where its records are, how they become prompts, and what is measured.

    `file` is JSON lines below the data folder, {field: text file} of files that are read line by
    line side by side, or hf:NAME[/CONFIG][@SPLIT].
    """

    name: str
    kind: str
    file: str | dict[str, str]
    context: str = ""
    choices: str | list[str] = ""
    gold: str = ""  # the number of the right one, or its text
    continuation: str = ""
    references: str | list[str] = ""
    replace: list[list[str]] = dataclasses.field(default_factory=list)  # [pattern, text], in texts
    delimiter: str = " "  # between a context and what follows it
    separator: str = "\n\n"  # after each example of a few-shot prompt
    description: str = ""  # before the first of them
    fewshot: int = 0
    fewshot_file: str | dict[str, str] = ""  # "": the file itself, without the question
    fewshot_answer: str = ""  # of an example; "": its right continuation, or first reference
    until: list[str] = dataclasses.field(default_factory=list)
    max_tokens: int = 256
    metrics: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # of texts
    metric: str = ""  # the one to compare with other people's results
    chance: float = -1.0  # what guessing reaches; -1: nothing
    source: str = ""
    licence: str = ""


class Question(NamedTuple):
    """A record as texts: contexts and what may follow each, or a context and its references.

    There is one context, or one for each continuation. `example` is the question with its answer,
    as few-shot prompts have it.
    """

    place: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    example: str


class Opened(NamedTuple):
    """A benchmark, the questions to ask, the examples to draw from, and its files' hash."""

    benchmark: Benchmark
    questions: list[Question]
    examples: list[Question]
    file_hash: str


def find_benchmarks(names: str) -> list[Benchmark]:
    """Return the benchmarks of comma-separated names: of the catalog, or FILE.json[:NAME].

    The name of a list stands for its members. Raises ConfigError.
    """
    catalog: dict[str, Any] = {}
    for path in sorted(CATALOG.glob("*.json")):
        catalog |= read_descriptions(path)
    found: dict[str, Benchmark] = {}
    waiting = [name.strip() for name in names.split(",") if name.strip()]
    while waiting:
        name, known = waiting.pop(0), catalog
        if ".json" in name:
            path, _, name = name.partition(":")
            known = read_descriptions(Path(path).expanduser())
            catalog = catalog | known
            waiting[:0] = [] if name else [key for key in known if not isinstance(known[key], list)]
            if not name:
                continue
        if name not in known:
            raise ConfigError(f"{unknown_name('task', name, list(known))}; known: "
                              f"{', '.join(sorted(known))}")  # fmt: skip
        if isinstance(known[name], list):
            waiting[:0] = known[name]
        else:
            found[name] = make_benchmark(name, known[name])
    if not found:
        raise ConfigError(f"--tasks names no task; known: {', '.join(sorted(catalog))}")
    return list(found.values())


def read_descriptions(path: Path) -> dict[str, Any]:
    """Return {name: description} of a file. Raises ConfigError."""
    try:
        found = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"the tasks of {path} can't be read: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(v, dict | list) for v in found.values()):
        raise ConfigError(f"{path} must hold an object of tasks, {{NAME: {{...}}}}")
    return found


def make_benchmark(name: str, fields: Mapping[str, Any]) -> Benchmark:
    """Return a checked benchmark. Raises ConfigError."""
    known = {field.name: field for field in dataclasses.fields(Benchmark)}
    for field in fields:
        if field not in known or field == "name":
            raise ConfigError(f"task {name}: {unknown_name('field', field, list(known))}")
    kind = fields.get("kind", "")
    if kind not in KINDS:
        raise ConfigError(f"task {name}: kind={kind!r} must be one of {', '.join(KINDS)}")
    needed = ("file", *KINDS[kind], *(["metrics"] if kind == "generate" else []))
    if missing := [field for field in needed if not fields.get(field)]:
        raise ConfigError(f"task {name}: kind={kind} needs {', '.join(missing)}")
    for field, value in fields.items():
        default = known[field].default
        kinds: Any = {float: (int, float), int: int}.get(type(default), (str, list, dict))
        if not isinstance(value, kinds):
            raise ConfigError(f"task {name}: {field}={value!r} has the wrong type")
    return Benchmark(name=name, **fields)


def open_benchmark(
    benchmark: Benchmark, data: Path, limit: int = 0, report: Callable[[str], None] = warn
) -> Opened:
    """Return a benchmark with its questions, the first `limit` (0: all). Raises DataError."""
    if str(benchmark.file).startswith(HUB):
        report(f"task {benchmark.name}: {benchmark.file} is downloaded where it is not cached")
    questions = list(read_questions(benchmark, benchmark.file, data))
    examples, files = questions, [benchmark.file]
    if benchmark.fewshot_file:
        examples = list(read_questions(benchmark, benchmark.fewshot_file, data))
        files.append(benchmark.fewshot_file)
    digest = hashlib.sha256()
    for file in files:
        for one in [file] if isinstance(file, str) else file.values():
            found = identify_hub_rows(one.removeprefix(HUB)) if one.startswith(HUB) else (
                identify_files("jsonl", str(data / one), ()))  # fmt: skip
            digest.update(json.dumps(found, sort_keys=True).encode())
    return Opened(benchmark, questions[: limit or None], examples, digest.hexdigest()[:16])


def read_questions(
    benchmark: Benchmark, file: str | Mapping[str, str], data: Path
) -> Iterator[Question]:
    """Yield the questions of a file. Raises DataError, naming the place of a bad record."""
    place = ""
    for place, record in read_rows_of(benchmark.name, file, data):
        try:
            yield make_question(benchmark, place, record)
        except (LookupError, ValueError) as error:
            raise DataError(f"{place}: task {benchmark.name}: {error.args[0]}") from None
    if not place:
        raise DataError(f"task {benchmark.name}: {file} has no records")


def read_rows_of(
    name: str, file: str | Mapping[str, str], data: Path
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (file:line, record) of a file, of several side by side, or of a dataset's rows."""

    def refuse(problem: str) -> NoReturn:
        raise DataError(f"task {name}: {problem}")

    files = [file] if isinstance(file, str) else list(file.values())
    for path in [data / one for one in files if not one.startswith(HUB)]:
        if not path.is_file():
            refuse(f"there is no file {path}; name the folder that has it with --data=FOLDER")
    if not isinstance(file, str):
        texts = [(data / one).read_text().splitlines() for one in files]
        if len(set(map(len, texts))) > 1:
            sizes = ", ".join(f"{one}: {len(t)}" for one, t in zip(files, texts, strict=True))
            refuse(f"its files differ in their number of lines ({sizes})")
        for number, lines in enumerate(zip(*texts, strict=True), 1):
            yield f"{data / files[0]}:{number}", dict(zip(file, lines, strict=True))
    elif file.startswith(HUB):
        yield from read_hub_rows(file.removeprefix(HUB), refuse)
    else:
        objects = read_objects("jsonl", str(data / file), "write one per line", refuse)
        yield from ((place, record) for _, place, record in objects)


def make_question(benchmark: Benchmark, place: str, record: Mapping[str, Any]) -> Question:
    """Return a record as a question. Raises ValueError, which says what is wrong with it."""

    def texts(template: str | Sequence[str]) -> tuple[str, ...]:
        found = fill_template(template, record)
        for pattern, text in benchmark.replace:
            found = [re.sub(pattern, text, one) for one in found]
        return tuple(found)

    contexts = texts(benchmark.context) if benchmark.context else ("",)
    ends = texts(benchmark.choices or benchmark.references or benchmark.continuation)
    if benchmark.kind == "schema":
        ends *= len(contexts)
    if benchmark.kind != "schema" and len(contexts) != 1:
        raise ValueError(f"it has {len(contexts)} contexts, where one is asked for")
    if not ends or not all(end.strip() for end in ends):
        raise ValueError("a choice or continuation is empty" if ends else "it has no choices")
    gold = 0
    if benchmark.gold:
        (text,) = texts(benchmark.gold)
        gold = int(text) if text.isdecimal() else ends.index(text) if text in ends else -1
        if not 0 <= gold < len(ends):
            raise ValueError(f"the right answer is {text!r}, which is none of {len(ends)} choices")
    if benchmark.kind == "perplexity":
        return Question(place, ("",), ends, 0, "")
    (answer,) = texts(benchmark.fewshot_answer) if benchmark.fewshot_answer else (ends[gold],)
    context = contexts[gold if benchmark.kind == "schema" else 0]
    return Question(place, contexts, ends, gold, context + benchmark.delimiter + answer)


def fill_template(template: str | Sequence[str], record: Mapping[str, Any]) -> list[str]:
    """Return the texts of a template, or of several. Raises ValueError for a missing field."""
    if not isinstance(template, str):
        return [text for one in template for text in fill_template(one, record)]

    def value(match: re.Match[str]) -> Any:
        found = find_value(record, match[1])
        return FILTERS[match[2]](str(found)) if match[2] else found

    if whole := FIELD.fullmatch(template):
        found = value(whole)
        return list(map(str, found)) if isinstance(found, list) else [str(found)]
    return [FIELD.sub(lambda match: str(value(match)), template)]


def find_value(record: Mapping[str, Any], name: str) -> Any:
    """Return a field, `a.b` within another, `a.0` of a list. Raises ValueError."""
    missing = object()
    found = find_field(dict(record), name, missing)
    if found is missing:
        above, _, index = name.rpartition(".")
        parent = find_field(dict(record), above, None)
        if isinstance(parent, list) and index.isdecimal() and int(index) < len(parent):
            return parent[int(index)]
        raise ValueError(f"it has no field {name!r}; it has {', '.join(record)}")
    if found is None:
        raise ValueError(f"its field {name!r} is null")
    return found


def few_shot(opened: Opened, number: int, count: int, seed: int) -> str:
    """Return the examples before a question, drawn by the seed; the question is none of them.

    Raises ConfigError where there are not enough.
    """
    benchmark, question = opened.benchmark, opened.questions[number]
    pool = [one for one in opened.examples if one.place != question.place]
    if count > len(pool):
        raise ConfigError(f"task {benchmark.name} has {len(pool)} examples for --fewshot={count}")
    drawn = random.Random(f"{seed}/{number}").sample(pool, count)
    texts = [one.example + benchmark.separator for one in drawn]
    return "".join([benchmark.description, *texts])
