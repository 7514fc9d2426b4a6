"""A judge of drawings: which style is it, and does it show its subject?

*Style* is told by a small network (`peft_diffusion.evaluation.style_net`) among the styles that are asked about.
*Subject* is told by the nearest real drawings of one style: small colour pictures and edge maps, compared at the best of
several shifts. `calibrate` says how far to trust both: how often real drawings of subjects that the network never saw are
given their own style, and how often a real drawing that was resized, moved, blurred and made noisy finds itself again.
"""

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peft_diffusion.evaluation.drawings import distances, maps_of, unit
from peft_diffusion.evaluation.style_net import StyleNet, held_out, load_style_net

from .packed import Drawing, load_packed
from .sources import CACHE, STYLES
from .style_net import softened
from .training import affine

NEAREST = 5


@dataclass(frozen=True)
class Gallery:
    """Real drawings of one style: what each shows, and pixels as bytes (count, 3, height, width)."""

    subjects: list[str]
    pixels: Tensor

    def part(self, numbers: list[int]) -> "Gallery":
        """Some of the drawings."""
        return Gallery([self.subjects[number] for number in numbers], self.pixels[numbers])


def galleries_of(rows: Sequence[Drawing], pixels: Tensor) -> dict[str, Gallery]:
    """Drawings and their pixels by style."""
    places: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        places.setdefault(row.style, []).append(number)
    return {
        style: Gallery([rows[number].subject for number in numbers], pixels[numbers]) for style, numbers in places.items()
    }


def packed_galleries(path: Path = CACHE / "drawings.zip", styles: tuple[str, ...] | None = None) -> dict[str, Gallery]:
    """The galleries of a packed file of drawings."""
    return galleries_of(*load_packed(path, styles))


@dataclass(frozen=True)
class Judge:
    """Real drawings of several styles, and the network that tells styles; both judge among these styles alone."""

    galleries: Mapping[str, Gallery]
    net: StyleNet

    @classmethod
    def of(cls, galleries: Mapping[str, Gallery]) -> "Judge":
        """A judge of these styles, which its network must know."""
        net = load_style_net()
        unknown = sorted(set(galleries) - set(net.styles))
        if unknown:
            raise ValueError(f"the judge does not know {', '.join(unknown)}; it knows {', '.join(net.styles)}")
        return cls(galleries, net)

    @torch.no_grad()
    def style(self, images: Tensor) -> list[str]:
        """The style of each image (count, 3, height, width), bytes or in [0, 1]."""
        places = [number for number, style in enumerate(self.net.styles) if style in self.galleries]
        scores = torch.cat([self.net(piece)[:, places] for piece in unit(images).split(64)])
        return [self.net.styles[places[number]] for number in scores.argmax(1).tolist()]

    def subject_rank(self, images: Tensor, style: str, subjects: list[str]) -> list[int]:
        """The rank, 1 the nearest, of the subject's own real drawing among all of that style, for each image."""
        if style not in self.galleries:
            raise ValueError(f"the judge has no drawings of {style!r}; it has {', '.join(self.galleries)}")
        gallery = self.galleries[style]
        missing = sorted(set(subjects) - set(gallery.subjects))
        if missing:
            raise ValueError(f"{style!r} has no drawing of {', '.join(missing[:5])}")
        known = torch.cat([maps_of(piece) for piece in gallery.pixels.tensor_split(32)])
        ranks = []
        for row, subject in zip(distances(maps_of(images), known), subjects, strict=True):
            own = [number for number, name in enumerate(gallery.subjects) if name == subject]
            ranks.append(1 + int((row < row[own].min()).sum()))
        return ranks


def perturbed(pixels: Tensor) -> Tensor:
    """Drawings resized by up to 8%, moved by up to 6 pixels, softened and made noisy, in [0, 1]."""
    moved = affine(unit(pixels) * 2 - 1, (0.92, 1.08), 0.045).clamp(-1, 1) / 2 + 0.5
    return (softened(softened(moved)) + 0.006 * torch.randn_like(moved)).clamp(0, 1)


def calibrate(galleries: Mapping[str, Gallery], each: int = 200) -> dict[str, dict[str, float]]:
    """For each style, from real drawings new to the network: how many are told right, and how many find themselves again."""
    torch.manual_seed(0)
    judge, figures = Judge.of(galleries), {}
    for style, gallery in galleries.items():
        fresh = [number for number, subject in enumerate(gallery.subjects) if held_out(subject)]
        test = gallery.part(random.Random(1).sample(fresh, min(each, len(fresh))))
        soft = perturbed(test.pixels)
        ranks = judge.subject_rank(soft, style, test.subjects)
        figures[style] = {
            "drawings": len(test.subjects),
            "style_told_right": _share([told == style for told in judge.style(test.pixels)]),
            "style_told_right_softened": _share([told == style for told in judge.style(soft)]),
            "found_first": _share([rank == 1 for rank in ranks]),
            "found_in_five": _share([rank <= NEAREST for rank in ranks]),
        }
    return figures


def _share(answers: list[bool]) -> float:
    return round(sum(answers) / len(answers), 3)


def other_hands(galleries: Mapping[str, Gallery], style: str, other: str, count: int = 100) -> dict[str, float]:
    """How often another set's drawing of a subject is among the nearest of this style: the judge at its hardest."""
    shared = [subject for subject in galleries[other].subjects if subject in set(galleries[style].subjects)]
    chosen = random.Random(2).sample(shared, min(count, len(shared)))
    numbers = [galleries[other].subjects.index(subject) for subject in chosen]
    judge = Judge.of({style: galleries[style]})
    ranks = judge.subject_rank(galleries[other].pixels[numbers], style, chosen)
    return {"found_in_five": _share([rank <= NEAREST for rank in ranks]), "chance": NEAREST / len(galleries[style].subjects)}


def main() -> None:
    """Print the calibration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CACHE / "drawings.zip", help="the packed drawings")
    parser.add_argument("--styles", nargs="+", choices=tuple(STYLES), default=tuple(STYLES), help="the styles to tell apart")
    options = parser.parse_args()
    galleries = packed_galleries(options.data, tuple(options.styles))
    figures = calibrate(galleries)
    for style, row in figures.items():
        print(style, row)
    for key in next(iter(figures.values())):
        print(key, round(sum(row[key] for row in figures.values()) / len(figures), 3))
    if {"noto", "noto-v1"} <= set(galleries):
        print("noto found from noto-v1:", other_hands(galleries, "noto", "noto-v1"))


if __name__ == "__main__":
    main()
