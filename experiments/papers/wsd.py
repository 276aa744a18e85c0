"""A constant learning rate with a short cooldown ends as low as a cosine; without one it does not.

Paper: Hagele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
Durations" (arXiv:2405.18392): at 33 M to 360 M parameters, a cooldown over the last 20 % of the
steps is an "almost perfect match" of the cosine. Here nanoGPT's CPU model on Tiny Shakespeare, 500
steps, each schedule at the best of three learning rates, three seeds.

    nanojaxgpt reproduce experiments/papers/wsd.py

The corpus is that of shakespeare_char_cpu.py. The cosine ends at 10 % of its peak, the
cooldown at 0, as in the paper. Until it begins, at step 400, it is the constant schedule's run.

Hardware: one CPU core, 45 s a run. Verified on 2026-11-24 with three seeds: the cooldown ends
0.035 below the cosine and 0.072 below the constant rate. The cosine's best rate is the last of
its grid; at twice that it is worse, says the same recipe in muon_vs_adamw.py.
"""

import math
from pathlib import Path

from ml_collections import ConfigDict

from nanojaxgpt.config import load_experiment
from nanojaxgpt.paper import Arm, Claim, Paper, Run
from nanojaxgpt.sweep.space import choice

RECIPE = Path(__file__).parents[1] / "shakespeare_char.py"
SOURCE = "Hagele et al. 2024, section 3"
RATES = (2e-3, 4e-3, 8e-3)
NUM_STEPS, COOLDOWN = 500, 0.2
FINAL = {"cosine": 0.1, "constant": 1.0, "wsd": 0.0}  # of the learning rate, at the end


def get_config(variant: str = "wsd") -> ConfigDict:
    """Return the config of one schedule."""
    cfg = load_experiment(f"{RECIPE}:cpu")
    cfg.optim.schedule, cfg.optim.final_fraction = variant, FINAL[variant]
    cfg.optim.decay_fraction = COOLDOWN
    cfg.optim.beta2, cfg.optim.warmup_steps = 0.95, 50
    cfg.train.num_steps = NUM_STEPS
    cfg.eval.every_steps = round(NUM_STEPS * (1 - COOLDOWN))
    cfg.checkpoint.every_steps = 0
    return cfg


def best_loss(runs: list[Run]) -> float:
    """Return the lowest final loss over the learning rates; a run that diverged has none."""
    return min(math.inf if run.diverged else run.at(NUM_STEPS) for run in runs)


def difference_before(runs: list[Run], others: list[Run]) -> float:
    """Return the largest difference of the losses as the cooldown begins, at any learning rate."""
    step = round(NUM_STEPS * (1 - COOLDOWN))
    return max(abs(a.at(step) - b.at(step)) for a, b in zip(runs, others, strict=True))


def get_paper() -> Paper:
    """Return the three schedules, and how their best losses compare."""
    space = choice("optim.learning_rate", *RATES)
    arms = tuple(Arm(name, get_config(name), (0, 1, 2), space) for name in FINAL)
    claims = (
        Claim("loss with the cooldown less that of the cosine", "almost a perfect match", SOURCE,
              lambda wsd, cosine: best_loss(wsd) - best_loss(cosine), (-math.inf, 0.02),
              ("wsd", "cosine")),
        Claim("loss of the constant rate less that with the cooldown", "higher", SOURCE,
              lambda constant, wsd: best_loss(constant) - best_loss(wsd), (0.05, math.inf),
              ("constant", "wsd")),
        Claim("largest difference of these two as the cooldown begins",
              "0: they are one run until then", SOURCE, difference_before, (0, 0.02),
              ("constant", "wsd"), every_seed=True),
    )  # fmt: skip
    smaller = (
        "0.8 M parameters and 500 steps of 768 characters of Tiny Shakespeare, where the paper has "
        "33 M to 360 M parameters and batches of 102,400 tokens; the cooldown is a straight line."
    )
    return Paper(
        "A cooldown does what a cosine does", claims, arms, smaller, tokens="8a9d5828b2a8cc61"
    )
