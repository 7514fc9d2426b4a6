"""Means with confidence intervals, by Student's t distribution and for shares by counts too. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

LEVEL = 0.95
"""The confidence of intervals."""
KIND = "Student's t; of shares never narrower than for as many pictures by Wilson and by Clopper and Pearson"
"""How they are found."""


@dataclass(frozen=True)
class Estimate:
    """A mean, and how far it may be off.

    Attributes:
        mean: Of the values.
        half: Half of the confidence interval of `LEVEL`; None of a single value, which says nothing of its spread.
        count: How many values there were.
    """

    mean: float
    half: float | None
    count: int

    @property
    def low(self) -> float:
        """The lower end of the interval; the mean where there is none."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """The upper end of the interval; the mean where there is none."""
        return self.mean + (self.half or 0.0)

    def plain(self) -> dict[str, float | int | None]:
        """As JSON holds it: None for what is no finite number, which JSON has no word for."""
        mean, half = (one if one is None or math.isfinite(one) else None for one in (self.mean, self.half))
        return {"mean": mean, "half": half, "count": self.count}


def estimate(values: Sequence[float]) -> Estimate:
    """Estimate a mean from independent values, such as one a seed.

    Args:
        values: One or more.

    Returns:
        The mean, and ``t * s / sqrt(n)`` with the deviation ``s`` and Student's t of ``n - 1`` degrees of freedom.

    Raises:
        ValueError: There is no value.
    """
    count = len(values)
    if not count:
        raise ValueError("there is no value to estimate a mean from")
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Estimate(mean, quantile((1 + LEVEL) / 2, count - 1) * deviation / math.sqrt(count), count)


def estimate_share(values: Sequence[float], pictures: int) -> Estimate:
    """Estimate a share of pictures from independent values that are such shares, one a seed.

    Where few pictures happen to agree, their deviation is 0 and Student's interval is empty: of four seeds of four pictures
    of which nine in ten are told right, it misses the truth in a fifth of all cases. So it is never narrower than that of as
    many pictures: Wilson's (1927), and where all are alike Clopper and Pearson's (1934).

    Args:
        values: One or more, from 0 to 1.
        pictures: How many each is a share of, 1 or more.

    Returns:
        The mean, and the larger half interval.

    Raises:
        ValueError: There is no value.
    """
    found, count = estimate(values), len(values) * pictures
    if found.half is None or not math.isfinite(found.mean):
        return found
    if found.mean in (0.0, 1.0):
        least = 1 - ((1 - LEVEL) / 2) ** (1 / count)
    else:
        z = NormalDist().inv_cdf((1 + LEVEL) / 2)
        spread = math.sqrt(found.mean * (1 - found.mean) / count + (z / (2 * count)) ** 2)
        # Wilson's interval lies nearer to one half than the mean does; from the mean its farther end counts.
        least = (z * spread + abs(found.mean - 0.5) * z * z / count) / (1 + z * z / count)
    return Estimate(found.mean, max(found.half, least), found.count)


def quantile(share: float, freedom: int) -> float:
    """Find where Student's t distribution has a share of all below it.

    Args:
        share: Above 0.5 and below 1.
        freedom: Degrees of freedom, 1 or more.

    Returns:
        The place.
    """
    low, high = 0.0, 1.0
    while below(high, freedom) < share:
        low, high = high, 2 * high
    for _ in range(80):  # to the last digit
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def below(place: float, freedom: int) -> float:
    """Tell the share of Student's t distribution below a place (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    Args:
        place: 0 or more.
        freedom: Degrees of freedom, 1 or more.

    Returns:
        From 0.5 to below 1.
    """
    angle = math.atan(place / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    if freedom % 2:
        terms, term = 0.0, cosine
        for step in range(1, freedom - 1, 2):
            terms += term
            term *= cosine * cosine * (step + 1) / (step + 2)
        within = 2 / math.pi * (angle + sine * terms)
    else:
        terms, term = 0.0, 1.0
        for step in range(0, freedom - 1, 2):
            terms += term
            term *= cosine * cosine * (step + 1) / (step + 2)
        within = sine * terms
    return 0.5 + within / 2
