"""What an evaluation found, as data. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .intervals import KIND, LEVEL, Estimate


@dataclass(frozen=True)
class Measure:
    """Something that is measured over strengths.

    Attributes:
        title: What it is called.
        explained: What it means, in a sentence.
        form: How values are written.
        over: What the interval is over.
        share: Whether it is a part of all, from 0 to 1, beyond which no interval goes.
    """

    title: str
    explained: str
    form: Literal["number", "percent"] = "percent"
    over: Literal["pictures", "seeds"] = "seeds"
    share: bool = False

    def ends(self, value: Estimate) -> tuple[float, float]:
        """Give the interval of an estimate.

        Args:
            value: The estimate.

        Returns:
            Its lower and its upper end; those of a share from 0 to 1.
        """
        return (max(0.0, value.low), min(1.0, value.high)) if self.share else (value.low, value.high)


MEASURES: Mapping[str, Measure] = {
    "loss": Measure("loss", "denoising loss on the unseen pictures, at fixed noise; lower is better", "number", "pictures"),
    "fall": Measure("falls by", "how much lower that loss is than the base's, picture by picture", over="pictures"),
    "style": Measure(
        "style", "pictures that are nearer to the unseen ones than to the base's or to another style", share=True
    ),
    "named": Measure(
        "named", "pictures that the embedded judge names as it names the unseen ones, among all that it knows", share=True
    ),
    "likeness": Measure("likeness", "how far pictures went from the base's (0) to the unseen ones (100%) in what is seen"),
    "subject": Measure("subject", "pictures whose subject is told right among all subjects that were given", share=True),
    "prompt": Measure("prompt", "pictures whose own prompt is the nearest of all prompts to what is seen", share=True),
    "agreement": Measure("agreement", "cosine of picture and prompt, as CLIP scores are", "number"),
    "leak": Measure("leak", "pictures of this style where no word calls the adapter", share=True),
    "moved": Measure("moved", "how far pixels left the base's where no word calls the adapter", share=True),
    "nearness": Measure(
        "nearness",
        "distance to the nearest training picture, in units of that of unseen real ones; near 0 is a copy",
        "number",
    ),
    "copies": Measure("copies", "pictures that are nearer to a training picture than any unseen real one is", share=True),
}

Values = dict[str, dict[float, Estimate]]
"""Estimates by measure and strength."""


@dataclass(frozen=True)
class Trust:
    """How far a judge can be trusted, found on real pictures.

    Attributes:
        judge: Who judges.
        styles: For each style the share of its pictures that are told right by a judge who never saw the picture, and how
            many there are. The base's own drawings are among them.
        subjects: The share of real pictures whose subject is told from other pictures of it, and how many were asked; None
            where no subject has two pictures.
        known: How many subjects there are to tell apart.
        nearest: How many of the nearest count as told right.
        prompts: The share of real pictures whose own caption is the nearest of all; None for a judge that does not read.
        names: For each folder, what the judge by itself names most of its pictures, and the share.
    """

    judge: str
    styles: Mapping[str, tuple[float, int]]
    subjects: tuple[float, int] | None
    known: int
    nearest: int
    prompts: float | None = None
    names: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Say it in lines of plain text."""
        told = ", ".join(f"{name} {share:.0%} of {count}" for name, (share, count) in self.styles.items())
        found = [f"style: told right without itself: {told} (by chance {1 / max(1, len(self.styles)):.0%})"]
        if self.subjects is not None:
            share, asked = self.subjects
            found.append(
                f"subject: told right from other pictures of it: {share:.0%} of {asked} (by chance {self.chance:.0%}: among"
                f" the nearest {self.nearest} of {self.known})"
            )
        elif self.known > 1:
            found.append(
                f"subject: {self.known} subjects, none of which has two real pictures, so how far they are told is not known"
            )
        if self.prompts is not None:
            found.append(f"prompt: the caption of a real picture is the nearest of all: {self.prompts:.0%}")
        found += [
            f"named: {name} is {most} to it, {share:.0%} of the pictures" for name, (most, share) in self.names.items()
        ]
        return found

    @property
    def chance(self) -> float:
        """The share of subjects that are told right by chance."""
        return self.nearest / max(1, self.known)


@dataclass(frozen=True)
class Alone:
    """An adapter by itself.

    Attributes:
        name: What it is called.
        file: Its file.
        parameters: Numbers that were trained.
        size: Bytes of the file.
        prompts: What was drawn.
        leak_prompts: What was drawn without a word that calls it; none where there is no such word.
        unseen: How many real pictures it was judged by.
        values: Estimates by measure and strength.
        sheet: The file of its pictures.
    """

    name: str
    file: Path
    parameters: int
    size: int
    prompts: Sequence[str]
    leak_prompts: Sequence[str]
    unseen: int
    values: Values
    sheet: Path


