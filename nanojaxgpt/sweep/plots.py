"""In: what came of a sweep's points over their seeds. Out: PNGs of it, a line for each setting.

A setting is a point without its seed. What is drawn of it is the mean over the seeds, and the range
from the lowest to the highest.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nanojaxgpt.sweep.plan import SEED, show_point
from nanojaxgpt.sweep.results import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = 8  # settings that a legend can name, and values that have a tick of their own
STYLES = ("-", "--", ":", "-.")  # of a second field
EARLY = 0.25  # of the steps: the losses before don't set the range of the axis
LIGHTEST = 0.9  # of the color map, whose end can't be seen on white

Curve = Sequence[tuple[int, float]]


class Band(NamedTuple):
    """Curves of one setting together: at each step that all of them have, mean and extremes."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def make_band(curves: Sequence[Curve]) -> Band:
    """Return the mean of curves and its band, where all of them are finite."""
    tables = [{step: value for step, value in c if math.isfinite(value)} for c in curves]
    steps = sorted(set.intersection(*map(set, tables))) if tables else []
    rows = [[table[step] for table in tables] for step in steps]
    return Band(steps, [*map(statistics.fmean, rows)], [*map(min, rows)], [*map(max, rows)])


def draw_band(axes: "Axes", band: Band, **style: Any) -> None:
    """Draw the mean as a line, and the band around it where several curves differ."""
    dots = {"marker": "o", "markersize": 3} if len(band.steps) == 1 else {}
    axes.plot(band.steps, band.mean, **dots | style)
    if band.low != band.high:
        shade = {"color": style["color"], "alpha": 0.2 * style.get("alpha", 1.0), "linewidth": 0}
        axes.fill_between(band.steps, band.low, band.high, **shade)


