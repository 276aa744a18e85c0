"""Check this project on this machine's GPU: `python scripts/check_gpu.py [--json=check_gpu.json]`.

Every row runs in a process of its own, so that none ends another. The exit code is 0 if no row
failed, 1 if one did, 2 if there is no GPU. `--tiny` runs the same rows at tiny sizes on any
device. docs/gpu.md describes the rows.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
ROW_SECONDS = 1800.0
CASES = {"causal": {}, "windowed": {"window": 50}, "packed": {"packed": True}}
KERNELS = ("blocked", "library", "cudnn", "splash")
MEMORY_TOLERANCE = 0.25  # of the rehearsal's total


class Row(NamedTuple):
    """One line of the table. `state` is ok, missed (a goal), failed or skipped."""

    name: str
    state: str
    value: str
    numbers: dict[str, float]


class Skip(Exception):
    """A row can't be run here; the message says why."""


class Sizes(NamedTuple):
    """How large the rows are."""

    tiny: bool

    def pick(self, real: Any, tiny: Any) -> Any:
        """Return one of the two."""
        return tiny if self.tiny else real


def seconds_each(run: Callable[[], Any], count: int, rounds: int = 5) -> float:
    """Return the median seconds of `run`, each round of `count` calls in a row."""
    import jax

    jax.block_until_ready(run())
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(count):
            out = run()
        jax.block_until_ready(out)
        found.append((time.perf_counter() - began) / count)
    return statistics.median(found)


def matmul_rate(sizes: Sizes) -> float:
    """Return the FLOP/s of a square product in bfloat16, the largest of three sizes."""
    import jax
    import jax.numpy as jnp

    product, rates = jax.jit(lambda x, y: x @ y), []
    for n in sizes.pick((4096, 8192, 16384), (128, 256)):
        x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
        rates.append(2 * n**3 / seconds_each(lambda x=x: product(x, x), 10))
    return max(rates)


