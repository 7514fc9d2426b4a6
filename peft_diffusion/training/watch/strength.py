"""At which strength an adapter serves best."""

from collections.abc import Callable, Mapping

from ..results import Suggestion

_STRENGTHS = (0.5, 0.75, 1.25)  # measured beside 0 and 1, which are known
_ROUNDED = 0.05  # a suggestion is no more precise than this


def suggest(measure: Callable[[float], float], base: float, full: float) -> Suggestion:
    """Find the strength of the lowest loss.

    Args:
        measure: Gives the loss at a strength.
        base: The loss at 0.
        full: The loss at 1.

    Returns:
        The strength, and the losses that were tried.
    """
    losses = {0.0: base, 1.0: full} | {strength: measure(strength) for strength in _STRENGTHS}
    if min(losses, key=lambda strength: losses[strength]) == max(_STRENGTHS):
        losses[1.5] = measure(1.5)
    losses = dict(sorted(losses.items()))
    return Suggestion(_lowest(losses), losses)


def _lowest(losses: Mapping[float, float]) -> float:
    """Where the parabola through the lowest value and its neighbours is lowest, rounded; the value itself at an end."""
    places = list(losses)
    at = min(range(len(places)), key=lambda index: losses[places[index]])
    if at in (0, len(places) - 1):
        return places[at]
    a, b, c = places[at - 1 : at + 2]
    fa, fb, fc = (losses[place] for place in (a, b, c))
    below = (b - a) * (fb - fc) - (b - c) * (fb - fa)
    above = (b - a) ** 2 * (fb - fc) - (b - c) ** 2 * (fb - fa)
    lowest = b - 0.5 * above / below if below else b
    return round(round(lowest / _ROUNDED) * _ROUNDED, 2)
