"""Chinchilla's parametric law, fitted again to the points of its own figure; nothing is trained.

Paper: Besiroglu et al. 2024, "Chinchilla Scaling: A replication attempt" (arXiv:2404.10102), on
approach 3 of Hoffmann et al. 2022 (arXiv:2203.15556): L = E + A / N^alpha + B / D^beta by Huber
losses of log L. Its 245 points were read from a figure of Hoffmann's; D is C / 6N, and the five
highest losses are left out, as there.

    nanojaxgpt reproduce experiments/papers/chinchilla_refit.py

The points are ../shared/data/chinchilla_points.csv, or the file that the environment variable
CHINCHILLA_POINTS names: data/svg_extracted_data.csv of epoch-research/analyzing-chinchilla, which
has no licence and is no part of this repository. Without it the claims about them are NOT-RUN; the
same fit still has to find a known law again from synthetic points, drawn around the published one.

Hardware: one CPU core, 20 s. Verified on 2026-11-24: E 1.8172, A 477.83, B 2143.4, alpha 0.34731,
beta 0.36717, all within 0.03 % of the fit that the authors' notebook prints. What is accepted of
A, B, the deviations, tokens a parameter and Hoffmann's own law was set after a trial fit, the rest
before.
"""

import csv
import functools
import math
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanojaxgpt.errors import DataError
from nanojaxgpt.papers.paper import Claim, Paper, Plot

if TYPE_CHECKING:
    from nanojaxgpt.papers.scaling import Law, Points

POINTS = Path(__file__).parents[3] / "shared" / "data" / "chinchilla_points.csv"
LEFT_OUT = 5  # the highest losses
BUDGET = 5.76e23  # FLOPs of Chinchilla's own training
SAMPLES = 200  # of a bootstrap
DRAWS, NOISE = 9, 0.005  # synthetic sets of points, and the spread of their log losses
PUBLISHED = dict(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
PRINTED = dict(E=1.817236, A=477.84, B=2143.86, alpha=0.347313, beta=0.367183)
HOFFMANN = dict(E=1.69, A=406.4, B=410.7, alpha=0.3392, beta=0.2849)
NOTEBOOK = "epoch-research/analyzing-chinchilla, the fit that its notebook prints"
BESIROGLU = "Besiroglu et al. 2024"
CHINCHILLA = "Hoffmann et al. 2022: Chinchilla, 70 B parameters and 1.4 T tokens"
APPROACH_3 = "Hoffmann et al. 2022, approach 3, its exponents to four digits"
SYNTHETIC = "the law itself: the points were drawn around it"


@functools.cache
def points() -> "Points":
    """Return the points of the figure without the highest losses. Raises DataError."""
    import numpy as np

    from nanojaxgpt.papers.scaling import Points

    path = Path(os.environ.get("CHINCHILLA_POINTS", POINTS))
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
        columns = ("Model Size", "Training FLOP", "loss")
        params, flops, losses = (np.array([float(r[name]) for r in rows]) for name in columns)
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path} holds no points ({type(error).__name__}: {error}); name the CSV file of "
            "Besiroglu et al. in CHINCHILLA_POINTS"
        ) from error
    kept = np.sort(np.argsort(losses, kind="stable")[:-LEFT_OUT])
    return Points(params[kept], (flops / 6 / params)[kept], losses[kept])


@functools.cache
def fitted() -> "Law":
    """Return the law of the figure's points. Raises DataError."""
    from nanojaxgpt.papers.scaling import fit_law

    return fit_law(points())


@functools.cache
def spreads() -> dict[str, float]:
    """Return the bootstrap's standard deviation of each number of the law. Raises DataError."""
    import numpy as np

    from nanojaxgpt.papers.scaling import bootstrap, law_of

    laws = [law_of(found) for found in bootstrap(points(), fitted(), SAMPLES)]
    found = np.std(laws, axis=0, ddof=1)
    return dict(zip(laws[0]._fields, found.tolist(), strict=True))


def hoffmanns_excess() -> float:
    """Return how many times the fit's own objective that of Hoffmann's law is. Raises DataError."""
    from nanojaxgpt.papers.scaling import Law, objective, vector

    ours, theirs = (objective(vector(law), points())[0] for law in (fitted(), Law(**HOFFMANN)))
    return theirs / ours


