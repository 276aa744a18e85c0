"""Spaces of points to try: plain functions that combine values of dotted config fields.

A point is a dict from dotted config fields to values. Every space is a list of points (a grid)
or something to draw from, or both; `sweep()` of an experiment file returns one:

    def sweep():
        return product(
            choice("optim.learning_rate", 1e-3, 2e-3, 4e-3),
            choice("train.seed", 0, 1, 2),
        )
"""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from nanojaxgpt.errors import ConfigError

Point = dict[str, Any]


class Space(NamedTuple):
    """What can be tried: `points()` lists all of it in order, `draw(rng)` gives one at random."""

    points: Callable[[], list[Point]]
    draw: Callable[[random.Random], Point]


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
        raise ConfigError(f"{field}: no range from {low} to {high}")

    def value(fraction: float) -> float:
        found = low + fraction * (high - low)
        return round(found) if whole else found

    return _range(field, value, num)


def log_uniform(field: str, low: float, high: float, num: int = 0, whole: bool = False) -> Space:
    """Return a range like `uniform`, whose logarithms are even. Raises ConfigError unless 0 < low.

    The ends are exact; between them a value has six significant digits, which people can type.
    """
    if not 0 < low < high < math.inf:
        raise ConfigError(f"{field}: no logarithmic range from {low} to {high}")

    def value(fraction: float) -> float:
        if fraction in (0.0, 1.0):
            return high if fraction else low
        found = low * (high / low) ** fraction
        return round(found) if whole else float(f"{found:.6g}")

    return _range(field, value, num)


def product(*spaces: Space) -> Space:
    """Return every combination of one point of each space; the last space changes fastest.

    Raises ConfigError where two spaces set the same field.
    """

    def points() -> list[Point]:
        found: list[Point] = [{}]
        for space in spaces:
            listed = space.points()
            found = [_merge([first, second]) for first in found for second in listed]
        return found if spaces else []

    return Space(points, lambda rng: _merge([space.draw(rng) for space in spaces]))


def zip_(*spaces: Space) -> Space:
    """Return the first points of all spaces together, then the second, and so on.

    Raises ConfigError where the spaces have different sizes or set the same field.
    """

    def points() -> list[Point]:
        columns = [space.points() for space in spaces]
        if len({len(column) for column in columns}) > 1:
            raise ConfigError(f"zip_ of spaces of different sizes: {[len(c) for c in columns]}")
        return [_merge(row) for row in zip(*columns, strict=True)]

    return Space(points, lambda rng: _pick(rng, points()))


def chain(*spaces: Space) -> Space:
    """Return the points of one space after those of another; a draw takes any space alike."""

    def points() -> list[Point]:
        return [point for space in spaces for point in space.points()]

    return Space(points, lambda rng: _pick(rng, spaces).draw(rng))


def draws(space: Space, num: int, seed: int = 0) -> Space:
    """Return `num` random points of a space, the same for the same seed (random search)."""
    if num < 1:
        raise ConfigError(f"draws of {num} points")
    rng = random.Random(seed)
    found = [space.draw(rng) for _ in range(num)]
    return _listed(found)


def _listed(found: list[Point]) -> Space:
    return Space(lambda: list(found), lambda rng: _pick(rng, found))


def _pick(rng: random.Random, found: Sequence[Any]) -> Any:
    if not found:
        raise ConfigError("the sweep draws from an empty space")
    return rng.choice(found)


def _range(field: str, value: Callable[[float], float], num: int) -> Space:
    def points() -> list[Point]:
        if num < 1:
            raise ConfigError(
                f"{field} is a range without end: give it num=, or take draws(space, num)"
            )
        return [{field: value(i / (num - 1) if num > 1 else 0.5)} for i in range(num)]

    return Space(points, lambda rng: {field: value(rng.random())})


def _merge(parts: Sequence[Point]) -> Point:
    merged: Point = {}
    for part in parts:
        if twice := merged.keys() & part.keys():
            raise ConfigError(f"the sweep sets {', '.join(sorted(twice))} twice in one point")
        merged |= part
    return merged
