"""Spaces of points to try: plain functions that combine values of dotted config fields.

A point is a dict from dotted config fields to values. Every space is a list of points (a grid)
or something to draw from, or both; `sweep()` of an experiment file returns one, or `tpe` of one:

    def sweep():
        return product(
            choice("optim.learning_rate", 1e-3, 2e-3, 4e-3),
            choice("train.seed", 0, 1, 2),
        )
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from nanojaxgpt.errors import ConfigError

Point = dict[str, Any]
EMPTY = "the sweep draws from an empty space"
MOST_POINTS = 100_000


class Range(NamedTuple):
    """Numbers from `low` to `high`, ends included, even on a line or in their logarithms."""

    low: float
    high: float
    log: bool
    whole: bool

    def value(self, fraction: float) -> float:
        """Return the number at a fraction of the way, 0 to 1; the ends are exact."""
        if self.log and fraction in (0.0, 1.0):
            return self.high if fraction else self.low
        if self.log:
            return self.tidy(self.low * (self.high / self.low) ** fraction)
        return self.tidy(self.low + fraction * (self.high - self.low))

    def tidy(self, found: float) -> float:
        """Return a number of a point: six significant digits on a logarithmic range."""
        if self.whole:
            return round(found)
        return float(f"{found:.6g}") if self.log and self.low < found < self.high else found


class Sampler(Protocol):
    """Draws points: at random, or by a search that learns (sweep/search.py)."""

    def number(self, field: str, numbers: Range) -> float:
        """Return a number of the range."""
        ...

    def pick(self, name: str, labels: Sequence[str]) -> int:
        """Return the index of one of the labels."""
        ...

    def within(self, branch: str) -> "Sampler":
        """Return the sampler for one branch of a chain, where names may repeat."""
        ...


class RandomSampler:
    """Draws at random, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def number(self, field: str, numbers: Range) -> float:
        """Return a number of the range."""
        return numbers.value(self.rng.random())

    def pick(self, name: str, labels: Sequence[str]) -> int:
        """Return the index of one of the labels."""
        return self.rng.randrange(len(labels))

    def within(self, branch: str) -> "RandomSampler":
        """Return itself: all branches share one generator."""
        return self


class Space(NamedTuple):
    """A set of points: `points()` lists all in order, `draw(sampler)` draws one."""

    points: Callable[[], list[Point]]
    draw: Callable[[Sampler], Point]


class Tpe(NamedTuple):
    """A search that learns from the trials that have ended; see `tpe`."""

    space: Space
    num: int
    metric: str
    maximize: bool
    reduction: int
    seed: int


def fixed(field: str, value: Any) -> Space:
    """Return the space of one point."""
    return choice(field, value)


def choice(field: str, *values: Any) -> Space:
    """Return the space of these values of one field, in their order."""
    return _listed([{field: value} for value in values])


def uniform(field: str, low: float, high: float, num: int = 0, whole: bool = False) -> Space:
    """Return a range of one field: `num` evenly spaced values, ends included, or draws of it.

    With `whole` the values are rounded to whole numbers. Raises ConfigError unless low < high.
    """
    if not -math.inf < low < high < math.inf:
        raise ConfigError(f"{field}: low={low} must be below high={high}, and both finite")
    return _range(field, Range(low, high, False, whole), num)


def log_uniform(field: str, low: float, high: float, num: int = 0, whole: bool = False) -> Space:
    """Return a range like `uniform`, whose logarithms are even. Raises ConfigError unless 0 < low.

    The ends are exact; between them a value has six significant digits, which people can type.
    """
    if not 0 < low < high < math.inf:
        raise ConfigError(
            f"{field}: low={low} must be above 0 and below high={high}, and both finite"
        )
    return _range(field, Range(low, high, True, whole), num)


