"""Measure the server beside `transformers serve` and llama.cpp's: `bench_serve.py MODEL`.

All serve the same float32 weights, which are exported to a folder and a GGUF file first, and stream
greedy answers of 32 tokens to 1, 8 and 32 clients at once, each in a process of its own, one after
the other. llama.cpp's server is that of the package xllamacpp, with as many slots as ours has.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import httpx

TOKENS, PORT, CLIENTS = 32, 8765, (1, 8, 32)
SLOTS, CONTEXT = 8, 256
GGUF = "model.gguf"
URL = f"http://127.0.0.1:{PORT}"
TOPICS = ("a lighthouse", "a fox", "the sea", "a mill", "an old road", "winter", "two sisters")


def commands(folder: Path) -> dict[str, list[str]]:
    """Return the command of each server."""
    here = Path(sys.executable).parent
    return {
        "nanojaxgpt": [
            sys.executable, "-m", "nanojaxgpt", "serve", str(folder), f"--port={PORT}",
            f"--slots={SLOTS}", f"--context={CONTEXT}",
        ],
        "transformers": [
            str(here / "transformers"), "serve", str(folder), f"--port={PORT}", "--dtype=float32",
            "--device=cpu",
        ],
        "transformers, continuous batching": [
            str(here / "transformers"), "serve", str(folder), f"--port={PORT}", "--dtype=float32",
            "--device=cpu", "--continuous-batching",
        ],
        "llama.cpp": [sys.executable, __file__, str(folder / GGUF), "--llama-cpp"],
    }  # fmt: skip


def serve_llama_cpp(path: str) -> None:
    """Be llama.cpp's server of a GGUF file."""
    import xllamacpp

    how = xllamacpp.CommonParams()
    how.model.path, how.hostnames, how.port, how.n_gpu_layers = path, ["127.0.0.1"], PORT, 0
    how.n_parallel, how.n_ctx = SLOTS, SLOTS * CONTEXT
    how.cpuparams.n_threads = how.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    server = xllamacpp.Server(how)
    while server.listening_address:
        time.sleep(1)


def ask(name: str, number: int) -> tuple[float, int]:
    """Stream one answer; return the seconds to its first text, and how many parts it had."""
    topic = TOPICS[number % len(TOPICS)]
    body = {
        "model": name, "messages": [{"role": "user", "content": f"Tell me a story of {topic}."}],
        "stream": True, "max_tokens": TOKENS, "temperature": 0,
    }  # fmt: skip
    began, first, parts = time.monotonic(), 0.0, 0
    with httpx.stream("POST", f"{URL}/v1/chat/completions", json=body, timeout=600) as found:
        if found.status_code != 200:
            raise SystemExit(f"{found.status_code}: {found.read()[:500]!r}")
        for line in found.iter_lines():
            if not line.startswith("data: {"):
                continue
            choices = json.loads(line.removeprefix("data: "))["choices"]
            if choices and choices[0]["delta"].get("content"):
                first = first or time.monotonic() - began
                parts += 1
    return first, parts


def measure(name: str, command: list[str], folder: Path) -> None:
    """Start a server, and print a line for each number of clients."""
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            wait_for(server, log)
            model = folder.name if name == "nanojaxgpt" else str(folder)
            ask(model, 0)
            for clients in CLIENTS:
                count = max(4, clients)
                began = time.monotonic()
                with ThreadPoolExecutor(clients) as pool:
                    found = list(pool.map(lambda number: ask(model, number), range(count)))
                took = time.monotonic() - began
                print(f"{name}, {clients} clients: {count / took:.2f} requests/s, "
                      f"{sum(parts for _, parts in found) / took:.1f} tokens/s, first text after "
                      f"{median(first for first, _ in found):.2f} s", flush=True)  # fmt: skip
        finally:
            server.terminate()
            server.wait()


def wait_for(server: subprocess.Popen, log: "tempfile._TemporaryFileWrapper") -> None:
    """Wait until a server answers. Raises SystemExit where it has ended."""
    while server.poll() is None:
        try:
            if httpx.get(f"{URL}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    log.seek(0)
    raise SystemExit(log.read().decode(errors="replace")[-2000:])


def main() -> int:
    """Export the model, and measure each server."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a model with a chat template")
    parser.add_argument("--only", default="", help="the servers whose name begins so")
    parser.add_argument("--llama-cpp", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.llama_cpp:
        serve_llama_cpp(parsed.model)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model"
        export = [sys.executable, "-m", "nanojaxgpt", "export", parsed.model, str(target)]
        subprocess.run([*export, "--dtype=float32"], check=True, env=os.environ)
        export = [*export[:-1], str(target / GGUF), "--format=gguf", "--dtype=float32"]
        subprocess.run(export, check=True, env=os.environ)
        for name, command in commands(target).items():
            if name.startswith(parsed.only):
                measure(name, command, target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
