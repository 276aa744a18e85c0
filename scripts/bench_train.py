"""Measure training steps beside PyTorch: `python scripts/bench_train.py [--shape=small]`.

Each framework runs in its own process, and they take turns, so that what else the machine does
falls on all alike: compare the ratios. PyTorch is `transformers`' GPT-2 with fused AdamW, eager
and compiled (`pip install -e .[interop]`); with `--nanogpt=FOLDER`, a checkout of nanoGPT, its
model, too. A step is forward, backward, clipping and AdamW. With `--before=FOLDER` it is another
checkout of this project instead.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SHAPES = {
    "small": {"num_layers": 4, "embed_dim": 128, "num_heads": 4, "seq_len": 64, "batch_size": 12},
    "medium": {"num_layers": 6, "embed_dim": 384, "num_heads": 6, "seq_len": 256, "batch_size": 4},
    "gpt2": {"num_layers": 12, "embed_dim": 768, "num_heads": 12, "seq_len": 512, "batch_size": 2},
}
VOCAB_SIZES = {"small": 65, "medium": 65, "gpt2": 50304}
WORKERS = ("nanojaxgpt", "torch eager", "torch compiled", "nanoGPT eager", "nanoGPT compiled")


def jax_step(shape: dict[str, int], dtype: str) -> tuple[Callable, Any, tuple]:
    """Return this project's own train_step, jitted, and its arguments: (step, state, others)."""
    from nanojaxgpt.hosts import process

    process.keep_freed_memory()
    import jax
    import numpy as np

    from nanojaxgpt.config import base_config, with_fields
    from nanojaxgpt.data.rows import Batch
    from nanojaxgpt.model.config import complete
    from nanojaxgpt.model.transformer import Transformer
    from nanojaxgpt.objectives.language import make_loss
    from nanojaxgpt.step import make_hyper, make_init, make_train_step

    sizes = {k: v for k, v in shape.items() if k != "batch_size"} | {"compute_dtype": dtype}
    changes = {f"model.{name}": value for name, value in sizes.items()}
    cfg = complete(with_fields(base_config(), changes))
    state, _ = jax.jit(make_init(cfg))(jax.random.key(0))
    loss = make_loss(Transformer(cfg.model), 1)
    step = jax.jit(make_train_step(loss, cfg.optim, cfg.model), donate_argnums=0)
    rng, size = np.random.default_rng(0), (shape["batch_size"], shape["seq_len"])
    tokens = rng.integers(0, shape["vocab_size"], size, np.int32)
    return step, state, (Batch(tokens, tokens, np.ones(size, np.float32)), make_hyper(cfg))


def jax_steps(shape: dict[str, int], dtype: str) -> Callable[[int], None]:
    """Return run(n), which trains n steps of this project's own train_step."""
    import jax

    step, state, others = jax_step(shape, dtype)

    def run(count: int) -> None:
        nonlocal state
        for _ in range(count):
            state, numbers = step(state, *others)
        jax.block_until_ready(numbers)

    return run


