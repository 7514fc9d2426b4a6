"""Strengths that change over the steps of a generation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Strengths from the first step (pure noise) to the last, evenly spaced, with straight lines between them.

    ``Schedule([0, 1])`` fades an adapter in: composition from the base, detail from the adapter. A text encoder, which
    runs once before the steps, takes the mean.
    """

    values: Sequence[float]

    def __post_init__(self) -> None:
        try:
            values = () if isinstance(self.values, str) else tuple(float(value) for value in self.values)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last for a tensor of more than one dimension
            values = ()
        if not values or not all(math.isfinite(value) for value in values):
            raise UserError(f"a schedule is a list of finite strengths, as Schedule([0, 1]), not {self.values!r}")
        object.__setattr__(self, "values", values)  # of arrays and tensors too

    def at(self, progress: float) -> float:
        """Give the strength at a point of the steps.

        Args:
            progress: From 0 at the first step to 1 at the last.

        Returns:
            The strength.
        """
        position = progress * (len(self.values) - 1)
        left = min(int(position), len(self.values) - 1)
        right = min(left + 1, len(self.values) - 1)
        return self.values[left] + (position - left) * (self.values[right] - self.values[left])

    @property
    def mean(self) -> float:
        """The plain mean of the values."""
        return sum(self.values) / len(self.values)
