"""Under muP the best learning rate does not move with the width; without it, it falls.

Paper: Yang et al. 2022, "Tensor Programs V" (arXiv:2203.03466), figures 1 and 3, appendix D.1; the
recipe is that of EleutherAI's nanoGPT-mup (commit b2a5e60), smaller: widths 32 to 256 for 256 to
2048, 120 steps of 1,024 characters of Tiny Shakespeare, one seed. Loss is the mean training loss
over the run, as there.

    nanojaxgpt reproduce experiments/papers/mup_transfer.py

The corpus is that of shakespeare_char_cpu.py. Two checks: activations against width in
the first steps (`nanojaxgpt coordcheck`, widths 64 to 512), and the best of seven learning rates at
each width. The claim is transfer, not a lower loss: in so short runs of so small a base, the
standard model at its own best rate can end lower than muP's of the same width.

Hardware: one CPU core, 10 minutes (55 by the clock on one shared with other work). Verified on
2026-11-24: the best rate is 2^-8 at every width by muP, and falls from 2^-7 to 2^-10 without. One
claim FAILs: the standard model's logits grow with slopes of 0.48, 0.46, 0.06 and 0.41 in steps 1 to
4, muP's stay within 0.04. At step 3 the widest has overshot and is on its way back, at a rate of
1e-2 without warmup; the criterion asks for 0.25 at each of the steps, for one seed, where
nanoGPT-mup has five.
"""

import functools
import itertools
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nanojaxgpt import config
from nanojaxgpt.config import base_config, load_module
from nanojaxgpt.papers.paper import Arm, Claim, Paper, Plot, Run
from nanojaxgpt.sweep.space import Space, choice, product, zip_

SHAKESPEARE = load_module(str(Path(__file__).parents[1] / "shakespeare_char.py"))
WIDTHS, BASE, HEAD_DIM = (32, 64, 128, 256), 32, 16
RATES = tuple(2.0**power for power in range(-10, -3))
COORDINATE_WIDTHS, COORDINATE_STEPS = (64, 128, 256, 512), 4
TRANSFER = "Yang et al. 2022, figures 1 and 3; nanoGPT-mup's README"
COORDINATES = "Yang et al. 2022, appendix D.1; nanoGPT-mup's README"
EXACT = "Yang et al. 2022: at its base width, muP is the standard parametrization"


def get_config(variant: str = "standard") -> ConfigDict:
    """Return the config of one parametrization at the base width."""
    cfg = base_config()
    model, optim, train = cfg.model, cfg.optim, cfg.train
    SHAKESPEARE.set_corpus(cfg)
    model.num_layers, model.embed_dim, model.head_dim, model.seq_len = 2, BASE, HEAD_DIM, 64
    model.num_heads = BASE // HEAD_DIM
    model.mlp = "gelu"
    model.bias = model.norm_bias = False
    model.mup_base_dim = {"standard": 0, "mup": BASE}[variant]
    optim.schedule, optim.warmup_steps = "constant", 0
    train.batch_size, train.num_steps, train.log_every_steps = 16, 120, 1
    cfg.eval.every_steps = cfg.checkpoint.every_steps = 0
    cfg.eval.batch_size, cfg.eval.num_batches = 128, 2
    return cfg


