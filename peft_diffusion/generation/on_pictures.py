"""Strengths for adapters that are on together, by the loss of real pictures.

What adapters cost each other on pictures that they draw themselves (`calibration.suggested`) is not what they cost each
other on real ones, where what one changes may mend what the other left wrong. So where real pictures are at hand, their
losses are measured. A loss is nearly quadratic in strengths, so that a few mixes tell where it is least.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Protocol

import torch

from ..core.errors import UserError
from ..core.events import Never, Stop, check_stop
from ..core.strength_schedule import ByPart
from .calibration import Suggestion, times

_TRIES = 4  # mixes that are asked for where the last ones say that the loss is least
_SWEEPS = 100  # over the shares, of which there are few
_DIGITS = 2  # of a share


class Losses(Protocol):
    """What adapters lose on real pictures."""

    @property
    def prompts(self) -> Mapping[str, Sequence[str]]:
        """By the name of each adapter, captions of its pictures, which call it."""

    def loss(self, name: str, amounts: Mapping[str, float | ByPart]) -> float:
        """Measure how well an adapter's own pictures are denoised.

        Args:
            name: The adapter whose pictures they are.
            amounts: The strengths of all that are on.

        Returns:
            The mean loss of its pictures, at the same noise each time.
        """


def suggested_on_pictures(
    losses: Losses,
    amounts: Mapping[str, float | ByPart],
    stop: Stop = Never(),  # noqa: B008 -- has no state
) -> Suggestion:
    """Find strengths at which adapters lose least on their pictures, each as a share of what the base loses on these.

    What an adapter loses alone would be no measure: of pictures that it was trained on it may be next to nothing.

    First whole strengths are measured, then less of each and of each two, as many mixes as a quadratic of the shares has
    coefficients. It is fitted to all mixes, and the one where it is least is measured too, until there is none that is new.

    Args:
        losses: Measures.
        amounts: Which adapters, and at which strength each is alone.
        stop: Where it is set, nothing is measured after the present loss.

    Returns:
        The best of the mixes that were measured, whole strengths among them. Its excess is the sum over adapters of by how
        much more than alone they lose with all on, as a share of what the base loses; below 0 where they help each other.

    Raises:
        UserError: A loss is no finite number, or that of the base is 0.
        Interrupted: It was stopped.
    """

    def loss(name: str, mix: Mapping[str, float | ByPart]) -> float:
        check_stop(stop, "stopped while strengths were looked for")
        found = losses.loss(name, mix)
        if not math.isfinite(found) or (not mix and not found):
            where = f"with {' and '.join(mix)} on" if mix else "on the base"
            raise UserError(f"the loss of the pictures of {name} is {found:g} {where}, by which no strengths are found")
        return found

    names = list(amounts)
    alone = {name: loss(name, {name: amounts[name]}) for name in names}
    base = {name: loss(name, {}) for name in names}
    costs: dict[tuple[float, ...], float] = {}

    def measure(shares: tuple[float, ...]) -> None:
        mix = {name: times(amounts[name], share) for name, share in zip(names, shares, strict=True)}
        costs[shares] = sum((loss(name, mix) - alone[name]) / base[name] for name in names)

    for shares in _first(len(names)):
        measure(shares)
    for _ in range(_TRIES):
        guess = _least(costs)
        if guess in costs:
            break
        measure(guess)
    best = min(costs, key=lambda shares: costs[shares])
    whole = (1.0,) * len(names)
    return Suggestion(dict(zip(names, best, strict=True)), costs[best], costs[whole])


def _first(count: int) -> list[tuple[float, ...]]:
    """The mixes that decide a quadratic of so many shares, whole strengths first."""

    def less(share: float, *places: int) -> tuple[float, ...]:
        return tuple(share if place in places else 1.0 for place in range(count))

    each = [less(share, place) for place in range(count) for share in (0.75, 0.5)]
    return [less(1.0), *each, *(less(0.5, *pair) for pair in combinations(range(count), 2))]


def _least(costs: Mapping[tuple[float, ...], float]) -> tuple[float, ...]:
    """Where the quadratic nearest to what was measured is least, from 0 to 1, looked for from the best mix on.

    One share after the other goes to where the quadratic is least along it.
    """
    mixes = torch.tensor(list(costs), dtype=torch.float64)
    count = mixes.shape[1]
    pairs = list(combinations(range(count), 2))
    crossed = [mixes[:, one] * mixes[:, other] for one, other in pairs]
    columns = [torch.ones(len(mixes), dtype=torch.float64), *mixes.T, *mixes.T.square(), *crossed]
    values = torch.tensor(list(costs.values()), dtype=torch.float64)
    fitted = torch.linalg.lstsq(torch.stack(columns, 1), values[:, None], driver="gelsd").solution.flatten()
    slopes, bends = fitted[1 : 1 + count], fitted[1 + count : 1 + 2 * count]
    products = dict(zip(pairs, fitted[1 + 2 * count :].tolist(), strict=True))
    shares = list(min(costs.items(), key=lambda one: one[1])[0])
    for _ in range(_SWEEPS):
        for place in range(count):
            slope = float(slopes[place]) + sum(
                product * shares[a if b == place else b] for (a, b), product in products.items() if place in (a, b)
            )
            bend = float(bends[place])
            ends = [0.0, 1.0, *([min(1.0, max(0.0, -slope / (2 * bend)))] if bend > 0 else [])]
            shares[place] = min(ends, key=lambda share: slope * share + bend * share * share)
    return tuple(round(share, _DIGITS) for share in shares)