def fit_axis(
    axes: "Axes", bands: Sequence[Band], maximize: bool = False, early: float = 0.0
) -> None:
    """Let the y-axis show the curves; what diverges, and the `early` part of them, may leave it."""
    last = max((band.steps[-1] for band in bands if band.steps), default=0)
    late = [
        value
        for band in bands
        for step, ends in zip(band.steps, zip(band.low, band.high, strict=True), strict=True)
        if step >= early * last
        for value in ends
    ]
    low, high = shown_range(late, maximize)
    if low < high:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def shown_range(values: Sequence[float], maximize: bool) -> tuple[float, float]:
    """Return the range of the finite values that a plot shows, without those far worse than most.

    A run that diverges would leave all others on one line.
    """
    sign = -1 if maximize else 1
    found = sorted(sign * value for value in values if math.isfinite(value))
    if not found:
        return math.nan, math.nan
    best, worst = found[0], found[-1]
    usual = found[3 * len(found) // 4 - 1] if len(found) >= 4 else worst
    if usual > best and worst - best > max(10 * (usual - best), abs(best) / 2):
        worst = best + 3 * (usual - best)
    low, high = sorted((sign * best, sign * worst))
    return low, high


def plot_curves(
    path: Path, groups: list[Group], fields: list[str], metric: str, maximize: bool
) -> None:
    """Write the metric against the step as a PNG, a line for each setting with its band.

    Few settings have a legend. Many are colored by the value of a number that is swept; without
    one, the best few are named and the others are gray.
    """
    from matplotlib.figure import Figure

    bands = [(group, make_band([r.curve for r in group.results])) for group in groups]
    bands = [(group, band) for group, band in bands if band.steps]
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    by, style_of = color_fields([group for group, _ in bands], fields)
    if len(bands) <= FEW or not by:
        draw_few(axes, bands)
    else:
        draw_many(figure, axes, bands, by, style_of)
    fit_axis(axes, [band for _, band in bands], maximize, EARLY)
    if any(len(group.results) > 1 for group in groups):
        axes.set_title("line: mean over seeds; band: lowest to highest", fontsize="small")
    axes.set(xlabel="step", ylabel=metric)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def draw_few(axes: "Axes", bands: list[tuple[Group, Band]]) -> None:
    """Draw bands with a legend; of many the first few, which are the best, the others in gray."""
    named, others = bands[:FEW], bands[FEW:]
    for number, (_, band) in enumerate(others):
        label = f"{len(others)} others" if not number else ""
        axes.plot(band.steps, band.mean, color="0.8", linewidth=1, label=label, zorder=1)
    points = [setting(group) for group, _ in named]
    for number, color in ordered_colors(points):
        group, band = named[number]
        ends = {result.state for result in group.results} - {"finished"}
        end = f" ({', '.join(sorted(ends))})" if ends else ""
        draw_band(axes, band, color=color, label=show_point(points[number]) + end)
    if len(bands) > 1:
        axes.legend(fontsize="small")


def draw_many(
    figure: "Figure", axes: "Axes", bands: list[tuple[Group, Band]], by: str, style_of: str
) -> None:
    """Draw bands colored by the value of one field, their lines styled by that of another."""
    groups = [group for group, _ in bands]
    scale = color_scale(figure, axes, values_of(groups, by), by)
    styles: dict[Any, str] = {}
    if style_of:
        values = sorted(set(values_of(groups, style_of)), key=ordered)
        styles = dict(zip(values, STYLES, strict=False))
    for group, band in bands:
        point = setting(group)
        color = scale.to_rgba(point[by]) if by in point else "0.7"
        draw_band(axes, band, color=color, linestyle=styles.get(point.get(style_of), "-"))
    for value, line in styles.items():
        axes.plot([], [], color="0.3", linestyle=line, label=show_point({style_of: value}))
    if styles:
        axes.legend(fontsize="small")


def plot_field(
    path: Path, groups: list[Group], field: str, fields: list[str], metric: str, maximize: bool
) -> None:
    """Write the metric against one swept field as a PNG.

    Settings that differ in this field alone are one line, where there are few such lines; else each
    is a dot. What is not finite, or far worse than most, is a cross at the edge.
    """
    from matplotlib.figure import Figure

    groups = [group for group in groups if field in setting(group)]
    values = values_of(groups, field)
    names = [] if numbers_of(values) else sorted(set(values), key=ordered)
    low, high = shown_range([group.mean for group in groups], maximize)
    inside = [group for group in groups if low <= group.mean <= high]
    lines: dict[str, list[Group]] = {}
    for group in inside:
        rest = {k: v for k, v in setting(group).items() if k != field and k in fields}
        lines.setdefault(repr(rest), []).append(group)
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    if len(lines) <= FEW and len(inside) > len(lines):
        draw_lines(axes, list(lines.values()), field, fields, names)
    else:
        draw_dots(figure, axes, inside, field, fields, names)
    outside = [axis_position(group, field, names) for group in groups if group not in inside]
    mark_outside(axes, outside, 0.02 if maximize else 0.98)
    if names:
        axes.set_xticks(range(len(names)), [tick_text(name) for name in names])
        axes.margins(x=0.2)
    else:
        axes.set_xscale(scale_of(values))
        set_ticks(axes.xaxis, values)
    if any(len(group.results) > 1 for group in groups):
        axes.set_title("dot: mean over seeds; bar: lowest to highest", fontsize="small")
    axes.set(xlabel=field, ylabel=metric)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def draw_lines(
    axes: "Axes", lines: list[list[Group]], field: str, fields: list[str], names: list[Any]
) -> None:
    """Draw each list of groups as a line of means over a field, with the range of their seeds.

    Names have no line between them, and stand side by side.
    """
    points = [setting(members[0]) for members in lines]
    points = [{k: v for k, v in p.items() if k != field and k in fields} for p in points]
    for rank, (number, color) in enumerate(ordered_colors(points)):
        members = sorted(lines[number], key=lambda group: axis_position(group, field, names))
        shift = 0.08 * (rank - (len(lines) - 1) / 2) if names else 0
        found = [[result.value for result in group.results] for group in members]
        means = [group.mean for group in members]
        below = [mean - min(values) for mean, values in zip(means, found, strict=True)]
        above = [max(values) - mean for mean, values in zip(means, found, strict=True)]
        axes.errorbar(
            [axis_position(group, field, names) + shift for group in members],
            means, [below, above],
            color=color, marker="o", capsize=3, linestyle="" if names else "-",
            label=show_point(points[number]) if len(lines) > 1 else "",
        )  # fmt: skip


def draw_dots(
    figure: "Figure",
    axes: "Axes",
    groups: list[Group],
    field: str,
    fields: list[str],
    names: list[Any],
) -> None:
    """Draw each group as a dot over a field, colored by another number that is swept."""
    by, _ = color_fields(groups, [other for other in fields if other != field])
    scale = color_scale(figure, axes, values_of(groups, by), by) if by else None
    for group in groups:
        value = setting(group).get(by)
        color = "0.5" if scale is None or value is None else scale.to_rgba(value)
        axes.plot(axis_position(group, field, names), group.mean, "o", color=color)


def mark_outside(axes: "Axes", places: list[Any], height: float) -> None:
    """Mark at the edge of the axes where the values out of range lie."""
    if places:
        axes.plot(
            places, [height] * len(places), "x", color="C3", transform=axes.get_xaxis_transform(),
            label="not finite, or far off",
        )  # fmt: skip


def plot_pair(
    path: Path, groups: list[Group], pair: tuple[str, str], metric: str, maximize: bool
) -> None:
    """Write a heat map of the best mean over two fields as a PNG; dots where there is no grid."""
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    cells: dict[tuple, float] = {}
    for group in groups:  # the best come first
        point = setting(group)
        if set(pair) <= point.keys() and math.isfinite(group.mean):
            cells.setdefault((point[pair[0]], point[pair[1]]), group.mean)
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=pair[0], ylabel=pair[1])
    means = list(cells.values())
    norm = Normalize(*shown_range(means, maximize))
    columns, rows = [sorted({key[i] for key in cells}, key=ordered) for i in (0, 1)]
    if cells and len(columns) * len(rows) <= 2 * len(cells):
        heat = [[cells.get((column, row), math.nan) for column in columns] for row in rows]
        image = axes.imshow(heat, norm=norm, origin="lower", aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(columns)), [tick_text(value) for value in columns])
        axes.set_yticks(range(len(rows)), [tick_text(value) for value in rows])
        for (column, row), value in cells.items():
            at, color = (columns.index(column), rows.index(row)), "k" if norm(value) > 0.5 else "w"
            text = f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"
            axes.text(*at, text, ha="center", va="center", color=color, fontsize=8)
        figure.colorbar(image, label=metric)
    elif cells:
        sides = [[key[i] for key in cells] for i in (0, 1)]
        places = [side if numbers_of(side) else [str(value) for value in side] for side in sides]
        dots = axes.scatter(*places, c=means, norm=norm, cmap=color_map())
        axes.set(xscale=scale_of(sides[0]), yscale=scale_of(sides[1]))
        figure.colorbar(dots, label=metric)
    figure.savefig(path, dpi=120)


