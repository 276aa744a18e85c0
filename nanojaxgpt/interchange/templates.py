"""A model's own chat template: from messages to token ids.

A template is a program of somebody else. It runs in Jinja's sandbox, for at most SECONDS, and is
tried in a process of its own, with a limit on its memory, before it is used here.
"""

import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from nanojaxgpt.errors import DataError
from nanojaxgpt.extras import require_package

if TYPE_CHECKING:
    from nanojaxgpt.data.tokenizers import Tokenizer

FILE = "chat_template.jinja"  # as transformers calls it
SECONDS = 2.0
LARGEST_TEMPLATE = 1 << 16  # characters, or bytes of a file; the longest known has 12,000
LARGEST_TEXT = 1 << 22  # characters of a conversation, or of what a template repeats
MEMORY = 1 << 30  # bytes of the process in which a template is tried
# Stands in a text after the first character of what spells a control token. It is private use, so
# no text has it, and Jinja's filters leave it alone.
BREAK = "\U0010fffd"

# Spells the end token where a tokenizer does not. Messages lose it as they do BREAK.
END = "\U0010fffc"
# A template for a model that has none; it needs no control tokens but the end token.
PLAIN = """\
{% for message in messages %}
{% if message.role == 'system' %}
{{ message.content }}

{% elif message.role == 'user' %}
User:
{{ message.content }}

{% elif message.role == 'assistant' %}
Assistant:
{{ message.content }}{{ eos_token }}
{%- else %}
{{ raise_exception('the roles are system, user and assistant, not ' + message.role) }}
{%- endif %}
{% endfor %}
{% if add_generation_prompt %}
Assistant:
{% endif %}
"""

Message = Mapping[str, Any]  # role, content, and what else the template reads
TRIAL: tuple[Message, ...] = (
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
)


class TemplateError(DataError):
    """A chat template that can't be rendered, or not safely."""


class ChatTemplate:
    """The chat template of a model. Raises TemplateError where it can't be compiled."""

    def __init__(self, source: str, tokenizer: "Tokenizer") -> None:
        if len(source) > LARGEST_TEMPLATE:
            raise TemplateError(f"the chat template has {len(source):,} characters, more than "
                                f"{LARGEST_TEMPLATE:,}")  # fmt: skip
        self.tokenizer, self.control = tokenizer, dict(tokenizer.control)
        if tokenizer.end_id not in (-1, *self.control.values()):
            self.control[END] = tokenizer.end_id
        self.render_text = compile_template(source)

    def encode(self, messages: Sequence[Message], answer: bool = True) -> list[int]:
        """Return the ids of a conversation, with `answer` up to where the model's turn begins.

        Control tokens come from the template alone: what spells one in a message is text. Raises
        TemplateError.
        """
        return self.encode_text(self.text(messages, answer))

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of what `text` gives, or of a part of it."""
        ids: list[int] = []
        for part, token in split_control(text, self.control):
            plain = part.replace(BREAK, "")
            ids += self.tokenizer.encode(plain).tolist() if plain else []
            ids += [token] if token >= 0 else []
        return ids

    def text(self, messages: Sequence[Message], answer: bool = True) -> str:
        """Return the conversation as the template writes it, with BREAK in spelled tokens."""
        control = self.tokenizer.control
        spelled = {number: text for text, number in self.control.items()}
        names = dict(
            messages=[break_control(message, control) for message in messages],
            add_generation_prompt=answer,
            bos_token=spelled.get(self.tokenizer.start_id, ""),
            eos_token=spelled.get(self.tokenizer.end_id, ""),
        )
        return self.render_text(names)


def open_template(source: str, tokenizer: "Tokenizer") -> ChatTemplate:
    """Return a template after it was tried in another process. Raises TemplateError."""
    template = ChatTemplate(source, tokenizer)
    command = [sys.executable, "-I", "-c", TRY, json.dumps(sys.path)]
    try:
        tried = subprocess.run(
            command, input=json.dumps(source), capture_output=True, text=True, timeout=10 * SECONDS
        )
    except subprocess.TimeoutExpired:
        raise TemplateError(f"the chat template runs for more than {10 * SECONDS:.0f} s") from None
    if tried.returncode:
        said = tried.stderr.strip().split("\n")[-1][:300].removeprefix("refused: ")
        raise TemplateError(f"the chat template can't be used: {said or 'its process was ended'}")
    return template


# The resources are limited after the imports.
TRY = f"""
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from nanojaxgpt.interchange import templates
import resource
seconds = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime) + {int(2 * SECONDS)}
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
try:
    render = templates.compile_template(json.load(sys.stdin))
    render(dict(messages=list(templates.TRIAL), add_generation_prompt=True))
except Exception as error:
    sys.exit(f"refused: {{error}}")
