"""In: the arguments of `nanojaxgpt serve`. Out: models over HTTP, until a signal."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from nanojaxgpt import config
from nanojaxgpt.arguments import (
    DRAFTING,
    Command,
    chosen_step,
    integer,
    number,
    open_model_config,
)
from nanojaxgpt.console import warn
from nanojaxgpt.errors import ConfigError
from nanojaxgpt.hosts import process

KEY = "NANOJAXGPT_API_KEY"
OPTIONS: dict[str, dict[str, Any]] = {
    "host": {"default": "127.0.0.1", "help": "the address to listen on; one that other machines "
             "reach needs --api-key"},
    "port": {"default": 8000, "type": integer(0, 65535), "help": "default: 8000; 0: any free one"},
    "api-key": {"default": "", "help": f"the key that requests must have; default: ${KEY}"},
    "slots": {"default": 8, "type": integer(1, 1024), "help": "answers that are drawn at once"},
    "context": {"default": 0, "type": integer(1), "help": "tokens of a prompt and its answer; "
                "default: the model's context, up to 2048"},
    "queue": {"default": 128, "type": integer(1, 1 << 20), "help": "requests that wait, at most"},
    **DRAFTING,
    "seconds": {"default": 600.0, "type": number(0.1, 1e6), "help": "for an answer, at most"},
    "grace": {"default": 30.0, "type": number(0, 1e6), "help": "seconds for answers to end in "
              "after SIGTERM"},
    "log-prompts": {"action": "store_true", "help": "log the bodies of requests"},
}  # fmt: skip
OTHERS = {
    "others": {"metavar": "MODEL", "nargs": "*",
               "help": "more models, chosen by their name in requests"},
}  # fmt: skip


def serve(arguments: list[str]) -> None:
    """Serve models over HTTP, with the API of OpenAI, until SIGTERM or Ctrl-C."""
    parsed, cfg = open_model_config("serve", serve.__doc__, arguments, OPTIONS, OTHERS)
    if parsed.step and parsed.others:
        raise ConfigError("--step is for one model: leave it out, or serve one")
    from nanojaxgpt import language_model
    from nanojaxgpt.adapters import Bases
    from nanojaxgpt.interchange.opening import config_of, find_model
    from nanojaxgpt.server.running import listen, model_name, run
    from nanojaxgpt.server.service import Service, Settings

    parsed.api_key = parsed.api_key or os.environ.get(KEY, "")
    settings = Settings(**{one.name: getattr(parsed, one.name) for one in fields(Settings)})
    with listen(settings) as listening:
        draft = language_model.load(parsed.draft, mesh=parsed.mesh) if parsed.draft else None
        sources = {model_name(Path(parsed.run)): (parsed.source, cfg)}
        for path in parsed.others:
            if (name := model_name(Path(path))) in sources:
                raise ConfigError(f"two models are called {name}: rename the folder of one")
            source = find_model(path)
            sources[name] = source, config.override_config(config_of(source), parsed.overrides)
        models, bases = {}, Bases()
        for name, (source, own) in sources.items():
            step = chosen_step(parsed) if source is parsed.source else 0
            models[name] = language_model.open_model(source, own, parsed.mesh, step, warn, bases)
        process.leave_threads()  # XLA may be compiling when a signal comes
        run(Service(models, settings, draft), listening)


COMMANDS = {
    "serve": Command(serve, "MODEL [MODEL ...]", "serve models over HTTP, as OpenAI does", order=5)
}
