"""What the tests of the server share: a small model with a chat template, and requests."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
from conftest import byte_level_tokenizer

from nanojaxgpt import sharding
from nanojaxgpt.config import base_config, override_config
from nanojaxgpt.generate.answers import Ticket
from nanojaxgpt.generate.requests import Part, Request
from nanojaxgpt.language_model import LanguageModel
from nanojaxgpt.model.config import complete
from nanojaxgpt.model.transformer import init_params
from nanojaxgpt.server.running import Running, serve

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HELLO = [{"role": "user", "content": "Hello"}]
CONTEXT = 128
CLIENT = httpx.Client(timeout=120, limits=httpx.Limits(max_connections=400))


def make_model(template: str = TEMPLATE, seq_len: int = CONTEXT) -> LanguageModel:
    """Return a model with random weights, large enough that draws differ; it writes ASCII."""
    tokenizer = byte_level_tokenizer(["the user and the assistant"], CONTROL, 264, end_id=0)
    fields = {
        "num_layers": "2", "embed_dim": "32", "num_heads": "2", "seq_len": str(seq_len),
        "vocab_size": str(tokenizer.vocab_size), "positions": "rotary",
    }  # fmt: skip
    cfg = override_config(base_config(), {f"model.{key}": text for key, text in fields.items()})
    cfg = complete(cfg)
    params = jax.jit(lambda: init_params(cfg.model, jax.random.key(0)))()
    params = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, params)
    pieces = [tokenizer.piece(token) for token in range(tokenizer.vocab_size)]
    shown_V = np.array([piece.isascii() and piece.decode().isprintable() and bool(piece)
                        for piece in pieces])  # fmt: skip
    params["embed_VD"] = params["embed_VD"] * shown_V[:, None]
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    return LanguageModel(cfg.model, params, tokenizer, mesh, cfg, Path("tiny"), 0, template)


@contextlib.contextmanager
def serving(model: Any, **settings: Any) -> Iterator[Running]:
    """Serve a model on a free port; yield once requests are taken."""
    with serve(model, **{"port": 0, "slots": 4, "queue": 64} | settings) as running:
        wait_until(lambda: running.service.state == "ok", 60)
        yield running


def wait_until(condition: Any, seconds: float) -> None:
    """Wait for a condition. Fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def post(running: Any, path: str, body: Any, **how: Any) -> httpx.Response:
    """Send a body, as JSON unless it is bytes."""
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    headers = {"content-type": "application/json"} | how.pop("headers", {})
    return CLIENT.post(running.url + path, headers=headers, **given, **how)


def events(text: str) -> list[tuple[str, str]]:
    """Return (name, data) of server-sent events."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields.get("event", ""), fields["data"]))
    return found


class ScriptedEngine:
    """An engine that answers each request with the next parts of a script, none that it lacks."""

    slots, queue, context, busy, queued = 2, 8, CONTEXT, 0, 0
    compiles = prompt_tokens = generated_tokens = draft_tokens = accepted_tokens = 0

    def __init__(self, script: list[list[Part]], ready: bool = True) -> None:
        self.script, self.ready, self.failed = script, ready, None
        self.tickets: list[Ticket] = []
        self.refuses: Exception | None = None

    def start(self) -> None:
        """Do nothing."""

    def submit(self, request: Request, on_part: Callable[[Part], None]) -> Ticket:
        """Answer, or refuse."""
        if self.refuses:
            raise self.refuses
        ticket = Ticket(request, on_part, lambda: None)
        self.tickets.append(ticket)
        for part in self.script.pop(0):
            ticket.put(part)
        return ticket

    def close(self, drain: bool) -> None:
        """Do nothing."""
