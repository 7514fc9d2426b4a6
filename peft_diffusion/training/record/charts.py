"""Charts as SVG that stands in a page: it takes colours and fonts from the page's style sheet. Imports no torch."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from markupsafe import Markup

Look: TypeAlias = Literal["faint", "first", "second"]
Format: TypeAlias = Literal["number", "percent"]

_WIDTH, _HEIGHT = 720, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 28, 12, 30
_POINTS = 400  # of a curve; more are averaged


@dataclass(frozen=True)
class Curve:
    """A curve with its name; with ``dots`` each value is marked and tells itself under the pointer.

    ``ends`` are the lower and the upper end of an interval at each point, which are drawn as a bar; none where it is empty.
    """

    name: str
    points: Sequence[tuple[float, float]]
    look: Look
    dots: bool = False
    ends: Sequence[tuple[float, float]] = ()


def lines(
    curves: Sequence[Curve],
    title: str,
    form: Format = "number",
    mark: float | None = None,
    limits: tuple[float, float] | None = None,
    end: float | None = None,
    over: str = "step",
) -> Markup:
    """Draw curves over the steps as an SVG.

    Args:
        curves: The curves.
        title: What they show, for who cannot see them.
        form: How values are written.
        mark: A step to point out.
        limits: Those of the axis of values.
        end: The last step of the axis of steps.
        over: What curves are over, where that is something else than steps.

    Returns:
        The element.
    """
    curves = [_drawable(curve) for curve in curves]
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return Markup("")
    low, high = limits or room_for(curves)
    last = end or max((x for curve in curves for x, _ in curve.points), default=1) or 1
    first = min(0, *(x for curve in curves for x, _ in curve.points))  # below 0 where strengths are

    def x_of(step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (step - first) / (last - first)

    def y_of(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    parts = [Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, _HEIGHT, title)]
    for tick in ticks(low, high):
        y = y_of(tick)
        parts.append(Markup('<path class="grid" d="M{:.1f} {:.1f}H{}"/>').format(_LEFT, y, _WIDTH - _RIGHT))
        parts.append(Markup('<text class="y" x="{}" y="{:.1f}">{}</text>').format(_LEFT - 8, y + 4, written(tick, form)))
    for tick in ticks(first, last, 6):
        words = f"{tick:g}"
        parts.append(Markup('<text class="x" x="{:.1f}" y="{}">{}</text>').format(x_of(tick), _HEIGHT - 9, words))
    if mark is not None:
        parts.append(Markup('<path class="mark" d="M{:.1f} {}V{}"/>').format(x_of(mark), _TOP, _HEIGHT - _BOTTOM))
    parts += [part for curve in curves for part in _drawn(curve, x_of, y_of, over, form)]
    return Markup("").join([*parts, Markup("</svg>")])


def _drawn(
    curve: Curve, x_of: Callable[[float], float], y_of: Callable[[float], float], over: str, form: Format
) -> Iterator[Markup]:
    """The path of a curve, its intervals and its dots."""
    path = "L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in thinned(curve.points))
    yield Markup('<path class="curve {}" d="M{}"/>').format(curve.look, path)
    for (x, _), (lower, upper) in zip(curve.points, curve.ends, strict=bool(curve.ends)):
        bar = Markup('<path class="curve {}" d="M{:.1f} {:.1f}V{:.1f}"/>')
        yield bar.format(curve.look, x_of(x), y_of(lower), y_of(upper))
    for x, y in curve.points if curve.dots else ():
        dot = '<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.6"><title>{} {:g}: {}</title></circle>'
        yield Markup(dot).format(curve.look, x_of(x), y_of(y), over, x, written(y, form))


def _drawable(curve: Curve) -> Curve:
    """A curve by its points that have a place: those of a run that diverged are NaN or infinite."""
    kept = [place for place, (_, y) in enumerate(curve.points) if math.isfinite(y)]
    ends = [curve.ends[place] for place in kept] if curve.ends else ()
    return replace(curve, points=[curve.points[place] for place in kept], ends=ends)


def bars(values: Mapping[str, float], title: str, form: Format = "percent") -> Markup:
    """Draw values as bars with their names.

    Args:
        values: By name, in their order.
        title: What they show, for who cannot see them.
        form: How values are written.

    Returns:
        The element.
    """
    row, names, room = 17, 330, 300
    most = max(values.values(), default=0.0) or 1.0
    height = row * len(values) + 4
    parts = [Markup('<svg class="chart bars" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, height, title)]
    for place, (name, value) in enumerate(values.items()):
        y, width = row * place + 2, room * value / most
        shown = name if len(name) <= 46 else f"…{name[-45:]}"
        parts.append(Markup('<text class="y" x="{}" y="{}">{}<title>{}</title></text>').format(names, y + 12, shown, name))
        bar = Markup('<rect class="bar" x="{}" y="{}" width="{:.1f}" height="11" rx="2"/>')
        parts.append(bar.format(names + 8, y + 3, width))
        where = names + 14 + width
        parts.append(Markup('<text class="v" x="{:.1f}" y="{}">{}</text>').format(where, y + 12, written(value, form)))
    return Markup("").join([*parts, Markup("</svg>")])


def room_for(curves: Sequence[Curve]) -> tuple[float, float]:
    """Choose the limits of an axis for curves. Single spikes are cut off, but none of curves with dots.

    Args:
        curves: The curves.

    Returns:
        Lowest and highest value.
    """
    values = [y for curve in curves for _, y in curve.points] + [y for curve in curves for pair in curve.ends for y in pair]
    return bounds(values, [y for curve in curves if curve.dots for _, y in curve.points])


def bounds(values: Sequence[float], whole: Sequence[float] = ()) -> tuple[float, float]:
    """Choose the limits of an axis: a little more than all values, from 0 if that is near. Single spikes are cut off.

    Args:
        values: Of curves.
        whole: Values of which none is cut off.

    Returns:
        Lowest and highest value.
    """
    ordered = sorted(filter(math.isfinite, values))
    if not ordered:
        return 0.0, 1.0
    low, high = ordered[0], ordered[-1]
    usual = ordered[int(0.98 * (len(ordered) - 1))]
    if len(ordered) > 50 and high > 1.5 * usual:
        high = max([1.1 * usual, *filter(math.isfinite, whole)])
    if 0 <= low < 0.4 * high:
        low = 0.0
    room = 0.06 * (high - low) or 0.1 * abs(high) or 0.01
    return (low if low == 0 else low - room), high + room


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Choose round numbers within limits.

    Args:
        low: The lowest.
        high: The highest.
        count: About how many.

    Returns:
        The numbers.
    """
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * number, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Take fewer points of a curve, each the mean of its neighbourhood.

    Args:
        points: Steps and values.

    Returns:
        Not too many.
    """
    size = -(-len(points) // _POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def written(value: float, form: Format) -> str:
    """Write a value for people, with three digits.

    Args:
        value: The value.
        form: Whether as a number or as a share in percent.

    Returns:
        The text.
    """
    if form == "percent":
        return f"{100 * value:.3g}%"
    return f"{value:.3g}"


def running(points: Sequence[tuple[int, float]], decay: float = 0.95) -> list[tuple[int, float]]:
    """Average a curve as it goes, without the pull of its beginning. What is no finite number is left out.

    Args:
        points: Steps and values.
        decay: From 0 to below 1; higher is smoother.

    Returns:
        The running mean.
    """
    means, weight, mean = [], 0.0, 0.0
    for step, value in filter(lambda point: math.isfinite(point[1]), points):
        weight = decay * weight + 1 - decay
        mean = decay * mean + (1 - decay) * value
        means.append((step, mean / weight))
    return means
