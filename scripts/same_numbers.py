"""Train nine small configs for 20 steps with two checkouts of this project; compare every bit.

    python scripts/same_numbers.py BEFORE AFTER [--only=NAME]

BEFORE and AFTER are folders of the repository at two commits. Losses, parameters and optimizer
states must be equal bit for bit; exits 1 where one is not. Two minutes on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SMALL = {
    "model.num_layers": 4, "model.embed_dim": 64, "model.num_heads": 4, "model.seq_len": 64,
    "data.source": "stdlib", "data.tokenizer": "bytes", "eval.num_batches": 2, "eval.batch_size": 8,
    "train.batch_size": 8, "train.num_steps": 20, "train.log_every_steps": 1,
    "optim.warmup_steps": 5,
}  # fmt: skip
LLAMA = {
    "model.positions": "rotary", "model.norm": "rmsnorm", "model.mlp": "swiglu",
    "model.num_kv_heads": 2, "model.bias": False, "model.tied_head": False,
}  # fmt: skip
GPT2 = {
    "model.positions": "learned", "model.norm": "layernorm", "model.mlp": "gelu_tanh",
    "model.bias": True, "model.norm_bias": True, "model.num_kv_heads": 0,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "quickstart": {},
    "gpt2, dropout, accumulation": GPT2 | {"model.dropout": 0.1, "train.accumulation_steps": 2},
    "llama, packed": LLAMA | {"data.packing": "pack"},
    "muP, Muon": LLAMA | {"model.mup_base_dim": 32, "optim.optimizer": "muon"},
    "EMA": GPT2 | {"optim.ema_decay": 0.99},
    "fsdp=2 x tensor=2": LLAMA
    | {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.data": 1, "model.vocab_size": 264},
    "windows, one layer at a time": LLAMA
    | {"model.windows": "(0,16)", "model.unroll": 1, "model.remat": "full", "model.num_layers": 5},
    "post-norm, ALiBi, Adafactor": GPT2
    | {"model.norm_placement": "post", "model.positions": "alibi", "optim.optimizer": "adafactor"},
    "bfloat16, qk-norm, parallel": LLAMA
    | {"model.param_dtype": "bfloat16", "model.qk_norm": True, "model.parallel_block": True},
}


def train(checkout: Path, overrides: dict[str, Any], run: Path) -> None:
    """Train one config with the package of a checkout, in a process of its own."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "mesh.fsdp" in overrides:
        flags += " --xla_force_host_platform_device_count=4"
    fields = [f"--config.{name}={value}" for name, value in (SMALL | overrides).items()]
    command = [sys.executable, "-m", "nanojaxgpt", "train", f"--run={run}", *fields]
    experiment = f"--config={checkout / 'experiments' / 'quickstart.py'}"
    subprocess.run(
        [*command, experiment], cwd=checkout, check=True, stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(checkout), "XLA_FLAGS": flags},
    )  # fmt: skip


def read_losses(run: Path) -> list[tuple[float, ...]]:
    """Return step, loss and gradient norm of every record that has them."""
    names = ("step", "loss", "grad_norm", "validation_loss")
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [tuple(record.get(name, -1) for name in names) for record in records]


def read_leaves(run: Path) -> dict[str, np.ndarray]:
    """Return every array of the last checkpoint by its path."""
    import jax
    import orbax.checkpoint as ocp
    from absl import logging

    logging.set_verbosity(logging.ERROR)

    found, step = {}, run / "checkpoints" / "20"
    for item in ("params", "opt_state"):
        with ocp.PyTreeCheckpointer() as reader:
            metadata: Any = reader.metadata(step / item)
            whole = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.item_metadata.tree
            )
            tree = reader.restore(step / item, restore_args=whole)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            found[item + jax.tree_util.keystr(path, simple=True, separator="/")] = np.asarray(leaf)
    return found


def compare(name: str, runs: list[Path]) -> bool:
    """Print how two runs compare; return whether they are the same."""
    losses, leaves = [read_losses(run) for run in runs], [read_leaves(run) for run in runs]
    same = losses[0] == losses[1] and leaves[0].keys() == leaves[1].keys()
    moved = [
        path for path in leaves[0].keys() & leaves[1].keys()
        if leaves[0][path].tobytes() != leaves[1][path].tobytes()
    ]  # fmt: skip
    same = same and not moved
    verdict = "same bits" if same else f"DIFFERS: {losses[0] != losses[1]=}, {sorted(moved)[:5]}"
    print(
        f"{name:<32}{len(losses[0]):>4} records {len(leaves[0]):>4} arrays  {verdict}", flush=True
    )
    return same


def main() -> int:
    """Compare all configs; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--only", default="", help="configs whose name has this")
    parser.add_argument("--keep", type=Path, help="folder whose runs of BEFORE are used again")
    parsed = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        kept = parsed.keep or Path(scratch)
        for number, (name, overrides) in enumerate(CONFIGS.items()):
            if parsed.only not in name:
                continue
            runs = [kept / f"before-{number}", Path(scratch) / f"after-{number}"]
            for checkout, run in zip((parsed.before, parsed.after), runs, strict=True):
                if not (run / "checkpoints" / "20").exists():
                    train(checkout.resolve(), overrides, run)
            results.append(compare(name, runs))
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
