"""In: the arguments of `nanojaxgpt chat`, then what the user types. Out: the model's turns."""

import contextlib
import json
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanojaxgpt import config
from nanojaxgpt.arguments import DRAFTING, Command, chosen_step, integer, open_for_sampling
from nanojaxgpt.config.sections import Sample
from nanojaxgpt.console import printable, warn
from nanojaxgpt.errors import ConfigError, DataError, UserError
from nanojaxgpt.hosts import process

if TYPE_CHECKING:
    from nanojaxgpt.generate.answers import Ticket
    from nanojaxgpt.generate.requests import Request
    from nanojaxgpt.language_model import LanguageModel

HELP = """\
/system TEXT       begin anew with this system prompt
/temperature X     sample at this temperature; 0: greedy
/retry             another answer to the last message
/undo              take back the last message and its answer
/save FILE         write the conversation as JSON
/quit              end, as Ctrl-D does; Ctrl-C stops an answer"""
OPTIONS: dict[str, dict[str, Any]] = {
    "context": {"default": 0, "type": integer(1), "help": "tokens of a conversation; default: the "
                "model's context, up to 2048"},
    **DRAFTING,
}  # fmt: skip


def chat(arguments: list[str]) -> None:
    """Talk with a model in the terminal; --prompt=TEXT is the system prompt.

    A model without a chat template continues what is typed.
    """
    parsed, cfg = open_for_sampling("chat", chat.__doc__, arguments, OPTIONS)
    from nanojaxgpt import language_model

    draft = language_model.load(parsed.draft, mesh=parsed.mesh) if parsed.draft else None
    model = language_model.open_model(parsed.source, cfg, parsed.mesh, chosen_step(parsed), warn)
    system = "" if cfg.sample.prompt == Sample().prompt else cfg.sample.prompt
    talk = Conversation(
        model, system, context=parsed.context, lookahead=parsed.lookahead, draft=draft
    )
    if model.chat_template:
        _ = model.template  # refused before anything is typed
        warn(f"{model.run}: /help lists the commands")
    else:
        warn(f"{model.run} has no chat template: it continues what you type; /help for commands")
    if sys.stdin and sys.stdin.isatty():
        talk.engine.start(wait=False)  # it compiles while the user types
    try:
        hold(talk)
    finally:
        talk.close()


def hold(talk: "Conversation") -> None:
    """Answer the lines that are typed, up to the end. Raises what the engine failed of."""
    for line in typed_lines():
        try:
            if line.startswith("/"):
                if obey(talk, *line.partition(" ")[::2]):
                    return
            elif line:
                talk.say(line)
        except UserError as error:
            if talk.engine.failed:
                raise
            warn(str(error))


def typed_lines() -> Iterator[str]:
    """Yield the lines that are typed, or read from a file, up to the end."""
    if sys.stdin is None:  # closed
        return
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lines can be edited and called back
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        try:
            line.encode()
        except UnicodeEncodeError:
            warn("this line is not valid UTF-8: it was left out")
            continue
        yield line.strip()


