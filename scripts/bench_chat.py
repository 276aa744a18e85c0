"""Measure a chat's answers beside transformers: `python scripts/bench_chat.py FILE.gguf`.

Both read the same GGUF file and draw 64 greedy tokens after the same prompt, each in a process
of its own, in turns: compare the ratios. The first answer, which compiles, is left out.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TOKENS, ROUNDS, ANSWERS = 64, 2, 3
WORKERS = ("nanojaxgpt", "transformers")
MESSAGES = [{"role": "user", "content": "Tell me a story about a lighthouse."}]


def ours(path: Path) -> Callable[[], int]:
    """Return answer() -> how many tokens were drawn."""
    from nanojaxgpt.hosts import process

    process.keep_freed_memory()
    import nanojaxgpt
    from nanojaxgpt.sample import Sampling
    from nanojaxgpt.session import Session

    model = nanojaxgpt.load(path)
    ids = model.template.encode(MESSAGES)
    how = Sampling(temperature=0.0)
    return lambda: sum(len(part) for part in Session(model).draw(ids, TOKENS, how))


def theirs(path: Path) -> Callable[[], int]:
    """Return the same of transformers, in float32."""
    import torch
    import transformers

    read = dict(gguf_file=path.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, **read)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, **read, dtype=torch.float32
    ).eval()
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"]
    ids_BT = torch.tensor([ids])

    def answer() -> int:
        drawn = model.generate(
            ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=TOKENS,
            do_sample=False, eos_token_id=[],
        )  # fmt: skip
        return drawn.shape[1] - len(ids)

    return answer


def work(name: str, path: Path) -> None:
    """Print the tokens per second of each answer but the first, prefill included."""
    answer = ours(path) if name == WORKERS[0] else theirs(path)
    answer()
    for _ in range(ANSWERS):
        began = time.monotonic()
        print(answer() / (time.monotonic() - began))


def main() -> int:
    """Run the workers in turns, and print the median rate of each and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--worker", default="", choices=("", *WORKERS))
    parsed = parser.parse_args()
    if parsed.worker:
        work(parsed.worker, parsed.file)
        return 0
    rates: dict[str, list[float]] = {name: [] for name in WORKERS}
    for _ in range(ROUNDS):
        for name in WORKERS:
            command = [sys.executable, __file__, str(parsed.file), f"--worker={name}"]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rates[name] += map(float, done.stdout.split())
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, found in rates.items():
        low, high = min(found), max(found)
        print(f"{name:<13}{medians[name]:7.1f} tokens/s ({low:.1f} to {high:.1f})")
    print(f"ratio        {medians[WORKERS[0]] / medians[WORKERS[1]]:7.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