"""


def compile_template(source: str) -> Callable[[dict[str, Any]], str]:
    """Return render(variables) -> text, within the limits. Raises TemplateError, as it does."""
    require_package("jinja2", "chat", "a chat template")
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        """The sandbox; products, powers and formats can't become large."""

        intercepted_binops = frozenset(["*", "**", "%"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            """Refuse those that repeat or format text, or make large numbers."""
            numbers = all(isinstance(v, int | float) and abs(v) < LARGEST_TEXT
                          for v in (left, right))  # fmt: skip
            if not numbers or (operator == "**" and abs(right) > 8):
                raise TemplateError(f"it uses {operator} on other than small numbers")
            return super().call_binop(context, operator, left, right)

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            """Refuse the methods that pad text to any width."""
            padding = isinstance(obj, str) and attr in PADDING
            return not padding and super().is_safe_attribute(obj, attr, value)

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", generation_tag()],
    )
    environment.filters = {k: v for k, v in environment.filters.items() if k not in REFUSED}
    environment.filters["tojson"] = compact_json
    environment.globals = {"raise_exception": refuse, "strftime_now": now, "namespace":
                           environment.globals["namespace"], "range": environment.globals["range"],
                           "dict": dict}  # fmt: skip
    try:
        template = environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise TemplateError(f"the chat template can't be read: {error}") from error

    def render(variables: dict[str, Any]) -> str:
        try:
            text = in_time(lambda: template.render(**variables))
        except TemplateError:
            raise
        except MemoryError:
            raise TemplateError("the chat template takes too much memory") from None
        except Exception as error:
            raise TemplateError(f"the chat template fails: {error}") from error
        if len(text) > LARGEST_TEXT:
            raise TemplateError(f"the chat template gives more than {LARGEST_TEXT:,} characters")
        return text

    return render


PADDING = ("center", "expandtabs", "ljust", "rjust", "zfill")
# Filters that fill up to any width, or do what no chat template needs.
REFUSED = ("center", "indent", "wordwrap", "format", "urlize", "xmlattr", "pprint", "random",
           "filesizeformat", "batch", "slice")  # fmt: skip


def generation_tag() -> Any:
    """Return the extension for {% generation %}, which marks the answers; here it adds nothing."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def compact_json(value: Any, indent: int | None = None, **how: Any) -> str:
    """Return JSON as transformers' templates expect it: not escaped for HTML or ASCII."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **how)


def refuse(message: str) -> NoReturn:
    """Raise what a template says of the messages."""
    raise TemplateError(f"the chat template refuses this conversation: {message}")


def now(form: str) -> str:
    """Return the date, as a template asks for it."""
    return datetime.now().strftime(form)


def peak_bytes() -> int:
    """Return the most bytes that this process has held; 0 where the system does not say."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def in_time(work: Callable[[], str]) -> str:
    """Return what `work` gives. Raises TemplateError where it takes longer than SECONDS."""
    end, most = time.thread_time() + SECONDS, peak_bytes() + MEMORY

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > end:
            raise TemplateError(f"the chat template runs for more than {SECONDS:.0f} s")
        if peak_bytes() > most:
            raise TemplateError("the chat template takes too much memory")
        return watch

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        return work()
    finally:
        sys.settrace(before)


def break_control(value: Any, control: Mapping[str, int]) -> Any:
    """Return a message, or a part of one, with BREAK in all that spells a control token."""
    if isinstance(value, Mapping):
        return {name: break_control(part, control) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [break_control(part, control) for part in value]
    if not isinstance(value, str):
        return value
    text = without_marks(value)
    for token in control:
        text = text.replace(token, token[:1] + BREAK + token[1:])
    return text


def without_marks(text: str) -> str:
    """Return a text without BREAK and END, which are no part of it."""
    return text.replace(BREAK, "").replace(END, "")


def split_control(text: str, control: Mapping[str, int]) -> list[tuple[str, int]]:
    """Return (text, the control token after it) of the parts of a text; -1 after the last."""
    if not control:
        return [(text, -1)]
    pieces = control_pattern(tuple(control)).split(text)
    pieces.append("")
    return [
        (before, control.get(token, -1))
        for before, token in zip(pieces[::2], pieces[1::2], strict=True)
    ]


@functools.lru_cache(16)
def control_pattern(spellings: tuple[str, ...]) -> re.Pattern[str]:
    """Return the pattern that finds control tokens, the longest first."""
    longest = sorted(spellings, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest))})")


def load_template(folder: Path) -> str:
    """Return the chat template in the folder `tokenizer` of a run, or "". Raises DataError."""
    try:
        return (folder / FILE).read_text()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise DataError(f"can't read {folder / FILE}: {error}") from error


def save_template(folder: Path, source: str) -> None:
    """Write the chat template beside a run's tokenizer, where the model has one."""
    if source:
        (folder / FILE).write_text(source)