def widths_and_rates(widths: tuple[int, ...], head_dim: int, rates: tuple[float, ...]) -> Space:
    """Return every width with every learning rate."""
    heads = (width // head_dim for width in widths)
    sizes = zip_(choice("model.embed_dim", *widths), choice("model.num_heads", *heads))
    return product(sizes, choice("optim.learning_rate", *rates))


def mean_loss(run: Run) -> float:
    """Return the mean training loss over the run; infinite where it diverged."""
    losses = [record["loss"] for record in run.records if "loss" in record]
    return math.inf if run.diverged else sum(losses) / len(losses)


def losses_by_width(runs: list[Run]) -> dict[int, dict[float, float]]:
    """Return losses[width][learning rate], widths and rates in the order of the runs."""
    losses: dict[int, dict[float, float]] = {}
    for run in runs:
        found = losses.setdefault(run.cfg.model.embed_dim, {})
        found[run.cfg.optim.learning_rate] = mean_loss(run)
    return losses


def best_rates(runs: list[Run]) -> dict[int, float]:
    """Return the best learning rate of each width."""
    return {
        width: min(found, key=lambda rate, found=found: found[rate])
        for width, found in losses_by_width(runs).items()
    }


def span(runs: list[Run]) -> float:
    """Return the largest over the smallest of the widths' best learning rates."""
    rates = best_rates(runs).values()
    return max(rates) / min(rates)


def largest_rise(values: list[float]) -> float:
    """Return the largest increase from one value to the next."""
    return max(after - before for before, after in itertools.pairwise(values))


def rise_of_best_rate(runs: list[Run]) -> float:
    """Return the largest increase of the best learning rate from one width to the next."""
    return largest_rise(list(best_rates(runs).values()))


def rise_at_the_bases_rate(runs: list[Run]) -> float:
    """Return the largest increase of the loss with the width, at the first width's best rate."""
    rate = next(iter(best_rates(runs).values()))
    return largest_rise([found[rate] for found in losses_by_width(runs).values()])


@functools.cache  # two claims, one check
def slopes(cfg: str) -> dict[str, Any]:
    """Return the slopes of the coordinate check of a config in JSON, without step 0."""
    from nanojaxgpt.papers.coordcheck import check_coordinates

    found = check_coordinates(config.from_json(cfg), COORDINATE_WIDTHS, COORDINATE_STEPS)["slopes"]
    return {name: layers["logits"][1:] for name, layers in found.items()}


def logit_slopes(runs: list[Run], name: str) -> list[float]:
    """Return the slopes of log mean |logit| against log width after each of the first steps."""
    cfg = runs[0].cfg.copy_and_resolve_references().unlock()
    cfg.model.seq_len, cfg.train.batch_size = 128, 8
    cfg.model.mup_base_dim = 0  # the least of the widths
    cfg.optim.learning_rate = 1e-2
    return slopes(config.to_json(cfg))[name]


def largest_difference(one: Run, other: Run) -> float:
    """Return the largest difference of two runs' training losses at the same step."""
    pairs = zip(one.records, other.records, strict=True)
    return max(abs(a["loss"] - b["loss"]) for a, b in pairs if "loss" in a)


def draw_transfer(figure: Any, standard: list[list[Run]], mup: list[list[Run]]) -> None:
    """Draw the loss against the learning rate at every width, and the best rate against width."""
    figure.set_size_inches(11, 4)
    *panels, best = figure.subplots(1, 3)
    for axes, name, seeds in zip(panels, ("standard", "muP"), (standard, mup), strict=True):
        for width, found in losses_by_width(seeds[0]).items():
            axes.plot(found.keys(), found.values(), marker="o", label=f"width {width}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="mean training loss", title=name)
        axes.legend()
        rates = best_rates(seeds[0])
        best.plot(rates.keys(), rates.values(), marker="o", label=name)
    panels[1].sharey(panels[0])
    best.set(xscale="log", yscale="log", xlabel="width", ylabel="best learning rate")
    best.set_xticks(list(rates), map(str, rates))
    best.tick_params("x", which="minor", bottom=False, labelbottom=False)
    best.legend()


def transfer_claims(standard: str = "standard", mup: str = "mup") -> list[Claim]:
    """Return what the best learning rates of two arms of these names have to do."""
    return [
        Claim(f"{mup}: span of the best rate over the widths", "1: it transfers", TRANSFER, span,
              (1, 2), (mup,)),
        Claim(f"{standard}: span of the best rate over the widths", "it does not", TRANSFER, span,
              (4, math.inf), (standard,)),
        Claim(f"{standard}: largest rise of the best rate with width", "it falls", TRANSFER,
              rise_of_best_rate, (-math.inf, 0), (standard,)),
        Claim(f"{mup}: largest rise of the loss with width, at the base's best rate",
              "wider is better", TRANSFER, rise_at_the_bases_rate, (-math.inf, 0.02), (mup,)),
    ]  # fmt: skip


def get_paper() -> Paper:
    """Return both parametrizations over widths and learning rates, and the coordinate check."""
    space = widths_and_rates(WIDTHS, HEAD_DIM, RATES)
    at_base = get_config("mup")
    at_base.model.attention_scale = 1 / math.sqrt(HEAD_DIM)
    arms = (
        Arm("standard", get_config("standard"), space=space),
        Arm("mup", get_config("mup"), space=space),
        Arm("standard_at_base", get_config("standard")),
        Arm("mup_at_base", at_base),
    )
    claims = [
        Claim("mup: steepest slope of the logits, steps 1 to 4", "flat", COORDINATES,
              lambda runs: max(map(abs, logit_slopes(runs, "mup"))), (0, 0.1), ("mup",)),
        Claim("standard: flattest slope of the logits, steps 1 to 4", "they grow", COORDINATES,
              lambda runs: min(logit_slopes(runs, "standard")), (0.25, math.inf), ("standard",)),
        *transfer_claims(),
        Claim("muP at its base width less standard, attention by 1 / sqrt(head_dim)", 0, EXACT,
              largest_difference, (0, 0), ("mup_at_base", "standard_at_base")),
    ]  # fmt: skip
    plots = (
        Plot("transfer.png", "loss by learning rate and width, and the best rate by width",
             draw_transfer, ("standard", "mup")),
    )  # fmt: skip
    smaller = (
        "widths 32 to 256 and 120 steps of 1,024 characters of Tiny Shakespeare, one seed, where "
        "nanoGPT-mup has widths 256 to 2048, 122 steps of 8,192 tokens and three seeds."
    )
    return Paper(
        "muP keeps the best learning rate while the width grows", tuple(claims), arms, smaller,
        tokens="8a9d5828b2a8cc61", plots=plots,
    )  # fmt: skip
