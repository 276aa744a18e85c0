"""Numbers while it runs: JSONL, TensorBoard, one progress line, plots; FLOPs and MFU."""

import json
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from nanojaxgpt.model import GATED, ModelConfig
from nanojaxgpt.rehearse.chips import CHIPS

# Dense bfloat16 peak of one device in FLOP/s, by how device_kind begins. A device of TPU v2 and
# v3 is a core, half of a chip: 123 TFLOP/s a chip of v3, says Google Cloud's page; v2's figure is
# as remembered, and not compared with a source.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU v6e": CHIPS["v6e"].flops,
    "NVIDIA A100": CHIPS["a100"].flops,
    "NVIDIA H100": CHIPS["h100"].flops,
    "NVIDIA H200": CHIPS["h200"].flops,
}


def forward_flops(cfg: ModelConfig, seq_len: int) -> int:
    """Return the matmul FLOPs of one forward pass over one sequence of `seq_len` tokens.

    Two per multiply-add; attention counted as full T x T, as nanoGPT and PaLM do, so that MFU
    compares; norms, activations and the embedding's look-up left out.
    """
    q_dim, kv_dim = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    projections = cfg.embed_dim * (2 * q_dim + 2 * kv_dim)
    matrices = {"none": 0}.get(cfg.mlp, 3 if cfg.mlp in GATED else 2)
    layer = projections + matrices * cfg.embed_dim * cfg.mlp_dim
    weights = cfg.num_layers * layer + cfg.embed_dim * cfg.vocab_size
    return 2 * seq_len * weights + attention_flops(cfg, seq_len)


def attention_flops(cfg: ModelConfig, seq_len: int) -> int:
    """Return the part of `forward_flops` that multiplies queries, keys and values."""
    return 2 * seq_len * cfg.num_layers * 2 * seq_len * cfg.num_heads * cfg.head_dim


def train_flops(cfg: ModelConfig, seq_len: int) -> int:
    """Return the FLOPs of training on one sequence: the backward pass is twice the forward."""
    return 3 * forward_flops(cfg, seq_len)


def peak_flops(device_kind: str) -> float:
    """Return the peak of one device in FLOP/s; 0 where it is not known, as for CPUs."""
    names = [name for name in PEAK_FLOPS if device_kind.startswith(name)]
    return PEAK_FLOPS[max(names, key=len)] if names else 0.0


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run's metrics.jsonl; a line torn by a crash is left out."""
    path, records = Path(run) / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def validation_losses(run: Path) -> dict[int, float]:
    """Return the validation loss by step."""
    records = read_metrics(run)
    return {r["step"]: r["validation_loss"] for r in records if "validation_loss" in r}


class MetricsWriter:
    """Writes records to `metrics.jsonl` and TensorBoard; what a resumed run redoes is dropped."""

    def __init__(self, run: Path, start_step: int) -> None:
        from tensorboardX import SummaryWriter

        path = Path(run) / "metrics.jsonl"
        kept = [r for r in read_metrics(run) if r["step"] <= start_step]
        partial = path.with_name("metrics.partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(path)
        self.file = open(path, "a", buffering=1)  # noqa: SIM115
        self.board = SummaryWriter(str(Path(run) / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, **values: float) -> None:
        """Write one record."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close both files."""
        self.file.close()
        self.board.close()


class NoMetrics:
    """Stands for the writer and the progress line where another process writes them."""

    began = 0.0

    def write(self, step: int, **values: float) -> None:
        """Write nothing."""

    def step(self, step: int, values: dict[str, float]) -> None:
        """Show nothing."""

    def say(self, text: str) -> None:
        """Print nothing."""

    def close(self) -> None:
        """Close nothing."""


class Progress:
    """One line that rewrites itself on a terminal; elsewhere a plain line for each record."""

    def __init__(self, num_steps: int, start_step: int, out: TextIO | None = None) -> None:
        self.num_steps, self.start_step = num_steps, start_step
        self.out = out or sys.stdout
        self.live = self.out.isatty()
        self.width = 0
        self.began = 0.0  # set after the first step: what compiling took is no measure

    def step(self, step: int, values: dict[str, float]) -> None:
        """Show a training record."""
        left = ""
        if self.began and step > self.start_step + 1:
            per_step = (time.monotonic() - self.began) / (step - self.start_step - 1)
            left = f"  {duration(per_step * (self.num_steps - step))} left"
        mfu = f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
        speed = f"{values['tokens_per_second']:,.0f} tokens/s{mfu}"
        self._show(
            f"step {step:>{len(str(self.num_steps))}}/{self.num_steps}  loss {values['loss']:.4f}  "
            f"lr {values['learning_rate']:.2e}  {speed}{left}"
        )

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._clear()
        print(text, file=self.out, flush=True)

    def _show(self, text: str) -> None:
        if not self.live:
            return self.say(text)
        self.out.write("\r" + text.ljust(self.width))
        self.out.flush()
        self.width = len(text)

    def _clear(self) -> None:
        if self.live and self.width:
            self.out.write("\r" + " " * self.width + "\r")
            self.width = 0


def duration(seconds: float) -> str:
    """Return seconds as people say them: 42 s, 3 min 05 s, 2 h 07 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"


def plot_losses(records: Iterable[dict[str, Any]], path: Path, title: str) -> None:
    """Write the training and validation loss against the step as a PNG."""
    from matplotlib.figure import Figure

    records = list(records)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (
        ("loss", "training", {"linewidth": 1, "alpha": 0.6}),
        ("validation_loss", "validation", {"marker": "o", "markersize": 3}),
    ):
        points = [(r["step"], r[name]) for r in records if math.isfinite(r.get(name, math.nan))]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss in nats per token", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)
