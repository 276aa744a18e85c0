"""Without normalized queries and keys, high learning rates blow attention's logits up.

Paper: Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training
instabilities" (arXiv:2309.14322), sections 2 and 3.1, figures 1 and 2. There, models of 10 M to
1.2 B parameters train on C4 for 100,000 steps at learning rates from 3e-4 to 0.3: without qk-norm
the high ones diverge, and every run whose attention logits pass 1e4 does; with it all train.

    nanojaxgpt reproduce experiments/papers/lr_sensitivity_qknorm.py

The corpus is that of shakespeare_char_cpu.py. The model is the paper's but for its size
(148 k parameters without tables): no biases, rotary positions, z-loss 1e-4, independent weight
decay 1e-4, truncated normal weights, 5 % warmup, a cosine down to 1e-5. LR sensitivity is the
paper's: the mean over learning rates of min(loss, loss before the first step) less the best loss.
Over the whole range it is half under-training at the low rates in so short runs: the claim is about
0.01 and up.

Hardware: one CPU core, about 8 minutes (22 by the clock on one shared with other work). Verified on
2026-11-24: best losses 1.926 and 1.929; at 0.1, 2.586 against 1.991 and logits of 20,197 and 25;
LR sensitivity from 0.01 up 8.1 times that with qk-norm, over all rates 0.386 against 0.177.
"""

import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nanojaxgpt.config import base_config, load_module
from nanojaxgpt.papers.paper import Arm, Claim, Paper, Plot, Run
from nanojaxgpt.sweep.space import Space, choice, zip_

SHAKESPEARE = load_module(str(Path(__file__).parents[1] / "shakespeare_char.py"))
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FINAL_RATE = 1e-5  # of the learning rate, where every cosine ends
FIGURES = "Wortsman et al. 2023, figures 1 and 2"
SENSITIVITY = "Wortsman et al. 2023, section 2.2 (LR sensitivity) and figure 1"
ARMS = {"plain": False, "qk_norm": True}


def get_config(variant: str = "plain") -> ConfigDict:
    """Return the config of one arm, whose learning rate `rates` sets."""
    cfg = base_config()
    model, optim, train = cfg.model, cfg.optim, cfg.train
    SHAKESPEARE.set_corpus(cfg)
    model.num_layers, model.embed_dim, model.num_heads, model.seq_len = 3, 64, 4, 64
    model.positions, model.mlp = "rotary", "gelu"
    model.bias = model.norm_bias = model.tied_head = False
    model.norm_eps = 1e-6
    model.init = "fan_in"
    model.qk_norm = ARMS[variant]
    optim.weight_decay, optim.independent_decay = 1e-4, True
    train.z_loss = 1e-4
    train.batch_size, train.num_steps, optim.warmup_steps = 32, 400, 20
    cfg.eval.every_steps = cfg.checkpoint.every_steps = 100
    cfg.eval.batch_size = 128
    return cfg


def rates() -> Space:
    """Return the paper's learning rates, each with the fraction that ends at the same rate."""
    fractions = (float(f"{FINAL_RATE / rate:.3g}") for rate in RATES)
    return zip_(choice("optim.learning_rate", *RATES), choice("optim.final_fraction", *fractions))


def final_loss(run: Run) -> float:
    """Return the validation loss after the last step; infinite where the run diverged."""
    return math.inf if run.diverged else run.at(run.cfg.train.num_steps)


def best_loss(runs: list[Run]) -> float:
    """Return the lowest loss over the learning rates."""
    return min(map(final_loss, runs))


def at_rate(runs: list[Run], rate: float) -> Run:
    """Return the run at one learning rate."""
    return next(run for run in runs if run.cfg.optim.learning_rate == rate)


def sensitivity(runs: list[Run], lowest: float = 0.0) -> float:
    """Return the mean of min(loss, initial loss) less the best one, over rates from `lowest` up."""
    from nanojaxgpt.papers.reproduce import initial_loss

    runs = [run for run in runs if run.cfg.optim.learning_rate >= lowest]
    most = initial_loss(next(run for run in runs if not run.diverged))
    losses = [min(final_loss(run), most) for run in runs]
    return sum(losses) / len(losses) - min(losses)


