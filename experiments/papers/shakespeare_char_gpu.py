"""nanoGPT's GPU recipe on Tiny Shakespeare by characters: 10.7 M parameters, best loss 1.4697.

Source: nanoGPT's README and config/train_shakespeare_char.py (commit 3adf61e): 6 layers, 384 wide,
context 256, batch 64, dropout 0.2, 5,000 steps, about 3 minutes on an A100. The model over-fits:
its best loss comes early (nanoGPT's issue 211 reports 1.48 at step 1,750), and that it rises after
is part of the result. Here the loss is over the whole validation split, every 250 steps.

    nanojaxgpt reproduce experiments/papers/shakespeare_char_gpu.py

The corpus is that of shakespeare_char_cpu.py. Hardware: one GPU, minutes for each of 3
seeds; on a CPU it is NOT-RUN. Not run yet: no GPU was at hand.
"""

import math
from pathlib import Path
from typing import Any

from nanojaxgpt.config import load_experiment
from nanojaxgpt.papers.paper import Arm, Claim, Paper, Run

RECIPE = Path(__file__).parents[1] / "shakespeare_char.py"
SOURCE = "nanoGPT, README (commit 3adf61e)"
NUM_PARAMS = {"gpu": 10_745_088}


def losses(run: Run) -> dict[int, float]:
    """Return the validation loss by step."""
    return {r["step"]: r["validation_loss"] for r in run.records if "validation_loss" in r}


def best_loss(run: Run) -> float:
    """Return the lowest validation loss."""
    return min(losses(run).values())


def best_step(run: Run) -> int:
    """Return the step of the lowest validation loss."""
    found = losses(run)
    return min(found, key=lambda step: found[step])


def get_paper() -> Paper:
    """Return the recipe with three seeds: its best loss, when it comes, and the rise after it."""
    shared: dict[str, Any] = dict(arms=("gpu",))
    claims = (
        Claim("lowest validation loss", 1.4697, SOURCE, best_loss, (1.45, 1.50), **shared),
        Claim("step of the lowest loss", 1750, "nanoGPT, issue 211", best_step, (1000, 2500),
              **shared),
        Claim("loss at step 5000 less the lowest", "it over-fits", SOURCE,
              lambda run: run.at(5000) - best_loss(run), (0.1, math.inf), **shared),
    )  # fmt: skip
    arms = (Arm("gpu", load_experiment(f"{RECIPE}:gpu"), seeds=(0, 1, 2)),)
    return Paper(
        "nanoGPT's GPU recipe on Tiny Shakespeare", claims, arms, tokens="8a9d5828b2a8cc61",
        needs="a GPU or TPU (minutes on one)",
    )  # fmt: skip
