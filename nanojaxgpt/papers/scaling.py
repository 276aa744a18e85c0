"""In: parameters, tokens and losses of runs. Out: the law L = E + A / N^alpha + B / D^beta.

The fit is Hoffmann's (2022, section 3.3): Huber losses of log L, many starts.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize  # comes with jax

DELTA = 1e-3  # of log loss, where the Huber loss turns linear
# Hoffmann's grid of starts: log A, log B, log E, alpha, beta.
STARTS = np.array(
    list(
        itertools.product(
            np.arange(0, 30, 5.0),
            np.arange(0, 30, 5.0),
            np.arange(-1, 1.5, 0.5),
            np.arange(0, 2.5, 0.5),
            np.arange(0, 2.5, 0.5),
        )
    )
)
MOST_STARTS = 50  # the best of the grid; the others end no lower


class Law(NamedTuple):
    """The loss in nats of a model of N parameters trained on D tokens."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, params: np.ndarray | float, tokens: np.ndarray | float) -> np.ndarray | float:
        """Return E + A / params^alpha + B / tokens^beta."""
        return self.E + self.A / params**self.alpha + self.B / tokens**self.beta

    def optimum(self, flops: float) -> tuple[float, float]:
        """Return the parameters and tokens of the lowest loss with flops = 6 params tokens."""
        both = self.alpha + self.beta
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / both)
        params = scale * (flops / 6) ** (self.beta / both)
        return params, flops / 6 / params


class Points(NamedTuple):
    """Runs: arrays [P] of parameters, tokens and final losses in nats."""

    params: np.ndarray
    tokens: np.ndarray
    losses: np.ndarray


def vector(law: Law) -> np.ndarray:
    """Return the fitted log A, log B, log E, alpha, beta."""
    return np.array([math.log(law.A), math.log(law.B), math.log(law.E), law.alpha, law.beta])


def law_of(found: np.ndarray) -> Law:
    """Return the law of such a vector."""
    a, b, e, alpha, beta = found.tolist()
    return Law(math.exp(e), math.exp(a), math.exp(b), alpha, beta)


def objective(found: np.ndarray, points: Points) -> tuple[float, np.ndarray]:
    """Return the sum of Huber losses of log L in units of DELTA, and its gradient [5]."""
    log_n, log_d = np.log(points.params), np.log(points.tokens)
    rest = np.full_like(log_n, found[2])
    terms = np.stack([found[0] - found[3] * log_n, found[1] - found[4] * log_d, rest])
    most = terms.max(0)
    log_loss = most + np.log(np.exp(terms - most).sum(0))
    error = (log_loss - np.log(points.losses)) / DELTA
    small = np.abs(error) < 1
    value = np.where(small, error**2 / 2, np.abs(error) - 0.5).sum()
    pull = np.where(small, error, np.sign(error)) / DELTA
    n, d, e = np.exp(terms - log_loss) * pull
    return value, np.array([n.sum(), d.sum(), e.sum(), -n @ log_n, -d @ log_d])


def fit_law(points: Points, starts: np.ndarray = STARTS) -> Law:
    """Return the law with the lowest objective, from the best of `starts` [S, 5] by BFGS."""
    begins = sorted(starts, key=lambda start: objective(start, points)[0])[:MOST_STARTS]
    ends = [
        minimize(objective, begin, (points,), "BFGS", jac=True, options={"gtol": 1e-3})
        for begin in begins
    ]
    return law_of(min(ends, key=lambda end: end.fun).x)


def bootstrap(points: Points, law: Law, samples: int, seed: int = 0) -> np.ndarray:
    """Return `vector` of the fits of resampled points [samples, 5], each begun at `law`."""
    rng, count = np.random.default_rng(seed), len(points.losses)
    found = []
    for _ in range(samples):
        chosen = rng.integers(0, count, count)
        sample = Points(*(array[chosen] for array in points))
        found.append(vector(fit_law(sample, vector(law)[None])))
    return np.stack(found)
