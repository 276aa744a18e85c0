"""In: the arguments of `nanojaxgpt generate`. Out: a file of prompts with their answers."""

import hashlib
import json
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanojaxgpt import config
from nanojaxgpt.arguments import DRAFTING, Command, chosen_step, integer, open_for_sampling
from nanojaxgpt.console import has_screen, warn, with_bar
from nanojaxgpt.errors import ConfigError, DataError, UserError, why
from nanojaxgpt.regular import check_regular
from nanojaxgpt.rundir import check_file

if TYPE_CHECKING:
    from nanojaxgpt.generate.answers import Ticket
    from nanojaxgpt.generate.engine import Engine
    from nanojaxgpt.generate.files import AnswerFile, Row

FILES = {
    "source_file": {
        "metavar": "IN",
        "help": "rows with prompt or messages: a .jsonl or .parquet file",
    },
    "target": {"metavar": "OUT", "help": "the file of answers; what is there is kept"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "slots": {"default": 8, "type": integer(1, 1024), "help": "answers that are drawn at once"},
    "context": {"default": 0, "type": integer(1), "help": "tokens of a prompt and its answer; "
                "default: the model's context, up to 2048"},
    **DRAFTING,
    "schema": {"default": "", "metavar": "FILE.json", "help": "a JSON schema that answers fit, but "
               "for rows with a schema of their own"},
}  # fmt: skip
AHEAD = 16  # rows for each slot that may be answered before the oldest is written


def generate(arguments: list[str]) -> None:
    """Answer every row of a file, many at once, and write the rows with their answers in order.

    Rerun the same command to resume it.
    """
    parsed, cfg = open_for_sampling(
        "generate", generate.__doc__, arguments, OPTIONS, FILES, ("prompt", "num_samples")
    )
    if not (parsed.source_file and parsed.target):
        raise ConfigError("generate needs a model and two files: "
                          "nanojaxgpt generate MODEL IN.jsonl OUT.jsonl")  # fmt: skip
    source, target = Path(parsed.source_file), Path(parsed.target)
    try:
        check_regular(source)
    except OSError as error:
        raise DataError(f"{source} can't be read: {error.strerror}") from error
    check_file("OUT", target)
    if target.exists() and target.samefile(source):
        raise ConfigError(f"IN and OUT are the same file, {source}")
    schema = read_schema_file(Path(parsed.schema)) if parsed.schema else ""
    from nanojaxgpt import language_model
    from nanojaxgpt.generate.engine import Engine
    from nanojaxgpt.generate.files import AnswerFile, read_prompts_file

    draft = language_model.load(parsed.draft, mesh=parsed.mesh) if parsed.draft else None
    step = chosen_step(parsed)
    model = language_model.open_model(parsed.source, cfg, parsed.mesh, step, warn)
    engine = Engine(
        model, slots=parsed.slots, context=parsed.context, queue=AHEAD * parsed.slots,
        lookahead=parsed.lookahead, draft=draft,
    )  # fmt: skip
    known = [str(model.run), model.step, config.config_hash(model.experiment), cfg.sample.given()]
    known += [engine.slots, engine.context, engine.lookahead]  # on which bits depend, too
    known += [schema] if schema else []
    settings = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
    answers = AnswerFile(target, settings)
    with answers.opened(source) as rows:
        before = answers.done
        if before:
            warn(f"{target}: {before:,} rows are there already")
        if parsed.schema:
            engine.grammars.begin(schema)  # one that can't be followed is reported once
        defaults = cfg.sample.given() | {"schema": schema}
        del defaults["prompt"], defaults["num_samples"]
        found = answer_rows(engine, rows, defaults, answers)
        total = sum(1 for _ in read_prompts_file(source)) if has_screen(sys.stderr) else 0
        for row in with_bar(found, "rows", total - before):
            answers.write(row)
    answers.finish()
    if answers.failed:
        raise DataError(f"{answers.failed:,} of {answers.done:,} rows have an error; see the field "
                        f"error in {target}")  # fmt: skip
    print(f"{target}: {answers.done:,} rows, {answers.done - before:,} new")


def read_schema_file(path: Path) -> str:
    """Return the text of a JSON schema. Raises ConfigError."""
    try:
        check_regular(path)
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--schema={path} can't be read: {why(error, path.parent)}") from error


def answer_rows(
    engine: "Engine",
    rows: Iterator[tuple["Row", str]],
    defaults: dict[str, Any],
    answers: "AnswerFile",
) -> Iterator["Row"]:
    """Yield the rows with their answers, in order, while later ones are drawn."""
    from nanojaxgpt.generate.files import answered, failed

    waiting: deque[tuple[Row, Ticket | str]] = deque()

    def oldest() -> "Row":
        row, found = waiting.popleft()
        if isinstance(found, str):
            return failed(row, found, answers.settings)
        part = found.result()
        if engine.failed:
            raise engine.failed
        return answered(row, part, found.request, answers.settings)

    try:
        for number, (row, problem) in enumerate(rows, answers.done):
            if engine.failed:
                raise engine.failed
            if not engine.ready:
                engine.start()
            if len(waiting) >= engine.queue:
                yield oldest()
            waiting.append((row, problem or submit(engine, row, defaults, number)))
        while waiting:
            yield oldest()
    finally:
        engine.close(drain=False)


def submit(engine: "Engine", row: "Row", defaults: dict[str, Any], number: int) -> "Ticket | str":
    """Return the ticket of a row, or what is wrong with it.

    Rows without a seed have one each, the default plus their number from 0.
    """
    from nanojaxgpt.generate.files import row_request

    seed = (defaults["seed"] + number) % (1 << 31)
    try:
        return engine.submit(row_request(row, engine.model, {**defaults, "seed": seed}))
    except (UserError, TypeError) as error:
        return str(error)


COMMANDS = {
    "generate": Command(
        generate, "MODEL IN.jsonl OUT.jsonl", "answer every row of a file", order=4,
        writes_files=True,
    )
}  # fmt: skip
