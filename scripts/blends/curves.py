"""What is made of scores: the volume under a curve of trade-offs, intervals over seeds, and who is above whom.

Each point of a way of composing has three scores: how much there is of the one, of the other, and how well the prompt was
followed. What there is of an adapter counts from 0, as pictures with the other alone have it, to 1, as those with it alone
have it, and half of the prompt's score is given. A way is as good as the volume that its points dominate, from (0, 0, 0): a
point that has more of one thing for less of another adds nothing where plain strengths reach it too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]
"""(points, seeds, prompts, 3)."""
RESAMPLED = 300
_TOP = 1.2  # more than an adapter alone has is no better from here on
_LEAST = 0.05  # between the likenesses of both ends, below which they are the same


@dataclass(frozen=True)
class Interval:
    """A figure with the interval in which it lies 19 times of 20, from other draws of seeds."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    def signed(self) -> str:
        """As a difference."""
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def area(points: npt.NDArray[np.float64]) -> float:
    """The area that points (count, 2) dominate, from (0, 0)."""
    found, height = 0.0, 0.0
    pairs: list[tuple[float, float]] = sorted(map(tuple, points.tolist()), reverse=True)
    for first, second in pairs:
        if second > height:
            found += first * (second - height)
            height = second
    return found


def volume(points: npt.NDArray[np.float64]) -> float:
    """The volume that points (count, 3) dominate, from (0, 0, 0)."""
    order = points[np.argsort(-points[:, 2])]
    levels = [*order[:, 2].tolist(), 0.0]
    return sum((area(order[: n + 1, :2]) * (levels[n] - levels[n + 1]) for n in range(len(order))), 0.0)


def reached(scores: Scores, seeds: Sequence[int]) -> npt.NDArray[np.float64]:
    """The mean of each point (points, 3) over some seeds and all prompts, within what counts."""
    means: npt.NDArray[np.float64] = scores[:, list(seeds)].mean((1, 2)).clip(0, _TOP)
    return means


def scaled(scores: Scores, plain: Scores) -> Scores:
    """Scores as they count, by those of plain strengths, whose first two points are the first and the second alone."""
    first, second = plain[:2].mean((1, 2))
    counted = scores.copy()
    for axis, (one, other) in enumerate(((first, second), (second, first))):
        counted[..., axis] = (scores[..., axis] - other[axis]) / max(one[axis] - other[axis], _LEAST)
    counted[..., 2] = (1 + scores[..., 2]) / 2
    return counted


def resampled(seeds: int) -> list[list[int]]:
    """Draws of seeds with repetition, always the same."""
    chance = np.random.default_rng(0)
    return [chance.integers(0, seeds, seeds).tolist() for _ in range(RESAMPLED)]


def _interval(value: float, others: Sequence[float]) -> Interval:
    low, high = np.percentile(others, [2.5, 97.5]).tolist() if len(others) else (value, value)
    return Interval(value, low, high)


def volumes(scores: Scores) -> Interval:
    """The volume of a way."""
    seeds = scores.shape[1]
    return _interval(volume(reached(scores, range(seeds))), [volume(reached(scores, one)) for one in resampled(seeds)])


def above(scores: Scores, plain: Scores) -> Interval:
    """By how much more volume a way has than plain strengths, of the same seeds."""

    def more(seeds: Sequence[int]) -> float:
        return volume(reached(scores, seeds)) - volume(reached(plain, seeds))

    count = scores.shape[1]
    return _interval(more(range(count)), [more(one) for one in resampled(count)])


def together(pairs: Sequence[tuple[Scores, Scores]]) -> Interval:
    """The mean over pairs of `above`."""
    found = [[volume(reached(one, seeds)) - volume(reached(plain, seeds)) for one, plain in pairs]
             for seeds in [list(range(pairs[0][0].shape[1])), *resampled(pairs[0][0].shape[1])]]  # fmt: skip
    means = [float(np.mean(one)) for one in found]
    return _interval(means[0], means[1:])


def balanced(scores: Scores) -> tuple[int, Interval]:
    """The point with the most of what it has least of, both likenesses considered, and how much that is."""
    seeds = scores.shape[1]

    def least(chosen: Sequence[int]) -> npt.NDArray[np.float64]:
        smaller: npt.NDArray[np.float64] = reached(scores, chosen)[:, :2].min(1)
        return smaller

    whole = least(range(seeds))
    point = int(whole.argmax())
    return point, _interval(float(whole[point]), [float(least(one)[point]) for one in resampled(seeds)])