@dataclass(frozen=True)
class Interference:
    """An adapter while another is on too, each at its strength.

    Attributes:
        own: The adapter whose pictures are drawn and whose loss is measured.
        other: The one that is on too.
        loss: By how much the loss on its unseen pictures is higher than alone, as a share, over pictures; above 0 is harm.
            None where they do not add up, as the loss is of one prediction.
        style: Pictures that are told its style, over seeds.
        style_of_other: Pictures that are told the other's.
        likeness: How far pictures went from the base's to its own.
    """

    own: str
    other: str
    loss: Estimate | None
    style: Estimate
    style_of_other: Estimate
    likeness: Estimate

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "own": self.own,
            "other": self.other,
            "loss": None if self.loss is None else self.loss.plain(),
            "style": self.style.plain(),
            "style_of_other": self.style_of_other.plain(),
            "likeness": self.likeness.plain(),
        }


@dataclass(frozen=True)
class GoTogether:
    """Two adapters, and the strengths at which the losses of their unseen pictures rise least while both are on.

    Attributes:
        strengths: By name, as shares of the strengths that count as 1, from 0 to 1.
        rise: By how much more than alone both lose there, as shares of what the base loses on their pictures, summed.
        rise_whole: The same where both have their whole strengths.
    """

    strengths: Mapping[str, float]
    rise: float
    rise_whole: float

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"strengths": dict(self.strengths), "rise": self.rise, "rise_whole": self.rise_whole}

    def words(self) -> str:
        """Say it in a line."""
        names = " and ".join(self.strengths)
        mix = ", ".join(f"{name} at {share:.2f}" for name, share in self.strengths.items())
        if self.rise < self.rise_whole:
            return f"{names}: {mix}: {self.rise:.1%} in place of {self.rise_whole:.1%}"
        return f"{names}: no strengths were found that are better than whole ones, at {self.rise_whole:.1%}"


@dataclass(frozen=True)
class Evaluation:
    """All that was found.

    Attributes:
        trust: How far the judge can be trusted.
        alone: Each adapter by itself.
        interference: Each adapter with each other one; none where that was not asked for.
        report: The page.
        together: Each two adapters; none where that was not asked for, or they do not add up.
    """

    trust: Trust
    alone: tuple[Alone, ...]
    interference: tuple[Interference, ...]
    report: Path
    together: tuple[GoTogether, ...] = ()

    def plain(self) -> dict[str, Any]:
        """As ``figures.json`` holds it."""
        trust = self.trust
        return {
            "interval": {"level": LEVEL, "kind": KIND, "over": {name: one.over for name, one in MEASURES.items()}},
            "trust": {
                "judge": trust.judge,
                "styles": {name: {"right": share, "count": count} for name, (share, count) in trust.styles.items()},
                "subjects": None if trust.subjects is None else {"right": trust.subjects[0], "count": trust.subjects[1]},
                "known_subjects": trust.known,
                "nearest": trust.nearest,
                "prompts": trust.prompts,
                "names": {name: {"name": most, "share": share} for name, (most, share) in trust.names.items()},
            },
            "adapters": [_plain(one) for one in self.alone],
            "interference": [one.plain() for one in self.interference],
            "together": [one.plain() for one in self.together],
        }


def _plain(one: Alone) -> dict[str, Any]:
    return {
        "name": one.name,
        "file": str(one.file),
        "parameters": one.parameters,
        "bytes": one.size,
        "prompts": list(one.prompts),
        "leak_prompts": list(one.leak_prompts),
        "unseen_pictures": one.unseen,
        "sheet": one.sheet.name,
        "measures": {
            name: [{"strength": strength, **value.plain()} for strength, value in values.items()]
            for name, values in one.values.items()
        },
    }


def written(value: Estimate, measure: Measure) -> str:
    """Write an estimate for people.

    Args:
        value: The estimate.
        measure: What was measured.

    Returns:
        Such as ``83% ±5`` or ``0.142 ±0.010``.
    """
    if measure.form == "percent":
        half = value.half if value.half is None or not measure.share else min(1.0, value.half)
        return f"{value.mean:.0%}" + ("" if half is None else f" ±{100 * half:.0f}")
    return f"{value.mean:.3g}" + ("" if value.half is None else f" ±{value.half:.2g}")
