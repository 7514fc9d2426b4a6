"""The judge at work: what real pictures and the base's drawings teach it, how far it is to be trusted, and what it says."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from .gallery import Gallery
from .judge import Judge
from .measured import Trust
from .styles import Styles, share
from .subjects import KnownSubjects

BASE = "the base"
"""The style of what the base draws without any adapter."""
_MOSTLY = 0.8  # share of a folder's pictures that a judge names alike, from which on it knows the style


Shown: TypeAlias = tuple[Gallery, Sequence[Image.Image]]
"""Real pictures, and the same as the base's autoencoder gives them back."""


@dataclass(frozen=True)
class Taught:
    """A judge that was shown real pictures.

    Attributes:
        judge: Who judges.
        features: What it sees of the style of each folder's pictures, (pictures, width), by name.
        subjects: The subjects of all of them.
        names: What the judge by itself names most pictures of a folder, and the share, where it was trained on styles.
        prompts: The share of real pictures whose caption is the nearest of all; None for a judge that does not read.
    """

    judge: Judge
    features: Mapping[str, Tensor]
    subjects: KnownSubjects
    names: Mapping[str, tuple[str, float]]
    prompts: float | None

    @classmethod
    def of(cls, judge: Judge, shown: Mapping[str, Shown], beside: Mapping[str, Shown]) -> "Taught":
        """Show a judge real pictures.

        Args:
            judge: Who judges.
            shown: Those by whose styles and subjects it judges, by name.
            beside: Those by whose subjects alone it judges.

        Returns:
            The judge.
        """
        subjects, names, features = KnownSubjects(), {}, {}
        answers: list[bool] = []
        for gallery, images in beside.values():
            subjects.add(gallery.subjects, judge.subject(images))
        for name, (gallery, images) in shown.items():
            features[name], points = judge.both(images)
            subjects.add(gallery.subjects, points)
            found = judge.names(images)
            if found is not None:
                most, count = Counter(found).most_common(1)[0]
                names[name] = most, count / len(found)
            answers += right_words(points, gallery.subjects, read(judge, gallery.subjects))
        return cls(judge, features, subjects, names, share(answers) if answers else None)

    def known_as(self, name: str) -> str | None:
        """Tell what the judge by itself calls the style of a folder.

        Args:
            name: The folder's.

        Returns:
            A style that it was trained on; None where it calls too few pictures so.
        """
        most, part = self.names.get(name, ("", 0.0))
        return most if part >= _MOSTLY else None

    def trust(self, styles: Styles) -> Trust:
        """Tell how far the judge can be trusted.

        Args:
            styles: Those of the folders, and of the base.

        Returns:
            What was found.
        """
        told = {name: (right, len(styles.features[name])) for name, right in styles.trust().items()}
        known = len(self.subjects.points)
        return Trust(self.judge.name, told, self.subjects.trust(), known, self.subjects.nearest, self.prompts, self.names)


