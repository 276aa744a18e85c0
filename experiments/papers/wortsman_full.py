"""LR sensitivity with and without qk-norm at the paper's own size: 2.4 M to 1.2 B parameters on C4.

Paper: Wortsman et al. 2023 (arXiv:2309.14322), sections 2 and 3.1; the recipe is that of
lr_sensitivity_qknorm.py with the paper's 100,000 steps of 256 x 512 tokens, T5's vocabulary and
5,000 steps of warmup. Its numbers are in plots alone, so the claims are its sentences. Widths and
depths are inferred from its model sizes (12 layers width^2); heads are 64 wide, which is chosen
here.

    nanojaxgpt reproduce experiments/papers/wortsman_full.py --config.data.tfds_dir=DIR

DIR has C4 (docs/data.md), T5's sentencepiece model lies in t5/spiece.model. Hardware: 112 runs, for
a TPU pod; on a CPU it is NOT-RUN. Not run yet; lr_sensitivity_qknorm.py is the scaled-down version.
"""

import math
from pathlib import Path

from ml_collections import ConfigDict

from nanojaxgpt.config import load_module
from nanojaxgpt.papers.paper import Arm, Claim, Paper, Run

SCALED = load_module(str(Path(__file__).with_name("lr_sensitivity_qknorm.py")))
SOURCE = "Wortsman et al. 2023, sections 2.2 and 3.1, figures 1 and 2"
SIZES = {  # width, layers; named by their parameters without tables
    "2M": (256, 3),
    "9M": (512, 3),
    "19M": (512, 6),
    "42M": (768, 6),
    "85M": (768, 12),
    "151M": (1024, 12),
    "302M": (1024, 24),
    "1.2B": (2048, 24),
}
DIVERGED = 0.5  # nats above the best learning rate of a size


def get_config(size: str, variant: str) -> ConfigDict:
    """Return the config of one size, with or without qk-norm."""
    cfg = SCALED.get_config(variant)
    model, train = cfg.model, cfg.train
    cfg.data.source, cfg.data.tokenizer = "tfds:c4/en", "sentencepiece:t5/spiece.model"
    cfg.data.lossy_tokenizer = True  # T5's normalizes; what it changes is counted
    cfg.data.validation_source = "tfds:c4/en@validation"
    model.embed_dim, model.num_layers = SIZES[size]
    model.head_dim, model.num_heads = 64, model.embed_dim // 64
    model.seq_len, model.vocab_size = 512, 32_101
    model.compute_dtype = "bfloat16"
    train.batch_size, train.num_steps, train.loss_chunks = 256, 100_000, 8
    cfg.optim.warmup_steps = 5000
    cfg.eval.every_steps = cfg.checkpoint.every_steps = 5000
    cfg.eval.batch_size, cfg.eval.num_batches = 256, 50
    return cfg


def num_params() -> dict[str, int]:
    """Return the parameters of every arm: kernels 12 L D^2, norms without biases, two tables."""
    found = {}
    for size, (width, layers) in SIZES.items():
        norms = (2 * layers + 1) * width
        tables = 2 * 32_101 * width
        found[f"{size}_plain"] = 12 * layers * width**2 + norms + tables
        found[f"{size}_qk_norm"] = found[f"{size}_plain"] + 2 * layers * 64
    return found


NUM_PARAMS = num_params()


def excess(runs: list[Run], rate: float) -> float:
    """Return the loss at one learning rate less the best one's."""
    return SCALED.final_loss(SCALED.at_rate(runs, rate)) - SCALED.best_loss(runs)


def large_logits_that_train(*arms: list[Run]) -> int:
    """Return how many runs have an attention logit above 1e4 and did not diverge."""
    return sum(
        SCALED.largest_logit(run) > 1e4
        and SCALED.final_loss(run) < SCALED.best_loss(runs) + DIVERGED
        for runs in arms
        for run in runs
    )


def rise(smallest: list[Run], largest: list[Run]) -> float:
    """Return the LR sensitivity of the largest size less that of the smallest."""
    return SCALED.sensitivity(largest) - SCALED.sensitivity(smallest)


def get_paper() -> Paper:
    """Return every size with and without qk-norm over the learning rates."""
    arms = tuple(
        Arm(f"{size}_{variant}", get_config(size, variant), space=SCALED.rates())
        for size in SIZES
        for variant in SCALED.ARMS
    )
    claims = [
        Claim("1.2 B with qk-norm: loss at 0.3 less the best", "it trains", SOURCE,
              lambda runs: excess(runs, 0.3), (0, DIVERGED), ("1.2B_qk_norm",)),
        Claim("1.2 B without it: loss at 0.3 less the best", "it diverges", SOURCE,
              lambda runs: excess(runs, 0.3), (DIVERGED, math.inf), ("1.2B_plain",)),
        Claim("runs with logits above 1e4 that did not diverge", 0, SOURCE,
              large_logits_that_train, (0, 0), tuple(arm.name for arm in arms)),
    ]  # fmt: skip
    for variant in SCALED.ARMS:
        claims.append(
            Claim(f"{variant}: LR sensitivity of 1.2 B less that of 2 M", "it rises with size",
                  SOURCE, rise, (0, math.inf), (f"2M_{variant}", f"1.2B_{variant}"))
        )  # fmt: skip
    return Paper(
        "LR sensitivity, 2.4 M to 1.2 B parameters", tuple(claims), arms, needs="a TPU or GPU pod"
    )
