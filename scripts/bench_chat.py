"""Measure a chat's answers beside others: `python scripts/bench_chat.py FILE.gguf`.

All read the same GGUF file and draw 64 greedy tokens after the same prompt, each in a process of
its own, in turns: compare the ratios. The first answer, which compiles, is left out. This package
and transformers compute in float32; llama.cpp (where the package xllamacpp is installed) in
float32, from an export of the same weights, and in the type of the file as it is.
"""

import argparse
import importlib
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOKENS, ROUNDS, ANSWERS = 64, 2, 3
MESSAGES = [{"role": "user", "content": "Tell me a story about a lighthouse."}]


def ours(path: Path) -> Callable[[], int]:
    """Return answer() -> how many tokens were drawn."""
    from nanojaxgpt.hosts import process

    process.keep_freed_memory()
    import nanojaxgpt
    from nanojaxgpt.generate.engine import Engine
    from nanojaxgpt.generate.requests import Request

    model = nanojaxgpt.load(path)
    engine, ids = Engine(model, slots=1), tuple(model.template.encode(MESSAGES))
    engine.start()
    banned = tuple((token, -100.0) for token in model.end_ids)  # theirs go on after an end, too
    request = Request(ids, TOKENS, temperature=0.0, logit_bias=banned)
    return lambda: len(engine.submit(request).result().ids)


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


def llama_cpp(path: Path) -> Callable[[], int]:
    """Return the same of llama.cpp, with the file's weights as they are and a float32 cache."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    how = xllamacpp.CommonParams()
    how.model.path, how.n_ctx, how.n_gpu_layers, how.n_parallel = str(path), 512, 0, 1
    how.warmup, how.verbosity = False, 0
    how.cpuparams.n_threads = how.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    how.cache_type_k = how.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    how.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(how)
    request = dict(messages=MESSAGES, max_tokens=TOKENS, temperature=0, cache_prompt=False,
                   ignore_eos=True)  # fmt: skip
    return lambda: server.handle_chat_completions(request)["usage"]["completion_tokens"]


ENGINES = {"nanojaxgpt": ours, "transformers": theirs, "llama.cpp": llama_cpp}


def work(name: str, path: Path) -> None:
    """Print the tokens per second of each answer but the first, prefill included."""
    answer = ENGINES[name](path)
    answer()
    for _ in range(ANSWERS):
        began = time.monotonic()
        count = answer()
        print(count / (time.monotonic() - began))
        assert count == TOKENS, count


def file_type(path: Path) -> str:
    """Return the type of most of a file's weights, such as Q4_1."""
    import gguf

    from nanojaxgpt.interchange.gguf_header import read_header

    number = read_header(path).metadata.get("general.file_type", 0)
    return gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")


def find_rows(path: Path, folder: Path) -> dict[str, tuple[str, Path]]:
    """Return (engine, file) of each row by its title; a float32 file is written into `folder`."""
    rows = {f"{name}, float32": (name, path) for name in ("nanojaxgpt", "transformers")}
    if not importlib.util.find_spec("xllamacpp"):
        print("without llama.cpp: install xllamacpp for it", file=sys.stderr)
        return rows
    kind, whole = file_type(path), folder / "float32.gguf"
    if kind != "F32":
        command = ["-m", "nanojaxgpt", "export", str(path), str(whole), "--format=gguf",
                   "--dtype=float32"]  # fmt: skip
        done = subprocess.run([sys.executable, *command], stderr=subprocess.PIPE, text=True,
                              stdout=subprocess.DEVNULL)  # fmt: skip
        if done.returncode:
            print(f"without llama.cpp in float32: {done.stderr.strip()}", file=sys.stderr)
        else:
            rows["llama.cpp, float32"] = "llama.cpp", whole
    return rows | {f"llama.cpp, {kind}": ("llama.cpp", path)}


def measure(rows: dict[str, tuple[str, Path]]) -> dict[str, list[float]]:
    """Return the rates of each row, drawn in turns."""
    rates: dict[str, list[float]] = {title: [] for title in rows}
    for _ in range(ROUNDS):
        for title, (name, path) in rows.items():
            command = [sys.executable, __file__, str(path), f"--worker={name}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{title}: {done.stderr[-2000:]}")
            rates[title] += map(float, done.stdout.split())
    return rates


def main() -> int:
    """Run the workers in turns, and print the median rate of each and its ratio to the first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--worker", default="", choices=("", *ENGINES))
    parsed = parser.parse_args()
    if parsed.worker:
        work(parsed.worker, parsed.file)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(find_rows(parsed.file, Path(folder)))
    first, *_ = (statistics.median(found) for found in rates.values())
    for title, found in rates.items():
        median, low, high = statistics.median(found), min(found), max(found)
        print(f"{title:<23}{median:7.1f} tokens/s ({low:.1f} to {high:.1f})  {median / first:5.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
