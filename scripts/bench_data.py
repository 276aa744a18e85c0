"""Measure reading and tokenizing: `taskset -c 0 python scripts/bench_data.py [--tokenizer=...]`.

Reading: shuffled training rows through store and loader, beside an np.memmap of the same size at
random offsets, read as one-page scripts do (a slice per row, stacked) and by a single gather, the
least that any loader does. They take turns in one process, so compare the ratios. A packed batch
holds segments and positions too.
Tokenizing (`--tokenizer=gpt2:FOLDER`): this project's encode beside `tokenizers`' own batch encode
of the modules of Python's standard library, with as many threads as it likes.
"""

import argparse
import itertools
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nanojaxgpt.config import base_config, override_config, sections
from nanojaxgpt.data.loader import open_data
from nanojaxgpt.data.rows import make_train_rows
from nanojaxgpt.data.tokenizers import train_tokenizer

SHAPES = ((64, 1024), (1024, 64))  # (rows, context) of a batch: 65,536 tokens each


def write_corpus(folder: Path, num_documents: int) -> str:
    """Write documents of random letters, 1,000 on average, and return the source."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(6.4, 1, num_documents).astype(int) + 1
    letters = rng.integers(97, 123, int(lengths.sum()), np.uint8)
    for number, text in enumerate(np.split(letters, np.cumsum(lengths)[:-1])):
        (folder / f"{number:06}.txt").write_bytes(text.tobytes())
    return f"text:{folder}"


def plain_readers(
    path: Path, batch_size: int, seq_len: int
) -> tuple[Callable[[int], object], Callable[[int], object]]:
    """Return two functions read(step) that give int32 tokens and targets at random offsets."""
    rng, tokens = np.random.default_rng(0), np.memmap(path, np.uint16, "r")
    windows = np.lib.stride_tricks.sliding_window_view(tokens, seq_len + 1)

    def stack(step: int) -> object:
        starts = rng.integers(0, len(windows), batch_size)
        return [
            np.stack([tokens[start + shift :][:seq_len].astype(np.int32) for start in starts])
            for shift in (0, 1)
        ]

    def gather(step: int) -> object:
        rows_BT = windows[rng.integers(0, len(windows), batch_size)].astype(np.int32)
        return rows_BT[:, :-1], rows_BT[:, 1:]

    return stack, gather


def rate(read: Callable[[int], None], first: int, tokens: int, seconds: float = 0.3) -> float:
    """Return tokens/s of read(step) from the step `first` on."""
    start = time.perf_counter()
    for step in itertools.count(first):
        read(step)
        if (spent := time.perf_counter() - start) > seconds:
            return (step + 1 - first) * tokens / spent


def bench_reading(num_documents: int, rounds: int) -> None:
    """Print a table of reading."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text").mkdir()
        changes = {"data.source": write_corpus(folder / "text", num_documents),
                   "data.tokenizer": "bytes", "data.cache_dir": name}  # fmt: skip
        plain = folder / "plain.bin"
        size = 1_000 * num_documents
        np.random.default_rng(0).integers(0, 256, size).astype(np.uint16).tofile(plain)
        print("| M tokens/s | slices | gather | loader | to slices | to gather |")
        print("|---|---|---|---|---|---|")
        for packing, (batch_size, seq_len) in itertools.product(("wrap", "pack"), SHAPES):
            cfg = override_config(base_config(), changes | {"data.packing": packing})
            data = open_data(sections.Data(**cfg.data), folder, report=lambda _: None)
            [source] = data.train(seq_len)
            rows = make_train_rows((source,), batch_size, 0)
            slices, gather = plain_readers(plain, batch_size, seq_len)
            readers = {
                "slices": slices,
                "gather": gather,
                "loader": lambda step, rows=rows, size=batch_size: rows(step, 0, size),
            }
            found: dict[str, list[float]] = {name: [] for name in readers}
            for turn in range(rounds + 1):
                for reader, read in readers.items():
                    speed = rate(read, turn * 10_000, batch_size * seq_len)
                    found[reader] += [speed] if turn else []  # the first turn warms up
            medians = [statistics.median(speeds) / 1e6 for speeds in found.values()]
            ratios = [medians[2] / beside for beside in medians[:2]]
            cells = [f"{x:.1f}" for x in medians] + [f"{ratio:.2f}" for ratio in ratios]
            print(f"| {packing}, {batch_size} x {seq_len} | {' | '.join(cells)} |")


def bench_tokenizing(spec: str, rounds: int) -> None:
    """Print a table of tokenizing. `spec` is gpt2:FOLDER with the vocabulary and the merges."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    library = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8") for path in sorted(library.glob("*.py"))]
    size = sum(len(text.encode()) for text in texts)
    ours = train_tokenizer(spec, texts, 0)
    files = [str(path) for path in Path(spec.partition(":")[2]).iterdir()]
    [vocabulary] = [name for name in files if name.endswith(("encoder.json", "vocab.json"))]
    [merges] = [name for name in files if name.endswith(("vocab.bpe", "merges.txt"))]
    theirs = Tokenizer(models.BPE.from_file(vocabulary, merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoders = {
        "nanojaxgpt": lambda: [ours.encode(text) for text in texts],
        "tokenizers": lambda: theirs.encode_batch(texts, add_special_tokens=False),
    }
    found: dict[str, list[float]] = {name: [] for name in encoders}
    for _ in range(rounds):
        for name, encode in encoders.items():
            start = time.perf_counter()
            encode()
            found[name].append(size / 1e6 / (time.perf_counter() - start))
    medians = {name: statistics.median(speeds) for name, speeds in found.items()}
    print(f"| {len(texts)} modules, {size / 1e6:.1f} MB | MB/s |\n|---|---|")
    for name, speed in medians.items():
        print(f"| {name} | {speed:.2f} |")
    print(f"| ratio | {medians['nanojaxgpt'] / medians['tokenizers']:.2f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--tokenizer", default="", help="gpt2:FOLDER; default: measure reading only"
    )
    arguments = parser.parse_args()
    bench_reading(arguments.documents, arguments.rounds)
    if arguments.tokenizer:
        bench_tokenizing(arguments.tokenizer, arguments.rounds)
