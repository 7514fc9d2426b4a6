"""Styles told by examples: each is the mean of what a judge sees of its pictures, and a picture is of the nearest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEAST = 1e-3  # share of the mean deviation that one is taken for at least: what never varied has no scale


@dataclass(frozen=True)
class Styles:
    """Styles by the pictures of each.

    Distances are Euclidean, each number in units of its deviation within the styles.

    Attributes:
        features: What a judge sees of the pictures of each style, (pictures, width), by its name.
    """

    features: Mapping[str, Tensor]

    @property
    def names(self) -> list[str]:
        """The styles."""
        return list(self.features)

    def means(self) -> Tensor:
        """Give the mean of each style.

        Returns:
            (styles, width).
        """
        return torch.stack([rows.mean(0) for rows in self.features.values()])

    def scale(self) -> Tensor:
        """Give the deviation within styles.

        Returns:
            (width,), above 0.
        """
        squares = torch.stack([(rows - rows.mean(0)).square().sum(0) for rows in self.features.values()]).sum(0)
        freedom = sum(len(rows) - 1 for rows in self.features.values())
        deviation = (squares / max(1, freedom)).sqrt()
        return deviation.clamp_min(_LEAST * float(deviation.mean()) or 1.0)

    def distances(self, features: Tensor) -> Tensor:
        """Measure how far pictures are from each style.

        Args:
            features: What the judge sees of them, (count, width).

        Returns:
            (count, styles).
        """
        scale = self.scale()
        return torch.cdist(features / scale, self.means() / scale)

    def told(self, features: Tensor) -> list[str]:
        """Name the nearest style of each picture.

        Args:
            features: What the judge sees of them, (count, width).

        Returns:
            Names.
        """
        names = self.names
        return [names[place] for place in self.distances(features).argmin(1).tolist()]

    def likeness(self, features: Tensor, style: str, start: str) -> Tensor:
        """Measure how far pictures have gone from one style to another.

        Args:
            features: What the judge sees of them, (count, width).
            style: Where they go to.
            start: Where they come from.

        Returns:
            (count,): 0 where a picture is as the mean of ``start``, 1 as that of ``style``, along the line between both.
        """
        scale = self.scale()
        origin, end = (self.features[name].mean(0) / scale for name in (start, style))
        way = end - origin
        return (features / scale - origin) @ way / way.square().sum().clamp_min(1e-12)

    def left_out(self, style: str) -> list[str]:
        """Name the style of each picture of a style, as a judge does that never saw the picture.

        Args:
            style: Whose pictures; it has two or more.

        Returns:
            What each is told to be.
        """
        rows = self.features[style]
        found = []
        for place in range(len(rows)):
            others = torch.cat([rows[:place], rows[place + 1 :]])
            found += Styles({**self.features, style: others}).told(rows[place : place + 1])
        return found

    def trust(self) -> dict[str, float]:
        """Tell how often pictures of each style are told right, by a judge that never saw them.

        Returns:
            Shares from 0 to 1, of styles that have two pictures or more.
        """
        return {
            name: share([told == name for told in self.left_out(name)])
            for name, rows in self.features.items()
            if len(rows) > 1
        }


def share(answers: Sequence[bool]) -> float:
    """Tell how many of some answers are yes.

    Args:
        answers: One or more.

    Returns:
        From 0 to 1.
    """
    return sum(answers) / len(answers)
