"""What a server offers: models with their engines, its settings, and whether it takes requests."""

import dataclasses
import time
from collections.abc import Mapping
from typing import NamedTuple

from nanojaxgpt.errors import ConfigError
from nanojaxgpt.generate.device import Layouts
from nanojaxgpt.generate.engine import Engine
from nanojaxgpt.language_model import LanguageModel
from nanojaxgpt.server.exchange import Exchange
from nanojaxgpt.server.metrics import Metrics
from nanojaxgpt.server.refusals import Refusal
from nanojaxgpt.server.spelling import Spelling

LOADING_SECONDS = 5  # after which a client may ask again while the engines compile
FAILED_SECONDS = 3.0  # for which /health tells that an engine has failed


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a server listens, what it admits, and its engines."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free one
    api_key: str = ""  # "": none is asked for, on a loopback address alone
    slots: int = 8  # requests that are decoded together
    context: int = 0  # tokens of a prompt and its answer; 0: the model's, up to 2,048
    queue: int = 128  # requests that wait, at most
    lookahead: int = 0  # tokens guessed and verified at once
    seconds: float = 600.0  # for an answer, at most
    grace: float = 30.0  # seconds for answers to end in after SIGTERM
    log_prompts: bool = False


class Served(NamedTuple):
    """A model, its name in requests, and its engine."""

    name: str
    model: LanguageModel
    engine: Engine
    spelling: Spelling
    created: int


class Service:
    """The state of a server. Its methods but `warm_up` are for the event loop's thread."""

    def __init__(
        self,
        models: Mapping[str, LanguageModel],
        settings: Settings,
        draft: LanguageModel | None = None,
    ) -> None:
        self.settings, now = settings, int(time.time())
        for model in models.values():  # a template that can't be used is found before any request
            _ = model.chat_template and model.template
        layouts = Layouts()
        self.served = {
            name: Served(
                name,
                model,
                make_engine(name, model, settings, layouts, draft),
                Spelling(model.tokenizer),
                now,
            )
            for name, model in models.items()
        }
        self.metrics = Metrics({name: one.engine for name, one in self.served.items()})
        self.active: set[Exchange] = set()
        self.failure: BaseException | None = None
        self.failed_at = 0.0
        self.stop_at = 0.0  # when the answers that are left are given up; 0: it is not stopping

    def warm_up(self) -> None:
        """Compile what the engines need, then let them work."""
        try:
            for one in self.served.values():
                one.engine.start()
        except BaseException as error:  # the main thread reports it
            self.failure = error

    @property
    def state(self) -> str:
        """What the server does: loading, ok, stopping or failed."""
        engines = [one.engine for one in self.served.values()]
        if self.failure is None:
            self.failure = next((engine.failed for engine in engines if engine.failed), None)
        if self.failure is not None:
            return "failed"
        if self.stop_at:
            return "stopping"
        return "ok" if all(engine.ready for engine in engines) else "loading"

    def find(self, name: str | None) -> Served:
        """Return a model by its name, or the first. Raises Refusal."""
        if name is None:
            return next(iter(self.served.values()))
        if name not in self.served:
            known = ", ".join(self.served)
            raise Refusal(404, f"no model {name[:200]!r}; there is {known}", "model_not_found",
                          "model")  # fmt: skip
        return self.served[name]

    def admit(self) -> None:
        """Raise Refusal where no request is taken now."""
        if (state := self.state) == "ok":
            return
        told = {
            "loading": "the model is loading",
            "stopping": "the server is stopping",
            "failed": "the engine has stopped working",
        }
        code, after = f"server_{state}", LOADING_SECONDS if state != "failed" else 0
        raise Refusal(503, f"{told[state]}; try again later", code, retry_after=after)

    def stop(self) -> None:
        """Take no further requests; a second call gives up those that are answered."""
        now = time.monotonic()
        self.stop_at = now if self.stop_at else now + self.settings.grace

    def finished(self) -> bool:
        """Return whether there is nothing left to do. Gives up what takes too long."""
        now, state = time.monotonic(), self.state
        if state == "failed":
            self.failed_at = self.failed_at or now
            self.give_up(Refusal(500, "the engine has stopped working", "engine_failed"))
            return now > self.failed_at + FAILED_SECONDS
        if state == "stopping" and now >= self.stop_at:
            self.give_up(Refusal(503, "the server is stopping", "server_stopping"))
        return state == "stopping" and not self.active

    def give_up(self, refusal: Refusal) -> None:
        """End all that is being answered."""
        for exchange in list(self.active):
            exchange.fail(refusal)


def make_engine(
    name: str,
    model: LanguageModel,
    settings: Settings,
    layouts: Layouts,
    draft: LanguageModel | None,
) -> Engine:
    """Return the engine of a model, which `start` makes ready. Raises ConfigError."""
    try:
        return Engine(
            model, slots=settings.slots, context=settings.context, queue=settings.queue,
            lookahead=settings.lookahead, draft=draft, layouts=layouts,
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
