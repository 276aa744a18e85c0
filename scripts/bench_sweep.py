"""Measure one compiled sweep beside as many `train` commands: `python scripts/bench_sweep.py`.

Both are timed as whole processes, from the command to its end, with the corpus tokenized before.
The sweep runs before and after the separate runs, so that what else the machine does falls on
both. The losses of all steps and the fingerprints of the checkpoints are compared too.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
EXPERIMENT = """
from nanojaxgpt.config import load_module

quickstart = load_module("{root}/experiments/quickstart.py")
sweep = quickstart.sweep


def get_config():
    cfg = quickstart.get_config()
    cfg.data.tokenizer, cfg.data.cache_dir = "bytes", "{folder}/cache"
    cfg.model.num_layers, cfg.model.embed_dim = {layers}, {width}
    cfg.model.seq_len, cfg.train.batch_size = {seq_len}, {batch_size}
    cfg.train.num_steps, cfg.optim.warmup_steps = {steps}, 10
    cfg.eval.every_steps = cfg.checkpoint.every_steps = 0
    cfg.eval.batch_size, cfg.eval.num_batches = 32, 2
    return cfg
"""


def seconds(*arguments: str) -> np.ndarray:
    """Run `nanojaxgpt` in a process of its own; return what it took, by the wall and of the CPU."""
    began = clocks()
    command = [sys.executable, "-m", "nanojaxgpt", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return clocks() - began


def clocks() -> np.ndarray:
    """Return the time by the wall and of the children's CPU, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return np.array([time.perf_counter(), used.ru_utime + used.ru_stime])


def losses(run: Path) -> list[tuple[int, float]]:
    """Return every loss that a run logged, training and validation."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r.get("loss", r.get("validation_loss"))) for r in records]


def leaves(run: Path) -> dict[str, list]:
    """Return the fingerprint of every leaf of a run's last checkpoint."""
    steps = [path for path in (run / "checkpoints").iterdir() if path.name.isdigit()]
    newest = max(steps, key=lambda path: int(path.name))
    return json.loads((newest / "meta" / "metadata").read_text())["leaves"]


def main() -> None:
    """Parse the command line, run the sweep and the separate runs, print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seq_len", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--separate", type=int, default=16, help="how many of the 16 trials to run alone"
    )
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from nanojaxgpt.sweep.plan import load_trials, show_point

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        experiment = folder / "small.py"
        experiment.write_text(EXPERIMENT.format(root=ROOT, folder=folder, **vars(args)))
        trials = load_trials(str(experiment), {})
        config = f"--config={experiment}"
        seconds("prepare", config)
        sweeps = [seconds("sweep", "run", config, f"--dir={folder}/before")]
        alone = []
        for trial in trials[: args.separate]:
            values = [f"--config.{field}={value}" for field, value in trial.point.items()]
            alone.append(seconds("train", config, *values, f"--run={folder}/{trial.name}"))
            print(f"alone, {show_point(trial.point)}: {show(alone[-1])}", flush=True)
        sweeps.append(seconds("sweep", "run", config, f"--dir={folder}/after"))
        pairs = [
            (folder / trial.name, folder / "after" / "trials" / trial.name)
            for trial in trials[: args.separate]
        ]
        same = sum(losses(a) == losses(b) and leaves(a) == leaves(b) for a, b in pairs)
    total, sweep = np.mean(alone, axis=0) * len(trials), np.mean(sweeps, axis=0)
    print(f"{len(alone)} separate runs: {show(sum(alone))}; {len(trials)} of them: {show(total)}")
    print(f"one sweep of {len(trials)}: {show(sweeps[0])} before, {show(sweeps[1])} after")
    wall, cpu = total / sweep
    print(f"ratio {wall:.1f} by the wall, {cpu:.1f} of the CPU; {same} of {len(alone)} same bits")


def show(took: np.ndarray) -> str:
    """Return both times as text."""
    return f"{took[0]:.1f} s ({took[1]:.1f} s of CPU)"


if __name__ == "__main__":
    main()