class Conversation:
    """The messages so far, and the engine that answers: what a turn has read, the next reuses.

    `options` are those of the engine.
    """

    def __init__(self, model: "LanguageModel", system: str = "", **options: Any) -> None:
        from nanojaxgpt.generate.engine import Engine

        self.model, self.engine = model, Engine(model, slots=1, **options)
        self.sample = model.experiment.sample
        self.seed = self.sample.seed
        self.messages: list[dict[str, str]] = []
        self.begin(system)

    def begin(self, system: str) -> None:
        """Forget all messages; begin with a system prompt, unless it is empty."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def say(self, text: str) -> None:
        """Print the model's answer to a message, as it is drawn; Ctrl-C ends it.

        Raises UserError; the message is then taken back.
        """
        self.messages.append({"role": "user", "content": text})
        answer = ""
        try:
            with stoppable(), contextlib.closing(self.answer(self.prompt())) as parts:
                for part in parts:
                    print(printable(part), end="", flush=True)
                    answer += part
        except UserError:
            self.messages.pop()
            raise
        print(flush=True)
        self.messages.append({"role": "assistant", "content": answer})

    def prompt(self) -> list[int]:
        """Return the ids to answer. The oldest turns go where they don't fit the context.

        Raises ConfigError where the last message alone does not, DataError where there are none.
        """
        context, kept = self.engine.context, list(self.messages)
        room = context - min(64, context // 2)
        while len(ids := self.encode(kept)) > room:
            first = int(kept[0]["role"] == "system")
            if len(kept) <= first + 1:
                raise ConfigError(f"the message has {len(ids)} tokens, and the context {context}; "
                                  "shorten it")  # fmt: skip
            del kept[first : first + 2]
        if len(kept) < len(self.messages):
            warn("the conversation fills the context: its oldest turns are left out")
            self.messages = kept
        if not ids:
            raise DataError("the chat template gives no token for this conversation")
        return ids

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the ids of messages; without a template those of their texts."""
        if self.model.chat_template:
            return self.model.template.encode(messages)
        return self.model.encode("".join(message["content"] for message in messages))

    def answer(self, ids: list[int]) -> Generator[str]:
        """Yield the parts of an answer. Raises what the engine failed of."""
        from nanojaxgpt.generate.requests import Request

        sample, part, drawn = self.sample, None, list[int]()
        ticket = self.submit(Request(
            tuple(ids), sample.max_tokens, sample.temperature, sample.top_k, sample.top_p,
            sample.min_p, self.seed, sample.stop,
        ))  # fmt: skip
        self.seed = (self.seed + 1) % (1 << 31)
        self.engine.start(wait=False)
        try:
            for part in ticket:
                yield part.text
                drawn += part.ids
        finally:
            ticket.cancel()
        if part and part.finish == "error":
            raise self.engine.failed or DataError(part.error)
        # The answer is read while the user types, as a part of the next prompt.
        self.submit(Request((*ids, *drawn)[: self.engine.context], max_tokens=0))

    def submit(self, request: "Request") -> "Ticket":
        """Return the ticket of a request. Raises what the engine failed of."""
        from nanojaxgpt.generate.requests import EngineFailed

        try:
            return self.engine.submit(request)
        except EngineFailed as error:
            raise self.engine.failed or error from None

    def close(self) -> None:
        """End the engine; where it still compiles, which can't be stopped, it is left."""
        if self.engine.ready:
            self.engine.close(drain=False)
        else:
            process.leave_threads()

    def take_back(self) -> str:
        """Remove the last message and its answer; return the message. Raises ConfigError."""
        places = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            raise ConfigError("there is no message to take back")
        text = self.messages[places[-1]]["content"]
        del self.messages[places[-1] :]
        return text


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Let Ctrl-C end the context, and nothing else."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGINT, old)


def obey(talk: Conversation, name: str, value: str) -> bool:
    """Run a command of a line; return whether it is the last. Raises ConfigError."""
    value = value.strip()
    if name in ("/quit", "/exit"):
        return True
    if name == "/help":
        warn(HELP)
    elif name == "/system":
        talk.begin(value)
    elif name == "/temperature":
        talk.sample = change(talk.sample, "temperature", value)
    elif name == "/retry":
        talk.say(talk.take_back())
    elif name == "/undo":
        talk.take_back()
    elif name == "/save":
        save(talk.messages, value)
    else:
        raise ConfigError(f"no command {name}\n{HELP}")
    return False


def change(sample: Sample, field: str, text: str) -> Sample:
    """Return the section with a field set from text. Raises ConfigError."""
    changed = config.override_config(config.with_fields(config.sections.Config(), {
        f"sample.{name}": value for name, value in sample.given().items()
    }), {f"sample.{field}": text})  # fmt: skip
    return changed.sample


def save(messages: list[dict[str, str]], name: str) -> None:
    """Write the conversation. Raises ConfigError where it can't be written."""
    if not name:
        raise ConfigError("/save needs a file: /save talk.json")
    try:
        Path(name).write_text(json.dumps(messages, indent=2, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ConfigError(f"can't write {name}: {error.strerror}") from error
    warn(f"saved {len(messages)} messages in {name}")


COMMANDS = {"chat": Command(chat, "MODEL", "talk with a model in the terminal", order=4)}
