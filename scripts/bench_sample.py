"""Measure cached decoding at GPT-2 small's shape beside `transformers`: tokens/s, greedy, float32.

    python scripts/bench_sample.py [--batch=1] [--threads=1]

A turn is `generate` of one whole call: prefill of the prompt and every new token. Random weights;
see bench_train.py for how the processes take turns.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable

from bench_train import before, print_table, take_turns, time_turns

WORKERS = ("nanojaxgpt", "transformers")
PROMPT_LEN = 32


def jax_generate(batch: int, new_tokens: int) -> Callable[[], None]:
    """Return a function that generates once with this project's model."""
    from nanojaxgpt.hosts import process

    process.keep_freed_memory()
    import jax
    import numpy as np

    from nanojaxgpt.config import base_config
    from nanojaxgpt.model.config import ModelConfig
    from nanojaxgpt.model.projection import decoding_params
    from nanojaxgpt.model.transformer import Transformer, init_params
    from nanojaxgpt.sample import Sampling, generate

    sizes = dict(num_layers=12, embed_dim=768, num_heads=12, seq_len=1024, vocab_size=50257)
    cfg = ModelConfig(**(base_config().model.to_dict() | sizes))
    fresh = jax.jit(lambda rng: init_params(cfg, rng))(jax.random.key(0))
    params = jax.jit(decoding_params, static_argnums=(0, 2))(cfg, fresh, batch)
    prompts_BT = np.random.default_rng(0).integers(0, 50257, (batch, PROMPT_LEN), np.int32)
    lengths_B, rng = np.full(batch, PROMPT_LEN, np.int32), jax.random.key(0)
    how = Sampling(temperature=0.0)

    def run() -> None:
        ids = generate(
            Transformer(cfg), params, prompts_BT, lengths_B, rng, max_tokens=new_tokens, how=how
        )
        assert ids.block_until_ready().shape == (batch, new_tokens)

    return run


def torch_generate(batch: int, new_tokens: int) -> Callable[[], None]:
    """Return a function that generates once with `transformers`' GPT-2 and its cache."""
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    prompts = torch.randint(0, 50257, (batch, PROMPT_LEN))
    settings = dict(do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None)

    def run() -> None:
        with torch.inference_mode():
            ids = model.generate(
                prompts, attention_mask=torch.ones_like(prompts), min_new_tokens=new_tokens,
                max_new_tokens=new_tokens, **settings,
            )  # fmt: skip
        assert ids.shape == (batch, PROMPT_LEN + new_tokens)

    return run


def work(name: str, batch: int, new_tokens: int) -> None:
    """Be a worker, whose turns are calls of `generate`."""
    run = (jax_generate if name == "nanojaxgpt" else torch_generate)(batch, new_tokens)
    run()
    time_turns(lambda count: run())


def main() -> None:
    """Parse the command line, run the workers, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="number of cores to use")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--python", default=sys.executable, help="the Python that has PyTorch")
    parser.add_argument("--before", default="", help="compare with this checkout of the project")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if args.worker:
        return work(args.worker, args.batch, args.new_tokens)
    flags = [f"--batch={args.batch}", f"--new-tokens={args.new_tokens}"]
    flags.append(f"--threads={args.threads}")
    commands = {}
    for name in WORKERS:
        python = sys.executable if name == "nanojaxgpt" else args.python
        commands[name] = [python, __file__, *flags, f"--worker={name}"]
    if args.before:
        commands = {
            "nanojaxgpt": commands["nanojaxgpt"],
            "before": before(args.before, __file__, flags),
        }
    seconds = take_turns(commands, dict.fromkeys(commands, 1), args.rounds)
    made = args.batch * args.new_tokens
    shape = {"batch": args.batch, "prompt": PROMPT_LEN, "new_tokens": args.new_tokens}
    print(json.dumps({**shape, "dtype": "float32", "threads": args.threads}))
    print_table({name: [made / s for s in times] for name, times in seconds.items()}, "tokens/s")


if __name__ == "__main__":
    main()