@dataclass(frozen=True)
class Verdicts:
    """What a judge says of the pictures of one adapter.

    Attributes:
        taught: The judge, with what it was shown.
        styles: The styles that it tells apart.
        name: The adapter's style.
        words: What each picture of a row shows, in words; all are among the texts.
        texts: The prompts that a picture's own is to be found among.
    """

    taught: Taught
    styles: Styles
    name: str
    words: Sequence[str]
    texts: Sequence[str]

    @cached_property
    def read(self) -> Mapping[str, Tensor]:
        """What the judge sees in the texts, which are the same for each row."""
        return read(self.taught.judge, self.texts)

    @cached_property
    def asked(self) -> Sequence[int]:
        """The places of the pictures in a row whose subject is known."""
        return [place for place, words in enumerate(self.words) if self.taught.subjects.knows(words)]

    @property
    def counted(self) -> Mapping[str, int]:
        """Of how many pictures of a row each measure of `of` and of `Copies` is a share."""
        return {**dict.fromkeys(("style", "named", "prompt", "copies"), len(self.words)), "subject": len(self.asked)}

    def of(self, row: Sequence[Image.Image], told: Sequence[str] | None = None) -> dict[str, float]:
        """Judge the pictures of a seed.

        Args:
            row: One for each of the words.
            told: The style that each is told to be, where that is known already.

        Returns:
            Values by measure.
        """
        judge, known = self.taught.judge, self.taught.subjects
        features, points = judge.both(row)
        told = self.styles.told(features) if told is None else told
        found = {"style": share([one == self.name for one in told])}
        found["likeness"] = float(self.styles.likeness(features, self.name, BASE).mean())
        called, names = self.taught.known_as(self.name), judge.names(row)
        if called is not None and names is not None:
            found["named"] = share([one == called for one in names])
        if self.asked and len(known.points) > 1:
            found["subject"] = share(known.right(points[self.asked], [self.words[place] for place in self.asked]))
        own = right_words(points, self.words, self.read)
        if own:
            found["prompt"] = share(own)
            texts = torch.stack([self.read[words] for words in self.words])
            found["agreement"] = float((points * texts).sum(1).mean())
        return found

    def met(self, row: Sequence[Image.Image], other: str) -> tuple[float, float, float]:
        """Judge the pictures of a seed, drawn with another adapter on.

        Args:
            row: The pictures.
            other: The other's style.

        Returns:
            How many are told its own style, how many the other's, and the likeness to its own.
        """
        features = self.taught.judge.style(row)
        told = self.styles.told(features)
        likeness = float(self.styles.likeness(features, self.name, BASE).mean())
        return share([one == self.name for one in told]), share([one == other for one in told]), likeness

    def leak(self, row: Sequence[Image.Image], of_base: Sequence[Image.Image]) -> dict[str, float]:
        """Judge pictures of prompts that do not call the adapter.

        Args:
            row: The pictures.
            of_base: The base's for the same prompts and noise.

        Returns:
            Values by measure.
        """
        told = self.styles.told(self.taught.judge.style(row))
        moved = [_apart(one, other) for one, other in zip(row, of_base, strict=True)]
        return {"leak": share([one == self.name for one in told]), "moved": sum(moved) / len(moved)}


def read(judge: Judge, texts: Sequence[str]) -> Mapping[str, Tensor]:
    """See what texts say.

    Args:
        judge: Who judges.
        texts: Words, some perhaps several times.

    Returns:
        A row of length 1 by each text; nothing for a judge that does not read, and where all have the same words.
    """
    distinct = list(dict.fromkeys(texts))
    rows = judge.words(distinct) if len(distinct) > 1 else None
    return {} if rows is None else dict(zip(distinct, rows, strict=True))


def right_words(points: Tensor, words: Sequence[str], known: Mapping[str, Tensor]) -> list[bool]:
    """Tell whether pictures are nearer to their own words than to others.

    Args:
        points: What the judge sees of the pictures, (count, width) of length 1.
        words: Those of each.
        known: What `read` saw in all words, among them those.

    Returns:
        An answer each; none where nothing was read.
    """
    if not known:
        return []
    texts = list(known)
    nearest = (points @ torch.stack(list(known.values())).T).argmax(1).tolist()
    return [texts[place] == own for place, own in zip(nearest, words, strict=True)]


def _apart(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of pixels, from 0 to 1."""
    pair = [torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8).float() for image in (one, other)]
    return float((pair[0] - pair[1]).abs().mean() / 255)


@dataclass(frozen=True)
class Copies:
    """Finds what was copied from training pictures.

    Attributes:
        judge: Who judges.
        trained: What the judge finds copies by, of the training pictures as the base's autoencoder gives them back.
        unseen: The distance of each real picture that was not trained on to the nearest of them, (count,).
    """

    judge: Judge
    trained: Tensor
    unseen: Tensor

    @classmethod
    def of(cls, judge: Judge, trained: Tensor, unseen: Sequence[Image.Image]) -> "Copies":
        """Measure how near real pictures come that cannot be copies.

        Args:
            judge: Who judges.
            trained: What `Judge.marks` sees of the training pictures.
            unseen: Real pictures of the same kind that were not trained on.

        Returns:
            What finds copies.
        """
        return cls(judge, trained, judge.apart(judge.marks(unseen), trained).amin(1))

    def __call__(self, row: Sequence[Image.Image]) -> dict[str, float]:
        """Measure pictures.

        Args:
            row: The pictures.

        Returns:
            Values by measure.
        """
        found = self.judge.apart(self.judge.marks(row), self.trained).amin(1)
        usual = float(self.unseen.mean())
        return {
            "nearness": float(found.mean()) / usual if usual else 1.0,
            "copies": float((found < self.unseen.min()).float().mean()),
        }
