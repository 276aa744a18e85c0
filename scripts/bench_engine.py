"""Measure the engine beside LanguageModel.stream: `python scripts/bench_engine.py MODEL`.

Both answer the same prompts, 1, 8 and 32 at once, in turns: compare the ratios. Rates count
generated tokens and include reading the prompts, of some 20 tokens. "first" is the median time to
the first token, "host" the part of the time that the engine's thread spends outside the device's
functions.
"""

import argparse
import statistics
import time
from typing import Any

import nanojaxgpt
from nanojaxgpt.generate import slots as device
from nanojaxgpt.generate.device import PendingStep
from nanojaxgpt.generate.engine import Engine
from nanojaxgpt.generate.requests import Request
from nanojaxgpt.hosts import process
from nanojaxgpt.language_model import LanguageModel

STORY = "Once there were {} lighthouses on a rock in the sea, and a keeper told me this story:"


class Clock:
    """Adds up the seconds that functions take."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, owner: Any, name: str) -> None:
        """Time a function of a module or a class from now on."""
        function = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        setattr(owner, name, timed)


def answer_all(engine: Engine, requests: list[Request]) -> tuple[float, float]:
    """Return the tokens per second of all requests at once, and the median first token's time."""
    began = time.perf_counter()
    tickets = [engine.submit(request) for request in requests]
    made = sum(len(ticket.result().ids) for ticket in tickets)
    rate = made / (time.perf_counter() - began)
    return rate, statistics.median(ticket.first_token_seconds for ticket in tickets)


def stream_all(model: LanguageModel, prompts: list[list[int]], tokens: int) -> float:
    """Return the tokens per second of `stream` for these prompts."""
    began = time.perf_counter()
    for _ in model.stream(prompts, max_tokens=tokens, temperature=0.8):
        pass
    return len(prompts) * tokens / (time.perf_counter() - began)


def compare(model: LanguageModel, counts: list[int], tokens: int, rounds: int) -> None:
    """Print the rates of both for each number of requests."""
    clock = Clock()
    for name in ("advance", "read_chunks", "enter", "copy_slot"):
        clock.wrap(device, name)
    clock.wrap(PendingStep, "read")
    print(f"{'at once':>7} {'engine':>8} {'stream':>8} {'ratio':>6} {'first':>8} {'host':>6}")
    for count in counts:
        prompts = [model.encode(STORY.format(number)) for number in range(2, count + 2)]
        requests = [
            Request(tuple(ids), tokens, temperature=0.8, seed=seed)
            for seed, ids in enumerate(prompts)
        ]
        with Engine(model, slots=count) as engine:
            answer_all(engine, requests)
            stream_all(model, prompts, tokens)
            found = []
            for _ in range(rounds):
                clock.seconds, began = 0.0, time.perf_counter()
                rate, first = answer_all(engine, requests)
                host = 1 - clock.seconds / (time.perf_counter() - began)
                found.append((rate, stream_all(model, prompts, tokens), first, host))
        rate, other, first, host = map(statistics.median, zip(*found, strict=True))
        print(f"{count:>7} {rate:8.1f} {other:8.1f} {rate / other:6.2f} {first:7.2f}s {host:6.1%}",
              flush=True)  # fmt: skip


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a run directory, a Hugging Face folder or a .gguf file")
    parser.add_argument("--counts", default="1,8,32", help="requests at once")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    process.keep_freed_memory()
    model = nanojaxgpt.load(args.model)
    compare(model, [int(count) for count in args.counts.split(",")], args.tokens, args.rounds)


if __name__ == "__main__":
    main()