def largest_logit(run: Run) -> float:
    """Return the largest attention logit of any layer, over the first 128 validation rows.

    Of a run that diverged that of its last checkpoint, NaN where there is none.
    """
    from nanojaxgpt.errors import CheckpointError
    from nanojaxgpt.model.config import ModelConfig
    from nanojaxgpt.papers.probe import largest_logits
    from nanojaxgpt.papers.reproduce import first_rows, load_job

    try:
        job, params = load_job(run)
    except CheckpointError:
        return math.nan
    batch = first_rows(job.data.validation(run.cfg.model.seq_len), 128)
    return float(largest_logits(ModelConfig(**run.cfg.model), params, batch).max())


def draw_sweep(figure: Any, plain: list[list[Run]], qk_norm: list[list[Run]]) -> None:
    """Draw loss and largest attention logit against the learning rate."""
    figure.set_size_inches(10, 4.2)
    loss, logit = figure.subplots(1, 2)
    for name, seeds in (("without qk-norm", plain), ("with qk-norm", qk_norm)):
        for runs in seeds:
            label = f"{name} (sensitivity {sensitivity(runs):.3f})"
            loss.plot(RATES, [final_loss(run) for run in runs], marker="o", label=label)
            logit.plot(RATES, [largest_logit(run) for run in runs], marker="o", label=name)
    loss.set(xscale="log", xlabel="learning rate", ylabel="validation loss")
    logit.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="largest attention logit")
    logit.axhline(1e4, color="gray", linestyle="--")
    loss.legend(fontsize="small")
    for axes in (loss, logit):
        axes.grid(alpha=0.3)


def get_paper() -> Paper:
    """Return two sweeps over the learning rate, and how they differ at its upper end."""
    both: dict[str, Any] = dict(arms=("plain", "qk_norm"))
    claims = [
        Claim("best loss without qk-norm less with it", "indistinguishable below a critical rate",
              FIGURES, lambda plain, qk: best_loss(plain) - best_loss(qk), (-0.02, 0.02), **both),
    ]  # fmt: skip
    for rate in (0.1, 0.3):
        claims.append(
            Claim(f"loss at {rate}, without qk-norm less with it", "diverges without it", FIGURES,
                  lambda plain, qk, rate=rate: final_loss(at_rate(plain, rate))
                  - final_loss(at_rate(qk, rate)), (0.3, math.inf), **both)
        )  # fmt: skip
    claims += [
        Claim("largest attention logit at 0.1 without qk-norm", "above 1e4 where it diverges",
              FIGURES, lambda plain: largest_logit(at_rate(plain, 0.1)), (3e3, math.inf),
              ("plain",)),
        Claim("largest attention logit at 0.1 with qk-norm", "small", FIGURES,
              lambda qk: largest_logit(at_rate(qk, 0.1)), (0, 300), ("qk_norm",)),
        Claim("LR sensitivity from 0.01 up: without qk-norm over with it", "lower with it",
              SENSITIVITY, lambda plain, qk: sensitivity(plain, 0.01) / sensitivity(qk, 0.01),
              (3, math.inf), **both),
    ]  # fmt: skip
    arms = tuple(Arm(name, get_config(name), space=rates()) for name in ARMS)
    smaller = (
        "148 k parameters and 400 steps of 2,048 characters of Tiny Shakespeare, one seed, where "
        "the paper has 10 M to 1.2 B parameters and 100,000 steps of 131,072 tokens of C4."
    )
    plots = (
        Plot("learning_rates.png", "loss and largest attention logit by learning rate", draw_sweep,
             ("plain", "qk_norm")),
    )  # fmt: skip
    return Paper(
        "Normalized queries and keys keep high learning rates stable", tuple(claims), arms, smaller,
        tokens="8a9d5828b2a8cc61", plots=plots,
    )  # fmt: skip
