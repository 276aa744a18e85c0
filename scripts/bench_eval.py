"""Measure requests scored per minute beside `lm_eval --model hf`: multiple choice, float32.

    python scripts/bench_eval.py FOLDER --file=arc_easy.jsonl [--questions=64] [--rounds=3]

FOLDER is a Hugging Face model (`nanojaxgpt export` writes one), the file has lines of query and
choices. Both answer the same requests of lm-eval in turns, after a first time that compiles; see
bench_train.py for how the processes take turns. Needs the extra `interop`.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_train import print_table, take_turns

WORKERS = {"nanojaxgpt": 0, "hf, batches of 8": 8, "hf, batches of 32": 32}


def read_requests(file: str, questions: int) -> list[Any]:
    """Return lm-eval's requests of the first questions."""
    from lm_eval.api.instance import Instance

    lines = [json.loads(line) for line in Path(file).read_text().splitlines()[:questions]]
    pairs = [(f"{line['query']}\nAnswer:", f" {one}") for line in lines for one in line["choices"]]
    return [Instance("loglikelihood", {}, pair, 0) for pair in pairs]


def open_worker(folder: str, batch_size: int) -> Any:
    """Return lm-eval's own model for a batch size, or ours for 0."""
    if batch_size:
        from lm_eval.models.huggingface import HFLM

        return HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=batch_size)
    from nanojaxgpt.evals.lm_eval import Adapter

    return Adapter(pretrained=folder)


def timed(name: str, run: Callable[[], object]) -> float:
    """Return the seconds that a call takes; print those of the CPU, which others can't lengthen."""
    began, cpu = time.perf_counter(), time.process_time()
    run()
    seconds = time.perf_counter() - began
    print(f"{name}: {seconds:.1f} s, {time.process_time() - cpu:.1f} s of CPU", file=sys.stderr)
    return seconds


def work(args: argparse.Namespace) -> None:
    """Be a worker: for each line on standard input, score all requests and print the seconds."""
    requests = read_requests(args.file, args.questions)
    model = open_worker(args.folder, WORKERS[args.worker])

    def run() -> None:
        assert len(model.loglikelihood(requests, disable_tqdm=True)) == len(requests)

    timed(f"{args.worker}, the first time", run)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(timed(args.worker, run), flush=True)


def main() -> None:
    """Let the workers take turns, and print their rates."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("--file", required=True)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    count = len(read_requests(args.file, args.questions))
    commands = {name: [sys.executable, *sys.argv, f"--worker={name}"] for name in WORKERS}
    seconds = take_turns(commands, dict.fromkeys(WORKERS, 1), args.rounds)
    rates = {name: [60 * count / one for one in own] for name, own in seconds.items()}
    print_table(rates, "requests/min")


if __name__ == "__main__":
    main()