def setting(group: Group) -> dict[str, Any]:
    """Return the point of a group without its seeds."""
    return {k: v for k, v in group.results[0].trial.point.items() if k != SEED}


def values_of(groups: list[Group], field: str) -> list[Any]:
    """Return the value of a field in each group that sets it."""
    points = map(setting, groups)
    return [point[field] for point in points if field in point]


def axis_position(group: Group, field: str, names: list[Any]) -> Any:
    """Return where a group stands on the axis of a field: a number, or the index of its name."""
    value = setting(group)[field]
    return names.index(value) if names else value


def color_fields(groups: list[Group], fields: list[str]) -> tuple[str, str]:
    """Return the field that colors many settings and the one that styles their lines; "": none.

    The first is the number that is swept with the most values, the second another field of few.
    """
    counts = {field: len(set(values_of(groups, field))) for field in fields}
    numbers = [f for f in fields if counts[f] > 2 and numbers_of(values_of(groups, f))]
    by = max(numbers, key=counts.__getitem__, default="")
    rest = [field for field in fields if field != by and 1 < counts[field] <= len(STYLES)]
    return by, rest[0] if rest else ""


def ordered_colors(points: list[dict[str, Any]]) -> list[tuple[int, Any]]:
    """Return the number of each point, in the order of a legend, and its color.

    Points of one number alone come in its order, from dark to light.
    """
    if len({*map(tuple, points)}) == 1 and len(points[0]) == 1:
        (field,) = points[0]
        if numbers_of([point[field] for point in points]):
            order = sorted(range(len(points)), key=lambda number: points[number][field])
            shades = color_map()([rank / max(1, len(points) - 1) for rank in range(len(points))])
            return list(zip(order, shades, strict=True))
    return [(number, f"C{number}") for number in range(len(points))]


def color_map() -> Any:
    """Return the color map of numbers, without its lightest part."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"]([LIGHTEST * n / 255 for n in range(256)]))


def color_scale(figure: "Figure", axes: "Axes", values: list[Any], field: str) -> Any:
    """Return the function from value to color, and draw its bar beside the axes."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize

    norm = {"log": LogNorm, "linear": Normalize}[scale_of(values)](min(values), max(values))
    scale = ScalarMappable(norm, color_map())
    bar = figure.colorbar(scale, ax=axes, label=field)
    set_ticks(bar.ax.yaxis, values)
    return scale


def set_ticks(axis: Any, values: list[Any]) -> None:
    """Give each of a few numbers its tick."""
    found = sorted(set(values))
    if len(found) <= FEW:
        axis.set_ticks(found, [tick_text(value) for value in found])
        axis.set_ticks([], minor=True)


def tick_text(value: Any) -> str:
    """Return a value as a tick has it."""
    return f"{value:g}" if numbers_of([value]) else str(value)


def numbers_of(values: list[Any]) -> bool:
    """Return whether all values are numbers, so that they have places on an axis."""
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def scale_of(values: list[Any]) -> str:
    """Return `log` for positive numbers over a decade or more (or 8 to 1), else `linear`."""
    spans = numbers_of(values) and min(values) > 0 and max(values) >= 8 * min(values)
    return "log" if spans else "linear"


def ordered(value: Any) -> tuple:
    """Return a key that sorts numbers before names."""
    return (0, value, "") if numbers_of([value]) else (1, 0, str(value))