def tokens_per_parameter(law: "Law") -> float:
    """Return the best tokens a parameter at Chinchilla's budget."""
    params, tokens = law.optimum(BUDGET)
    return tokens / params


def hoffmanns_tokens() -> float:
    """Return the best tokens a parameter by Hoffmann's own law."""
    from nanojaxgpt.papers.scaling import Law

    return tokens_per_parameter(Law(**HOFFMANN))


def synthetic_points(seed: int) -> "Points":
    """Return 240 points around the published law, at budgets and sizes like the figure's."""
    import numpy as np

    from nanojaxgpt.papers.scaling import Law, Points

    rng = np.random.default_rng(seed)
    params = np.exp(rng.uniform(math.log(5e7), math.log(1e10), 240))
    flops = np.exp(rng.uniform(math.log(6e18), math.log(3e21), 240))
    tokens = flops / 6 / params
    losses = Law(**PUBLISHED).loss(params, tokens) * np.exp(rng.normal(0, NOISE, 240))
    return Points(params, tokens, losses)


def worst_miss(seed: int) -> float:
    """Return the largest miss of log A, log B, log E, alpha, beta in bootstrap deviations."""
    import numpy as np

    from nanojaxgpt.papers.scaling import Law, bootstrap, fit_law, vector

    drawn = synthetic_points(seed)
    law = fit_law(drawn)
    deviations = bootstrap(drawn, law, SAMPLES, seed).std(0, ddof=1)
    return float(np.max(np.abs(vector(law) - vector(Law(**PUBLISHED))) / deviations))


def draw_points(figure: Any) -> None:
    """Draw every measured loss against what both laws say. Raises DataError."""
    import numpy as np

    from nanojaxgpt.papers.scaling import Law

    given, law = points(), fitted()
    axes = figure.subplots()
    for name, one in (("fitted here", law), ("Hoffmann et al.", Law(**HOFFMANN))):
        numbers = ", ".join(f"{field} {value:.4g}" for field, value in one._asdict().items())
        error = np.log(one.loss(given.params, given.tokens) / given.losses)
        axes.plot(6 * given.params * given.tokens, error, ".", label=f"{name}: {numbers}")
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="log of predicted over measured loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def get_paper() -> Paper:
    """Return what the fit has to give, what Hoffmann's own law misses, and the synthetic check."""
    near = dict(E=0.005, alpha=0.003, beta=0.003) | {k: 0.02 * PRINTED[k] for k in ("A", "B")}
    claims = [
        Claim(name, PRINTED[name], NOTEBOOK, lambda name=name: getattr(fitted(), name),
              (PRINTED[name] - near[name], PRINTED[name] + near[name]))
        for name in PRINTED
    ]  # fmt: skip
    claims += [
        Claim("deviation of alpha, by bootstrap", 0.02, BESIROGLU, lambda: spreads()["alpha"],
              (0.01, 0.03)),
        Claim("deviation of beta, by bootstrap", 0.02, BESIROGLU, lambda: spreads()["beta"],
              (0.01, 0.03)),
        Claim("objective of Hoffmann's law over the fit's", "it fits worse", BESIROGLU,
              hoffmanns_excess, (1.15, math.inf)),
        Claim("best parameters grow as FLOPs to the power of", "about 0.5", BESIROGLU,
              lambda: fitted().beta / (fitted().alpha + fitted().beta), (0.5, 0.53)),
        Claim("best tokens a parameter at 5.76e23 FLOPs", 20, CHINCHILLA,
              lambda: tokens_per_parameter(fitted()), (15, 25)),
        Claim("the same by Hoffmann's own law", "not 20", APPROACH_3, hoffmanns_tokens,
              (50, math.inf)),
        Claim(f"synthetic: worst miss in deviations, median of {DRAWS} draws", "found again",
              SYNTHETIC, lambda: statistics.median(map(worst_miss, range(DRAWS))), (0, 2)),
    ]  # fmt: skip
    plots = (Plot("points.png", "predicted over measured loss of both laws", draw_points),)
    return Paper("Chinchilla's law, fitted again", tuple(claims), plots=plots)