def torch_model(name: str, shape: dict[str, int], nanogpt: str) -> tuple[Any, Callable]:
    """Return a PyTorch model, and logits(model, tokens): of nanoGPT, or `transformers`' GPT-2."""
    sizes = {"n_embd": shape["embed_dim"], "n_layer": shape["num_layers"]}
    sizes |= {"n_head": shape["num_heads"], "vocab_size": shape["vocab_size"]}
    if name.startswith("nanoGPT"):
        sys.path.insert(0, nanogpt)
        import model as nano  # pyright: ignore[reportMissingImports]

        cfg = nano.GPTConfig(block_size=shape["seq_len"], dropout=0.0, bias=True, **sizes)
        return nano.GPT(cfg), lambda model, tokens: model(tokens, tokens)[0]
    import transformers

    cfg = transformers.GPT2Config(
        n_positions=shape["seq_len"], use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, **sizes,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(cfg), lambda model, tokens: model(tokens).logits


def torch_steps(
    name: str, shape: dict[str, int], dtype: str, nanogpt: str
) -> Callable[[int], None]:
    """Return run(n), which trains n steps of a PyTorch model, compiled if its name says so."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with contextlib.redirect_stdout(sys.stderr):  # nanoGPT prints what it makes
        model, logits_of = torch_model(name, shape, nanogpt)
    forward = torch.compile(model) if name.endswith("compiled") else model
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    tokens = torch.randint(0, shape["vocab_size"], (shape["batch_size"], shape["seq_len"]))

    def run(count: int) -> None:
        for _ in range(count):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = logits_of(forward, tokens)
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()

    return run


def work(name: str, shape: dict[str, int], dtype: str, nanogpt: str) -> None:
    """Be a worker, whose turns are training steps."""
    if name == "nanojaxgpt":
        run = jax_steps(shape, dtype)
    else:
        run = torch_steps(name, shape, dtype, nanogpt)
    run(3)
    time_turns(run)


def time_turns(run: Callable[[int], None]) -> None:
    """For each number on standard input, run as often and print the seconds: see `take_turns`."""
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        run(int(line))
        print(time.perf_counter() - began, flush=True)


def before(folder: str, script: str, flags: list[str]) -> list[str]:
    """Return the command of the worker that another checkout of this project has."""
    path = os.path.join(folder, "scripts", os.path.basename(script))
    return ["env", f"PYTHONPATH={folder}", sys.executable, path, *flags, "--worker=nanojaxgpt"]


def take_turns(commands: dict[str, list[str]], counts: dict[str, int], rounds: int) -> dict:
    """Return {name: seconds of each round}, the workers taking turns, one at a time."""
    workers = {
        name: subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, command in commands.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for name, worker in workers.items():
        if worker.stdout.readline().strip() != "ready":
            sys.exit(f"{name} did not start (PyTorch: pip install -e .[interop])")
    for _ in range(rounds):
        for name, worker in workers.items():
            worker.stdin.write(f"{counts[name]}\n")
            worker.stdin.flush()
            seconds[name].append(float(worker.stdout.readline()))
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return seconds


def print_table(rates: dict[str, list[float]], unit: str) -> None:
    """Print median, quartiles and ratio to the fastest other of each; the first is ours."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max(value for name, value in list(medians.items())[1:])
    print(f"{'':<24}{unit + ', median':>20}{'quartiles':>20}{'ratio':>8}")
    for name, values in rates.items():
        low, _, high = statistics.quantiles(values, n=4)
        print(f"{name:<24}{medians[name]:>20,.0f}{f'{low:,.0f} to {high:,.0f}':>20}"
              f"{medians[name] / best:>8.2f}")  # fmt: skip


def main() -> None:
    """Parse the command line, run the workers, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="number of cores to use")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds per turn, about")
    parser.add_argument("--python", default=sys.executable, help="the Python that has PyTorch")
    parser.add_argument("--nanogpt", default="", help="a checkout of nanoGPT, measured too")
    parser.add_argument("--only", default="", help="the others whose name begins so")
    parser.add_argument("--before", default="", help="compare with this checkout of the project")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    shape = SHAPES[args.shape] | {"vocab_size": VOCAB_SIZES[args.shape]}
    if args.worker:
        return work(args.worker, shape, args.dtype, args.nanogpt)
    flags = [f"--shape={args.shape}", f"--dtype={args.dtype}", f"--threads={args.threads}"]
    commands = {}
    for name in WORKERS[: None if args.nanogpt else 3]:
        if name != "nanojaxgpt" and not name.startswith(args.only):
            continue
        python = sys.executable if name == "nanojaxgpt" else args.python
        commands[name] = [python, __file__, *flags, f"--worker={name}"]
        commands[name] += [f"--nanogpt={args.nanogpt}"] if args.nanogpt else []
    if args.before:
        commands = {
            "nanojaxgpt": commands["nanojaxgpt"],
            "before": before(args.before, __file__, flags),
        }
    first = take_turns(commands, dict.fromkeys(commands, 5), 2)
    counts = {name: max(1, round(5 * args.seconds / min(t))) for name, t in first.items()}
    seconds = take_turns(commands, counts, args.rounds)
    tokens = shape["batch_size"] * shape["seq_len"]
    rates = {n: [counts[n] * tokens / s for s in values] for n, values in seconds.items()}
    print(json.dumps({**shape, "dtype": args.dtype, "threads": args.threads}))
    print_table(rates, "tokens/s")


if __name__ == "__main__":
    main()