def memory_rate(sizes: Sizes) -> float:
    """Return the bytes/s at which an array is read and written."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros(sizes.pick(2**30, 2**20) // 4, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / seconds_each(lambda: add(x), 10)


def check_device(sizes: Sizes) -> Iterator[Row]:
    """Name the device, and measure its matmuls and its memory."""
    import jax

    from nanojaxgpt.flops import peak_flops

    device = jax.devices()[0]
    rates = {"matmul_flops": matmul_rate(sizes), "bytes_per_second": memory_rate(sizes)}
    sheet = peak_flops(device.device_kind)
    share = f" ({rates['matmul_flops'] / sheet:.0%} of the data sheet)" if sheet else ""
    text = f"{device.device_kind}, jax {jax.__version__}; matmul "
    text += f"{rates['matmul_flops'] / 1e12:.3g} TFLOP/s{share}, memory "
    yield Row("device", "ok", f"{text}{rates['bytes_per_second'] / 1e9:.4g} GB/s", rates)


def check_attention(sizes: Sizes, kernel: str) -> Iterator[Row]:
    """Compare a kernel's output and gradients with the formula in float32."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nanojaxgpt.attention import KERNELS, attend
    from nanojaxgpt.attention.request import Mask, Request

    length = sizes.pick(1024, 128)
    base = Request(
        jax.default_backend(), length, length, heads=4, key_heads=2, head_dim=64, dtype="bfloat16"
    )
    draw, order_1T = np.random.default_rng(0), jnp.arange(length)[None]
    shapes = [(2, length, heads, 64) for heads in (4, 2, 2, 4)]
    arrays = [jnp.asarray(draw.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    ends = draw.integers(1, length, (2, 2, 1))
    segments_BT = jnp.asarray((np.arange(length) >= ends).sum(1), jnp.int32)

    def gradients(name: str, request: Request, dtype: str) -> list[Any]:
        segments = segments_BT if request.packed else None
        mask = Mask(order_1T, order_1T, segments, segments, request.window)
        call = functools.partial(attend, mask=mask, scale=0.125, kernel=name)
        *qkv, grad = (array.astype(dtype) for array in arrays)
        out, pull = jax.vjp(call, *qkv)
        return [out, *pull(grad)]

    for case, changes in CASES.items():
        request, name = dataclasses.replace(base, **changes), f"attention {kernel}, {case}"
        reason = KERNELS[kernel].supports(request)
        if kernel == "splash" and request.platform == "gpu":
            reason = "splash is for TPUs, and interpreted elsewhere"
        if reason:
            yield Row(name, "skipped", reason, {})
            continue
        found = jax.jit(gradients, static_argnums=(0, 1, 2))(kernel, request, "bfloat16")
        exact = jax.jit(gradients, static_argnums=(0, 1, 2))("plain", request, "float32")
        errors = [
            float(jnp.max(jnp.abs(a - b.astype(jnp.float32))) / jnp.max(jnp.abs(a)))
            for a, b in zip(exact, found, strict=True)
        ]
        worst = max(errors) if all(map(math.isfinite, errors)) else math.inf
        state = "ok" if worst < 0.03 else "failed"
        yield Row(name, state, f"largest relative error {worst:.4f}", {"error": worst})


def gpt2(sizes: Sizes, name: str, rows: int, **changes: Any) -> Any:
    """Return the config of a GPT-2 for one device, `rows` sequences a step."""
    from nanojaxgpt.config import load_config, typed, with_fields
    from nanojaxgpt.model.config import complete

    cfg = typed(load_config(f"{ROOT}/experiments/gpt2.py:{name}"))
    fields = {
        "train.batch_size": rows, "train.accumulation_steps": 1, "mesh.data": 1, "mesh.fsdp": 1,
        "model.vocab_size": 50304, **changes,
    }  # fmt: skip
    tiny = {"model.num_layers": 2, "model.embed_dim": 64, "model.num_heads": 2,
            "model.seq_len": 64, "model.vocab_size": 256}  # fmt: skip
    return complete(with_fields(cfg, fields | sizes.pick({}, tiny)))


def open_step(cfg: Any) -> tuple[Callable[[], Any], Any]:
    """Return a function that trains one step on the first device, and its compiled program."""
    import jax
    import numpy as np

    from nanojaxgpt import sharding
    from nanojaxgpt.data.rows import Batch
    from nanojaxgpt.step import make_hyper, make_step

    mesh = sharding.make_mesh({}, jax.devices()[:1])
    shape = cfg.train.batch_size, cfg.model.seq_len
    tokens_BT = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape, np.int32)
    batch = Batch(tokens_BT, tokens_BT, np.ones(shape, np.float32))
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        step = make_step(cfg, mesh)
        state, frozen = step.init(jax.random.key(0))
        hyper = jax.device_put(make_hyper(cfg))
        program = step.train_step.lower(state, batch, hyper, frozen).compile()

    def run() -> Any:
        nonlocal state
        state, numbers = program(state, batch, hyper, frozen)
        return numbers

    return run, program


def check_training(sizes: Sizes, name: str, goal: float) -> Iterator[Row]:
    """Train GPT-2 in bfloat16 at T 1,024, with the most rows that fit; report tokens/s and MFU."""
    import jax

    from nanojaxgpt.flops import train_flops

    peak, remats = matmul_rate(sizes), ("none", "save=q,k,v,attention,o,up", "full")
    for rows, remat in itertools.product(sizes.pick((64, 32, 16, 8, 4), (4,)), remats):
        cfg = gpt2(sizes, name, rows, **{"model.remat": remat})
        try:
            run, _ = open_step(cfg)
            seconds = seconds_each(run, sizes.pick(5, 2))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            continue
        tokens = rows * cfg.model.seq_len / seconds
        mfu = tokens * train_flops(cfg.model, cfg.model.seq_len) / cfg.model.seq_len / peak
        numbers = {"tokens_per_second": tokens, "mfu_of_measured": mfu, "rows": float(rows)}
        text = f"{tokens:,.0f} tokens/s, {mfu:.1%} of the measured matmul (goal {goal:.0%}), "
        text += f"{rows} rows, remat {remat}"
        yield Row(f"train gpt2 {name}", "ok" if mfu >= goal else "missed", text, numbers)
        return
    raise Skip("not even 4 rows fit the memory")


def check_torch(sizes: Sizes) -> Iterator[Row]:
    """Train transformers' GPT-2 small, compiled, in bfloat16: tokens/s to compare with ours."""
    try:
        import torch
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise Skip(f"{error}: pip install -e .[interop]") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not sizes.tiny:
        raise Skip("PyTorch has no CUDA")
    shape = sizes.pick({}, dict(n_layer=2, n_embd=64, n_head=2, n_positions=64, vocab_size=256))
    rows = sizes.pick(16, 4)
    model = GPT2LMHeadModel(GPT2Config(**{"vocab_size": 50304} | shape, loss_type="ForCausalLM"))
    model = model.to(device)
    forward = model if sizes.tiny else torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    length = model.config.n_positions
    tokens = torch.randint(0, model.config.vocab_size, (rows, length), device=device)

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            with torch.autocast(device, torch.bfloat16):
                loss = forward(tokens, labels=tokens).loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        loss.item()  # waits for the device
        return (time.perf_counter() - began) / count

    run(3)
    rate = rows * length / statistics.median(run(sizes.pick(10, 2)) for _ in range(5))
    how = "eager" if sizes.tiny else "torch.compile"
    text = f"{rate:,.0f} tokens/s, {rows} rows, {how}, torch {torch.__version__}"
    yield Row("train gpt2 small, PyTorch", "ok", text, {"tokens_per_second": rate})


def check_decoding(sizes: Sizes, rows: int, goal: float = 0.7) -> Iterator[Row]:
    """Decode with a cache in bfloat16: tokens/s, and the share of the memory's bandwidth."""
    import jax
    import numpy as np

    from nanojaxgpt.model.transformer import Transformer, init_params
    from nanojaxgpt.sample import Sampling, generate

    cfg = gpt2(sizes, "small", 1, **{"model.param_dtype": "bfloat16"}).model
    params = jax.jit(lambda rng: init_params(cfg, rng))(jax.random.key(0))
    size, counts = sum(x.nbytes for x in jax.tree.leaves(params)), sizes.pick((32, 544), (8, 40))
    prompts_BT = np.random.default_rng(0).integers(0, 256, (rows, 8), np.int32)

    def call(count: int) -> Any:
        return generate(
            Transformer(cfg), params, prompts_BT, np.full(rows, 8, np.int32), jax.random.key(0),
            max_tokens=count, how=Sampling(temperature=0.0),
        )  # fmt: skip

    short, long = (seconds_each(lambda n=n: call(n), 1) for n in counts)
    each = max(long - short, 1e-9) / (counts[1] - counts[0])  # without the prefill
    kept = 2 * cfg.num_layers * rows * sum(counts) / 2 * cfg.num_kv_heads * cfg.head_dim * 2
    share = (size + kept) / each / memory_rate(sizes)
    numbers = {"tokens_per_second": rows / each, "share_of_bandwidth": share}
    text = f"{rows / each:,.0f} tokens/s, {share:.0%} of the measured bandwidth (goal {goal:.0%})"
    yield Row(
        f"decode gpt2 small, batch {rows}", "ok" if share >= goal else "missed", text, numbers
    )


def nanojaxgpt(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the project."""
    command = [sys.executable, "-m", "nanojaxgpt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def check_resume(sizes: Sizes) -> Iterator[Row]:
    """Train six steps; forget the last three and resume: the same losses and parameters."""
    with tempfile.TemporaryDirectory() as folder:
        run, again, corpus = Path(folder, "run"), Path(folder, "again"), Path(folder, "c.txt")
        corpus.write_text("".join(f"{n} times {n} is {n * n}.\n" for n in range(4000)))
        wide = sizes.pick((512, 8, 256, "bfloat16"), (32, 2, 32, "float32"))
        names = ("model.embed_dim", "model.num_heads", "model.seq_len", "model.compute_dtype")
        fields = dict(zip(names, wide, strict=True)) | {
            "data.source": f"text:{corpus}", "data.cache_dir": f"{folder}/cache",
            "data.tokenizer": "bytes", "train.num_steps": 6, "optim.warmup_steps": 2,
            "checkpoint.every_steps": 3, "eval.every_steps": 0, "mesh.data": 1,
        }  # fmt: skip
        flags = [f"--config.{name}={value}" for name, value in fields.items()]
        train = ["train", f"--config={ROOT}/experiments/quickstart.py", *flags]
        for target in (run, again):
            done = nanojaxgpt(*train, f"--run={target}")
            if done.returncode:
                raise RuntimeError(f"train ended with {done.returncode}: {done.stderr[-500:]}")
            if target == run:
                shutil.copytree(run, again)
                shutil.rmtree(again / "checkpoints" / "6")
        compared = nanojaxgpt("diff", str(run), str(again), "--check")
        same = compared.returncode == 0 and "resuming from step 3" in done.stdout
    text = "the bits of a run that was not stopped" if same else compared.stdout[-500:]
    yield Row("resume", "ok" if same else "failed", text, {})


def check_memory(sizes: Sizes) -> Iterator[Row]:
    """Compare the memory of a step of GPT-2 small with what `rehearse` predicts for the chip."""
    import jax

    device = jax.devices()[0]
    chips = [chip for chip in ("a100", "h100", "h200") if chip in device.device_kind.lower()]
    if not chips and not sizes.tiny:
        raise Skip(f"rehearse has no data sheet of {device.device_kind}")
    chip, rows = sizes.pick(chips and chips[0], "cpu"), sizes.pick(8, 4)
    cfg = gpt2(sizes, "small", rows)
    run, program = open_step(cfg)
    jax.block_until_ready(run())
    stats = program.memory_analysis()
    compiled = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    compiled += max(stats.output_size_in_bytes - stats.alias_size_in_bytes, 0)
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use", compiled)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rehearsal.json")
        fields = {f"model.{n}": getattr(cfg.model, n) for n in
                  ("num_layers", "embed_dim", "num_heads", "seq_len", "vocab_size")}  # fmt: skip
        fields |= {"train.batch_size": rows, "train.accumulation_steps": 1}
        done = nanojaxgpt(
            "rehearse", f"--config={ROOT}/experiments/gpt2.py:small", f"--topology={chip}:1",
            f"--json={path}", *(f"--config.{name}={value}" for name, value in fields.items()),
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"rehearse ended with {done.returncode}: {done.stderr[-500:]}")
        predicted = json.loads(path.read_text())[0]["memory"]["total"]
    ratio = peak / predicted
    numbers = {"peak_bytes": peak, "compiled_bytes": compiled, "predicted_bytes": predicted}
    text = f"peak {peak / 2**30:.3f} GiB, compiled {compiled / 2**30:.3f}, predicted "
    text += f"{predicted / 2**30:.3f}: {ratio:.2f} of it"
    state = "ok" if abs(ratio - 1) <= MEMORY_TOLERANCE else "missed"
    yield Row(f"memory against rehearse {chip}:1", state, text, numbers)


CHECKS: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "device": check_device,
    **{f"attention {name}": lambda s, name=name: check_attention(s, name) for name in KERNELS},
    "train small": lambda sizes: check_training(sizes, "small", 0.5),
    "train xl": lambda sizes: check_training(sizes, "xl", 0.55),
    "train torch": check_torch,
    "decode 1": lambda sizes: check_decoding(sizes, 1),
    "decode 8": lambda sizes: check_decoding(sizes, 8),
    "resume": check_resume,
    "memory": check_memory,
}


def work(name: str, sizes: Sizes) -> None:
    """Run one check in this process, and print its rows as lines of JSON."""
    try:
        for row in CHECKS[name](sizes):
            print(json.dumps(row), flush=True)
    except Skip as reason:
        print(json.dumps(Row(name, "skipped", str(reason), {})), flush=True)


def run_check(name: str, flags: list[str]) -> list[Row]:
    """Run one check in a process of its own, and return its rows; a failed one where it breaks."""
    command, rows = [sys.executable, __file__, f"--row={name}", *flags], list[Row]()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ROW_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return [Row(name, "failed", f"not done in {ROW_SECONDS:.0f} s", {})]
    for line in done.stdout.splitlines():
        if line.startswith("["):
            rows.append(Row(*json.loads(line)))
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        rows.append(Row(name, "failed", f"exit code {done.returncode}: {last[:300]}", {}))
    return rows


def find_gpu() -> str:
    """Return the platform that jax starts, asked of another process, which frees the memory."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return (found.stdout.split() or ["none"])[-1]


def main() -> int:
    """Parse the command line, run the checks, print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--only", default="", help=f"of {', '.join(CHECKS)}; separate by commas")
    parser.add_argument("--json", default="check_gpu.json", help="the file of the results")
    parser.add_argument("--row", choices=CHECKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        work(args.row, Sizes(args.tiny))
        return 0
    names = args.only.split(",") if args.only else list(CHECKS)
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"--only={unknown[0]!r}: no such check; there are {', '.join(CHECKS)}")
    platform = find_gpu()
    if platform != "gpu" and not args.tiny:
        reason = f"there is no GPU: jax runs on {platform}"
        print(f"{reason} (see docs/gpu.md; --tiny tests this script)", file=sys.stderr)
        return 2
    rows = list[Row]()
    for name in names:
        for row in run_check(name, ["--tiny"] * args.tiny):
            rows.append(row)
            print(f"{row.name:<32} {row.state:<8} {row.value}", flush=True)
    described = {"tiny": args.tiny, "platform": platform, "rows": [row._asdict() for row in rows]}
    Path(args.json).write_text(json.dumps(described, indent=2) + "\n")
    counts = {state: sum(row.state == state for row in rows)
              for state in ("ok", "missed", "failed", "skipped")}  # fmt: skip
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