def product(*spaces: Space) -> Space:
    """Return every combination of one point of each space; the last space changes fastest.

    Raises ConfigError where two spaces set the same field.
    """

    def points() -> list[Point]:
        found: list[Point] = [{}]
        columns = [space.points() for space in spaces]
        _check_count(math.prod(map(len, columns)))
        for column in columns:
            found = [_merge([first, second]) for first in found for second in column]
        return found if spaces else []

    return Space(points, lambda sampler: _merge([space.draw(sampler) for space in spaces]))


def zip_(*spaces: Space) -> Space:
    """Return the first points of all spaces together, then the second, and so on.

    Raises ConfigError where the spaces have different sizes or set the same field.
    """

    def points() -> list[Point]:
        columns = [space.points() for space in spaces]
        if len({len(column) for column in columns}) > 1:
            raise ConfigError(f"zip_ of spaces of different sizes: {[len(c) for c in columns]}")
        return [_merge(row) for row in zip(*columns, strict=True)]

    return Space(points, lambda sampler: _pick(sampler, points()))


def chain(*spaces: Space) -> Space:
    """Return the points of one space after those of another; a draw takes any space alike."""

    def points() -> list[Point]:
        found: list[Point] = []
        for space in spaces:
            found += space.points()
            _check_count(len(found))
        return found

    def draw(sampler: Sampler) -> Point:
        if not spaces:
            raise ConfigError(EMPTY)
        branch = sampler.pick("chain", [str(number) for number in range(len(spaces))])
        return spaces[branch].draw(sampler.within(f"chain {branch}"))

    return Space(points, draw)


def draws(space: Space, num: int, seed: int = 0) -> Space:
    """Return `num` random points of a space, the same for the same seed (random search)."""
    if num < 1:
        raise ConfigError(f"draws of {num} points")
    _check_count(num)
    sampler = RandomSampler(seed)
    return _listed([space.draw(sampler) for _ in range(num)])


def tpe(
    space: Space,
    num: int,
    metric: str = "validation_loss",
    maximize: bool = False,
    reduction: int = 4,
    seed: int = 0,
) -> Tpe:
    """Return a search over `num` points, each chosen by what those before it gave (by Optuna).

    Trials are pruned as they go (ASHA): after 1, `reduction`, `reduction`^2, ... times
    eval.every_steps one continues if it is among the best 1 / `reduction` so far; 0: all
    continue. Sources: Bergstra et al. 2011 (TPE), Li et al. 2020 (ASHA). Raises ConfigError.
    """
    if num < 1 or reduction == 1 or reduction < 0:
        raise ConfigError(f"tpe of {num} points, reduction {reduction}: at least 1; 0, 2 or more")
    return Tpe(space, num, metric, maximize, reduction, seed)


def _check_count(count: int) -> None:
    """Raise ConfigError for more points than can be listed; they are not built yet."""
    if count > MOST_POINTS:
        raise ConfigError(
            f"the sweep has {count:,} points, more than {MOST_POINTS:,}: list fewer values, or use "
            "random search, draws(space, num), or tpe(space, num)"
        )


def _listed(found: list[Point]) -> Space:
    return Space(lambda: list(found), lambda sampler: _pick(sampler, found))


def _pick(sampler: Sampler, found: list[Point]) -> Point:
    if not found:
        raise ConfigError(EMPTY)
    labels = [", ".join(map(str, point.values())) for point in found]
    return found[sampler.pick("+".join(found[0]), labels)]


def _range(field: str, numbers: Range, num: int) -> Space:
    def points() -> list[Point]:
        if num < 1:
            raise ConfigError(
                f"{field} is a continuous range: give it num=, or take draws(space, num)"
            )
        _check_count(num)
        return [{field: numbers.value(i / (num - 1) if num > 1 else 0.5)} for i in range(num)]

    return Space(points, lambda sampler: {field: sampler.number(field, numbers)})


def _merge(parts: Sequence[Point]) -> Point:
    merged: Point = {}
    for part in parts:
        if twice := merged.keys() & part.keys():
            raise ConfigError(f"the sweep sets {', '.join(sorted(twice))} twice in one point")
        merged |= part
    return merged
