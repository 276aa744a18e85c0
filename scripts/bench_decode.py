"""Measure decoding on a CPU beside transformers and llama.cpp: `bench_decode.py MODEL`.

All have the same weights in the same precision, exported first, and answer the same prompts
greedily: a text that the answer copies, or one that it does not. llama.cpp also takes a .gguf file
in the types that it has. A turn reads `--batch` prompts at once and draws 64 tokens after each; see
bench_train.py for how the processes take turns. With lookahead, ours must draw the tokens that it
draws without.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bench_train import print_table, take_turns, time_turns

TOKENS, CONTEXT, LOOKAHEAD = 64, 512, 3
CODE = """\
def average(numbers):
    total = 0.0
    for number in numbers:
        total += number
    return total / len(numbers)


def largest(numbers):
    found = numbers[0]
    for number in numbers[1:]:
        if number > found:
            found = number
    return found
"""
TEXTS = {
    "copies": f"# File {{}}\n{CODE}\n# The same file once more\n{CODE[:40]}",
    "free": "Story {}: once there was a lighthouse on a rock in the sea, and its keeper told me",
}
EXPORTED, GIVEN = "model.gguf", "given.gguf"
LOOKUP, AS_GIVEN = "with prompt lookup", "llama.cpp, the file"


def ours(folder: Path, dtype: str, prompts: list[str], lookahead: int) -> Callable[[], None]:
    """Return a function that answers the prompts once with the engine."""
    from nanojaxgpt.hosts import process

    process.keep_freed_memory()
    from nanojaxgpt.arguments import open_model_config
    from nanojaxgpt.generate.drafts import Repeats
    from nanojaxgpt.generate.engine import Engine
    from nanojaxgpt.generate.requests import Request
    from nanojaxgpt.language_model import open_model

    flags = [str(folder), f"--config.model.compute_dtype={dtype}"]
    parsed, cfg = open_model_config("bench", "", flags, {})
    model = open_model(parsed.source, cfg)
    setattr(type(model), "end_ids", ())  # noqa: B010  all answers have the same length
    requests = [Request(tuple(model.encode(prompt)), TOKENS, temperature=0.0) for prompt in prompts]

    def answer(engine: Engine) -> list[tuple[int, ...]]:
        tickets = [engine.submit(request) for request in requests]
        return [ticket.result().ids for ticket in tickets]

    wanted: Any = None
    if lookahead:
        # Of bfloat16, a step of more rows has other last bits: there only the guesses are off.
        rows = 0 if dtype == "float32" else lookahead
        guess, Repeats.guess = Repeats.guess, lambda *_: []
        with Engine(model, slots=len(prompts), context=CONTEXT, lookahead=rows) as plain:
            wanted = answer(plain)
        Repeats.guess = guess
    engine = Engine(model, slots=len(prompts), context=CONTEXT, lookahead=lookahead)
    engine.start()

    def run() -> None:
        found = answer(engine)
        assert all(len(ids) == TOKENS for ids in found)
        assert wanted in (None, found)

    return run


def theirs(folder: Path, dtype: str, prompts: list[str], lookahead: int) -> Callable[[], None]:
    """Return a function that answers the prompts once with transformers' `generate`."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    kind = getattr(torch, dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=kind).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(prompt) for prompt in prompts])
    settings: dict[str, Any] = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    if lookahead:
        settings["prompt_lookup_num_tokens"] = lookahead

    def run() -> None:
        with torch.inference_mode():
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=TOKENS,
                max_new_tokens=TOKENS, **settings,
            )  # fmt: skip
        assert found.shape == (len(prompts), ids.shape[1] + TOKENS)

    return run


def llama_cpp(folder: Path, dtype: str, prompts: list[str], file: str) -> Callable[[], None]:
    """Return a function that answers the prompts once with llama.cpp, in the types of a file."""
    import xllamacpp

    how = xllamacpp.CommonParams()
    how.model.path, how.n_gpu_layers = str(folder / file), 0
    how.n_parallel, how.n_ctx = len(prompts), len(prompts) * CONTEXT
    how.cpuparams.n_threads = how.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    server = xllamacpp.Server(how)
    settings = {"n_predict": TOKENS, "temperature": 0, "ignore_eos": True, "cache_prompt": False}

    def answer(prompt: str) -> None:
        found = server.handle_completions({"prompt": prompt} | settings)
        assert found["usage"]["completion_tokens"] == TOKENS, found

    def run() -> None:
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(answer, prompts))

    return run


WORKERS: dict[str, Callable[[Path, str, list[str]], Callable[[], None]]] = {
    "nanojaxgpt": partial(ours, lookahead=0),
    "with lookahead": partial(ours, lookahead=LOOKAHEAD),
    "transformers": partial(theirs, lookahead=0),
    LOOKUP: partial(theirs, lookahead=LOOKAHEAD),
    "llama.cpp": partial(llama_cpp, file=EXPORTED),
    AS_GIVEN: partial(llama_cpp, file=GIVEN),
}


def main() -> None:
    """Export the model, and print a table of tokens per second."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=1, help="prompts at once")
    parser.add_argument("--text", choices=TEXTS, default="free")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    prompts = [TEXTS[args.text].format(number) for number in range(1, args.batch + 1)]
    if args.worker:
        run = WORKERS[args.worker](Path(args.model), args.dtype, prompts)
        run()
        return time_turns(lambda count: run())
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        export = [sys.executable, "-m", "nanojaxgpt", "export", args.model]
        for more in ([str(folder)], [str(folder / EXPORTED), "--format=gguf"]):
            subprocess.run([*export, *more, f"--dtype={args.dtype}"], check=True)
        skipped = {LOOKUP} if args.batch > 1 else set()  # it takes one row
        if args.model.endswith(".gguf"):
            (folder / GIVEN).symlink_to(Path(args.model).resolve())
        else:
            skipped.add(AS_GIVEN)
        flags = [str(folder), f"--dtype={args.dtype}", f"--batch={args.batch}"]
        flags.append(f"--text={args.text}")
        commands = {
            name: [sys.executable, __file__, *flags, f"--worker={name}"]
            for name in WORKERS
            if name not in skipped
        }
        seconds = take_turns(commands, dict.fromkeys(commands, 1), args.rounds)
    made = args.batch * TOKENS
    print(f"{args.text}, {args.dtype}, {args.batch} at once, {os.cpu_count()} cores")
    print_table({name: [made / s for s in times] for name, times in seconds.items()}, "tokens/s")


if __name__ == "__main__":
    main()
