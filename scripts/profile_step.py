"""Say where the time of a training step goes, op by op: `profile_step.py [--shape=small]`.

jax's profiler times every operation of the compiled step on one core. An operation is a matmul
where it, or the fusion that it names, holds a product; the others are listed by the names that jax
gave them.
"""

import argparse
import gzip
import json
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

from bench_train import SHAPES, VOCAB_SIZES, jax_step

NAME = re.compile(r'op_name="jit\(train_step\)/([^"]*)"')
HOLLOW = re.compile(r"Transformer\.scan_layers/|eval_jaxpr/|Layer/layers/|layers\.")
LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = ")


def operations(text: str) -> dict[str, tuple[bool, str]]:
    """Return {operation: (whether it is a product, where it came from)} of a compiled program."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")) and line.endswith("{"):
            name = line.split()[1 if line.startswith("ENTRY") else 0].strip("%")
        bodies.setdefault(name, []).append(line)
    products = {name for name, body in bodies.items() if any(" dot(" in line for line in body)}
    found = {}
    for line in (line for body in bodies.values() for line in body):
        if made := LINE.match(line):
            called = re.search(r"calls=%?([\w.-]+)", line)
            is_product = " dot(" in line or bool(called and called[1] in products)
            name = NAME.search(line)
            found[made[1]] = is_product, HOLLOW.sub("", name[1]) if name else "no name"
    return found


def main() -> None:
    """Profile the step; print milliseconds of products, and of what else takes most."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    shape = SHAPES[args.shape] | {"vocab_size": VOCAB_SIZES[args.shape]}
    step, state, others = jax_step(shape, args.dtype)
    import jax

    known = operations(step.lower(state, *others).compile().as_text())
    for _ in range(2):
        state, numbers = step(state, *others)
    jax.block_until_ready(numbers)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(args.steps):
                state, numbers = step(state, *others)
            jax.block_until_ready(numbers)
        (path,) = Path(folder).glob("**/*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    times: Counter[tuple[bool, str]] = Counter()
    for event in events:
        if name := event.get("args", {}).get("hlo_op"):
            times[known.get(name, (False, "unknown"))] += event["dur"] / 1e3 / args.steps
    total = sum(times.values())
    print(f"{total:8.1f} ms a step")
    for kind, title in ((True, "products"), (False, "the rest")):
        own = {name: ms for (is_product, name), ms in times.items() if is_product == kind}
        print(f"{sum(own.values()):8.1f} ms {sum(own.values()) / total:6.1%}  {title}")
        for name, ms in sorted(own.items(), key=lambda item: -item[1])[:12]:
            print(f"{ms:8.1f} ms {ms / total:6.1%}    {name}")


if __name__ == "__main__":
    main()
