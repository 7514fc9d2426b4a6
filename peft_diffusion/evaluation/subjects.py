"""Subjects told by examples: each is the mean of its real pictures, and a picture's own is ranked among all."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .styles import share
from .subject_net import Subjects

_ARTICLES = re.compile(r"\b(a|an|the|some)\b")
_MOST, _PART = 5, 10  # the nearest five count, but no more than a tenth of all


def key_of(words: str) -> str:
    """Bring words for a subject to one form: small letters, no articles, no marks.

    Args:
        words: Such as "A red apple, ".

    Returns:
        Such as "red apple".
    """
    return " ".join(re.findall(r"[^\W_]+", _ARTICLES.sub(" ", words.lower())))


@dataclass
class KnownSubjects:
    """Real pictures by what they show.

    Attributes:
        points: What a judge sees of each subject's pictures, rows of length 1, by `key_of` its words.
    """

    points: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, words: Sequence[str], points: Tensor) -> None:
        """Learn pictures.

        Args:
            words: What each shows.
            points: What the judge sees of them, (count, width) of length 1.
        """
        for one, point in zip(words, points, strict=True):
            if key_of(one):
                self.points.setdefault(key_of(one), []).append(point)

    @property
    def nearest(self) -> int:
        """How many of the nearest subjects count as told right."""
        return max(1, min(_MOST, round(len(self.points) / _PART)))

    def knows(self, words: str) -> bool:
        """Tell whether there is a real picture of a subject.

        Args:
            words: Its words.

        Returns:
            Whether there is.
        """
        return key_of(words) in self.points

    def right(self, points: Tensor, words: Sequence[str]) -> list[bool]:
        """Tell whether pictures show their subjects: whether these are among the `nearest`.

        Args:
            points: What the judge sees of them, (count, width) of length 1.
            words: What each should show, which must be known.

        Returns:
            One answer each.
        """
        return self._right(self.points, points, words)

    def trust(self) -> tuple[float, int] | None:
        """Tell how often real pictures are told right from other pictures of the same subject.

        Returns:
            The share and how many were asked; None where no subject has two pictures.
        """
        answers: list[bool] = []
        for name, rows in self.points.items():
            for place, point in enumerate(rows) if len(rows) > 1 else ():
                answers += self._right({**self.points, name: rows[:place] + rows[place + 1 :]}, point[None], [name])
        return (share(answers), len(answers)) if answers else None

    def _right(self, known: Mapping[str, Sequence[Tensor]], points: Tensor, words: Sequence[str]) -> list[bool]:
        subjects = Subjects({name: torch.stack(list(rows)) for name, rows in known.items()})
        return [rank <= self.nearest for rank in subjects.ranks(points, [key_of(one) for one in words])]
