"""nanoGPT's CPU recipe on Tiny Shakespeare by characters: 0.8 M parameters, 2,000 steps.

Source: nanoGPT's README and config/train_shakespeare_char.py (commit 3adf61e), which give a
validation loss of 1.88; its logs with seed 1337 say 1.8857, by 20 random batches (standard error
about 0.02). Here the loss is over the whole validation split, 111,540 characters.

    nanojaxgpt reproduce experiments/papers/shakespeare_char_cpu.py

Tiny Shakespeare is downloaded once; without a network, give a copy of its 1,115,394 bytes by
--config.data.source=text:PATH. Another corpus is not run. Hardware: one or two CPU cores, 2 to 5
minutes for each of 3 seeds. Verified: 1.906, the mean of seeds 0 to 2 of
experiments/shakespeare_char.py:cpu, whose recipe this is.
"""

import math
from pathlib import Path
from typing import Any

from nanojaxgpt.config import load_experiment
from nanojaxgpt.papers.paper import Arm, Claim, Paper, Run

RECIPE = Path(__file__).parents[1] / "shakespeare_char.py"
SOURCE = "nanoGPT, README (commit 3adf61e); its logs with seed 1337, 20 random batches"


def loss_before(run: Run) -> float:
    """Return the validation loss of a run's parameters before its first step."""
    from nanojaxgpt.papers.reproduce import initial_loss

    return initial_loss(run)


def get_paper() -> Paper:
    """Return the recipe with three seeds, and the losses at its beginning, middle and end."""
    shared: dict[str, Any] = dict(arms=("cpu",))
    claims = (
        Claim("validation loss, step 2000", 1.8857, SOURCE, lambda run: run.at(2000),
              accept=(1.86, 1.94), **shared),
        Claim("validation loss, step 1000", "no figure", "a prototype of this recipe: 2.074",
              lambda run: run.at(1000), accept=(2.03, 2.12), **shared),
        Claim("validation loss before the first step", math.log(65), "a uniform guess: ln 65",
              loss_before, accept=(math.log(65) - 0.1, math.log(65) + 0.1), every_seed=True,
              **shared),
    )  # fmt: skip
    arms = (Arm("cpu", load_experiment(f"{RECIPE}:cpu"), seeds=(0, 1, 2)),)
    return Paper(
        "nanoGPT's CPU recipe on Tiny Shakespeare", claims, arms, tokens="8a9d5828b2a8cc61"
    )
