"""In: the arguments of `nanojaxgpt chat`, then what the user types. Out: the model's turns."""

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from nanojaxgpt import config
from nanojaxgpt.arguments import Command, chosen_step, open_for_sampling
from nanojaxgpt.config.sections import Sample
from nanojaxgpt.console import warn
from nanojaxgpt.errors import ConfigError, UserError

if TYPE_CHECKING:
    from nanojaxgpt.language_model import LanguageModel

HELP = """\
/system TEXT       begin anew with this system prompt
/temperature X     sample at this temperature; 0: greedy
/retry             another answer to the last message
/undo              take back the last message and its answer
/save FILE         write the conversation as JSON
/quit              end, as Ctrl-D does; Ctrl-C stops an answer"""


def chat(arguments: list[str]) -> None:
    """Talk with a model in the terminal; --prompt=TEXT is the system prompt.

    A model without a chat template continues what is typed.
    """
    parsed, cfg = open_for_sampling("chat", chat.__doc__, arguments)
    from nanojaxgpt import language_model

    model = language_model.open_model(parsed.source, cfg, parsed.mesh, chosen_step(parsed), warn)
    system = "" if cfg.sample.prompt == Sample().prompt else cfg.sample.prompt
    talk = Conversation(model, system)
    if model.chat_template:
        _ = model.template  # refused before anything is typed
        warn(f"{model.run}: /help lists the commands")
    else:
        warn(f"{model.run} has no chat template: it continues what you type; /help for commands")
    for line in typed_lines():
        try:
            if line.startswith("/"):
                if obey(talk, *line.partition(" ")[::2]):
                    return
            elif line:
                talk.say(line)
        except UserError as error:
            warn(str(error))


def typed_lines() -> Iterator[str]:
    """Yield the lines that are typed, or read from a file, up to the end."""
    if sys.stdin is None:  # closed
        return
    if sys.stdin.isatty():
        import contextlib

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
    """The messages so far, and the session that answers."""

    def __init__(self, model: "LanguageModel", system: str = "") -> None:
        from nanojaxgpt.session import Session

        self.model, self.session = model, Session(model)
        self.sample = model.experiment.sample
        self.seed = self.sample.seed
        self.messages: list[dict[str, str]] = []
        self.begin(system)

    def begin(self, system: str) -> None:
        """Forget all messages; begin with a system prompt, unless it is empty."""
        self.messages = [{"role": "system", "content": system}] if system else []

    def say(self, text: str) -> None:
        """Print the model's answer to a message, as it is drawn; Ctrl-C ends it."""
        self.messages.append({"role": "user", "content": text})
        try:
            ids = self.prompt()
        except UserError:
            self.messages.pop()
            raise
        answer = ""
        for part in stoppable(self.answer(ids)):
            print(part, end="", flush=True)
            answer += part
        print(flush=True)
        self.messages.append({"role": "assistant", "content": answer})

    def prompt(self) -> list[int]:
        """Return the ids to answer. The oldest turns go where they don't fit the context.

        Raises ConfigError where the last message alone does not.
        """
        room = self.model.config.seq_len - min(64, self.model.config.seq_len // 2)
        while len(ids := self.encode()) > room:
            first = int(self.messages[0]["role"] == "system")
            if len(self.messages) <= first + 1:
                raise ConfigError(f"the message has {len(ids)} tokens, and the model a context of "
                                  f"{self.model.config.seq_len}; shorten it")  # fmt: skip
            del self.messages[first : first + 2]
            warn("the conversation fills the context: its oldest turn is left out")
        return ids

    def encode(self) -> list[int]:
        """Return the ids of the messages; without a template those of their texts."""
        if self.model.chat_template:
            return self.model.template.encode(self.messages)
        text = "".join(message["content"] for message in self.messages)
        return self.model.encode(text)

    def answer(self, ids: list[int]) -> Iterator[str]:
        """Yield the parts of an answer."""
        from nanojaxgpt.sample import Sampling
        from nanojaxgpt.text_stream import TextStream

        ends, sample, tokenizer = self.model.end_ids, self.sample, self.model.tokenizer
        stream = TextStream(tokenizer, ids, sample.stop, ends)
        how = Sampling(
            sample.temperature, sample.top_k, sample.top_p, sample.min_p, tokenizer.vocab_size, ends
        )
        drawn = self.session.draw(ids, sample.max_tokens, how, self.seed)
        self.seed += 1
        for new in drawn:
            yield stream.add(new)
            if stream.finish:
                return
        yield stream.close()

    def take_back(self) -> str:
        """Remove the last message and its answer; return the message. Raises ConfigError."""
        places = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            raise ConfigError("there is no message to take back")
        text = self.messages[places[-1]]["content"]
        del self.messages[places[-1] :]
        return text


def stoppable(parts: Iterator[str]) -> Iterator[str]:
    """Yield the parts, up to a Ctrl-C."""
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield from parts
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
