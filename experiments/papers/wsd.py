"""A constant learning rate with a short cooldown ends as low as a cosine; without one it does not.

Paper: Hagele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed Training
Durations" (arXiv:2405.18392): at 33 M to 360 M parameters, a cooldown over the last 20 % of the
steps is an "almost perfect match" of the cosine. Here nanoGPT's CPU model on Tiny Shakespeare, 500
steps, each schedule at the best of three learning rates, three seeds.

    nanojaxgpt reproduce experiments/papers/wsd.py

The corpus is that of shakespeare_char_cpu.py. The cosine ends at 10 % of its peak, the
cooldown at 0, as in the paper. Until it begins, at step 400, it is the constant schedule's run; so
the last arm takes the constant runs' checkpoints, and cools down from three of them, over 20 % of
200, 300 and 500 steps, without training the steps before again.

Hardware: one CPU core, 45 s a run. Verified on 2026-11-24 with three seeds: the cooldown ends
0.035 below the cosine and 0.072 below the constant rate. (wsd's decay began a step later then, and
its last step had 1 % of the rate.) The cosine's best rate is the last of its grid; at twice that
it is worse, says the same recipe in muon_vs_adamw.py. The branched arm is not yet run.
"""

import functools
import math
from pathlib import Path

from ml_collections import ConfigDict

from nanojaxgpt.config import load_experiment
from nanojaxgpt.papers.paper import Arm, Claim, Paper, Run
from nanojaxgpt.sweep.space import choice, product, zip_

RECIPE = Path(__file__).parents[1] / "shakespeare_char.py"
SOURCE = "Hagele et al. 2024, section 3"
RATES = (2e-3, 4e-3, 8e-3)
NUM_STEPS, COOLDOWN, WARMUP = 500, 0.2, 50
LENGTHS = (200, 300, NUM_STEPS)  # steps of the branched runs, those of the constant rate included
FINAL = {"cosine": 0.1, "constant": 1.0, "wsd": 0.0}  # of the learning rate, at the end


def begin(num_steps: int) -> int:
    """Return the steps before the cooldown of a run."""
    return round(num_steps * (1 - COOLDOWN))


def get_config(variant: str = "wsd") -> ConfigDict:
    """Return the config of one schedule."""
    cfg = load_experiment(f"{RECIPE}:cpu")
    cfg.optim.schedule, cfg.optim.final_fraction = variant, FINAL[variant]
    cfg.optim.decay_fraction = COOLDOWN
    cfg.optim.beta2, cfg.optim.warmup_steps = 0.95, WARMUP
    cfg.train.num_steps = NUM_STEPS
    cfg.eval.every_steps = math.gcd(begin(NUM_STEPS), *LENGTHS)
    cfg.checkpoint.every_steps = 0
    if variant == "constant":
        every = math.gcd(*(begin(length) for length in LENGTHS))
        cfg.checkpoint.every_steps = cfg.checkpoint.keep_every_steps = every
    return cfg


def best_loss(runs: list[Run], step: int = 0) -> float:
    """Return the lowest loss over the learning rates, the final one or that at `step`.

    A run that diverged has none.
    """
    return min(math.inf if run.diverged else run.at(step or NUM_STEPS) for run in runs)


def difference_at(step: int, runs: list[Run], others: list[Run]) -> float:
    """Return the largest difference of the losses at a step, at any learning rate."""
    return max(abs(a.at(step) - b.at(step)) for a, b in zip(runs, others, strict=True))


def of_length(runs: list[Run], length: int) -> list[Run]:
    """Return the branched runs of this many steps, one for each learning rate."""
    return [run for run in runs if run.cfg.train.num_steps == length]


def least_gain(constant: list[Run], branched: list[Run]) -> float:
    """Return by how much a cooldown lowers the best loss of the constant rate, at the least."""
    gains = [
        best_loss(constant, length) - best_loss(of_length(branched, length), length)
        for length in LENGTHS
    ]
    return math.nan if any(map(math.isnan, gains)) else min(gains)


def get_paper() -> Paper:
    """Return the three schedules and the branched cooldowns, and how their losses compare."""
    space, seeds = choice("optim.learning_rate", *RATES), (0, 1, 2)
    arms = [Arm(name, get_config(name), seeds, space) for name in FINAL]
    lengths = zip_(choice("init.step", *map(begin, LENGTHS)), choice("train.num_steps", *LENGTHS))
    cooldowns = product(space, lengths)
    arms.append(Arm("branched", get_config("wsd"), seeds, cooldowns, branch_of="constant"))
    claims = (
        Claim("loss with the cooldown less that of the cosine", "almost a perfect match", SOURCE,
              lambda wsd, cosine: best_loss(wsd) - best_loss(cosine), (-math.inf, 0.02),
              ("wsd", "cosine")),
        Claim("loss of the constant rate less that with the cooldown", "higher", SOURCE,
              lambda constant, wsd: best_loss(constant) - best_loss(wsd), (0.05, math.inf),
              ("constant", "wsd")),
        Claim("largest difference of these two as the cooldown begins",
              "0: they are one run until then", SOURCE,
              functools.partial(difference_at, begin(NUM_STEPS)), (0, 0.02),
              ("constant", "wsd"), every_seed=True),
        Claim("largest difference of a branched cooldown from the run that always had it",
              "0: they are one run", SOURCE,
              lambda branched, wsd: difference_at(NUM_STEPS, of_length(branched, NUM_STEPS), wsd),
              (0, 0.02), ("branched", "wsd"), every_seed=True),
        Claim("loss of the constant rate less that of a branched cooldown, the least of 3 lengths",
              "higher", SOURCE, least_gain, (0, math.inf), ("constant", "branched")),
    )  # fmt: skip
    smaller = (
        "0.8 M parameters and 500 steps of 768 characters of Tiny Shakespeare, where the paper has "
        "33 M to 360 M parameters and batches of 102,400 tokens; the cooldown is a straight line."
    )
    return Paper(
        "A cooldown does what a cosine does",
        claims,
        tuple(arms),
        smaller,
        tokens="8a9d5828b2a8cc61",
    )
