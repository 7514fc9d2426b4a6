"""A judge of drawings: which style is it, and does it show its subject?

The judge holds real drawings and nothing else; it is fitted in seconds, on a CPU, whenever it is needed.

*Style* is told by kernel ridge regression over histograms of what styles differ in: the colours used, how light and how
dark edges are, how flat areas are, how thick dark strokes are.  *Subject* is told by the nearest real drawings of one
style: small colour pictures and edge maps, compared at the best of several shifts.  `calibrate` says how far to trust
both: how often held-out real drawings are given their own style, and how often a real drawing that was resized, moved,
blurred and made noisy finds itself again.
"""

import argparse
import random
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .packed import load_packed
from .render import drawings, render
from .sources import CACHE, STYLES

SIZE = 128
CELLS = 24
SHIFTS = 2
EDGE_WEIGHT = 1.5
NEAREST = 5


@dataclass(frozen=True)
class Gallery:
    """Real drawings of one style: what each shows, and pixels as bytes (count, 3, height, width)."""

    subjects: list[str]
    pixels: Tensor

    def part(self, numbers: list[int]) -> "Gallery":
        """Some of the drawings."""
        return Gallery([self.subjects[number] for number in numbers], self.pixels[numbers])


def packed_galleries(path: Path = CACHE / "drawings.zip", styles: tuple[str, ...] | None = None) -> dict[str, Gallery]:
    """The galleries of a packed file of drawings."""
    rows, pixels = load_packed(path, styles)
    places: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        places.setdefault(row.style, []).append(number)
    return {
        style: Gallery([rows[number].subject for number in numbers], pixels[numbers])
        for style, numbers in places.items()
    }


def rendered_gallery(style: str, cache: Path = CACHE, subjects: set[str] | None = None) -> Gallery:
    """A gallery rendered from the icon set itself, of all its subjects or of some."""
    rows = [row for row in drawings(style, cache) if subjects is None or row.subject in subjects]
    if not rows:
        raise ValueError(f"the set {style!r} has none of the subjects asked for")
    with ThreadPoolExecutor(2) as pool:
        images = pool.map(lambda row: np.asarray(render(style, row.name, SIZE, cache)), rows)
        pixels = torch.from_numpy(np.stack(list(images)))
    return Gallery([row.subject for row in rows], pixels.permute(0, 3, 1, 2).contiguous())


def _unit(images: Tensor) -> Tensor:
    """Images of any size, bytes or in [0, 1], as 128 pixels in [0, 1]."""
    values = images.float() / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)
    return values if values.shape[-1] == SIZE else F.interpolate(values, SIZE, mode="area")


def _blurred(values: Tensor) -> Tensor:
    """A light blur, so that the softness of an autoencoder is no sign of anything."""
    kernel = torch.tensor([0.24, 0.52, 0.24])
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3).contiguous()
    return F.conv2d(F.pad(values, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)


def _histogram(codes: Tensor, bins: int, counted: Tensor) -> Tensor:
    """The share of each code among the counted pixels of each image, as its square root."""
    count = len(codes)
    places = (codes + bins * torch.arange(count).view(-1, 1, 1))[counted]
    sums = torch.bincount(places, minlength=bins * count).view(count, bins).float()
    return (sums / (sums.sum(1, keepdim=True) + 1)).sqrt()


def _levels(values: Tensor, bounds: tuple[float, ...]) -> Tensor:
    return torch.bucketize(values.contiguous(), torch.tensor(bounds))


def _edge_codes(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel: contrast with how light it is, the darkest near it with how coloured, and its ink."""
    light, colour = values.mean(1), values.amax(1) - values.amin(1)
    high, low = F.max_pool2d(values, 3, 1, 1), -F.max_pool2d(-values, 3, 1, 1)
    contrast = _levels((high - low).amax(1), (0.03, 0.08, 0.16, 0.3, 0.5, 0.75))
    darkest = _levels(-F.max_pool2d(-light[:, None], 5, 1, 2)[:, 0], (0.06, 0.15, 0.3, 0.5, 0.75))
    lightness = _levels(light, (0.06, 0.15, 0.3, 0.5, 0.7, 0.85, 0.95))
    colourful = _levels(colour, (0.03, 0.1, 0.25, 0.5, 0.8))
    return contrast * 8 + lightness, (contrast * 6 + darkest) * 6 + colourful, values.amin(1) < 0.94


def _stroke_shares(values: Tensor) -> Tensor:
    """How much of the dark area is left after one to six erosions."""
    dark = (values.mean(1, keepdim=True) < 0.35).float()
    area, shares = dark.sum((1, 2, 3)), [dark.mean((1, 2, 3))]
    for _ in range(6):
        dark = -F.max_pool2d(-dark, 3, 1, 1)
        shares.append(dark.sum((1, 2, 3)) / (area + 20))
    return torch.stack(shares, 1)


def style_features(images: Tensor) -> Tensor:
    """What styles differ in, as a row for each image."""
    rows = []
    for piece in _unit(images).tensor_split(max(1, len(images) // 64)):
        values = _blurred(piece)
        found = []
        for scaled in (values, F.avg_pool2d(values, 2)):
            contrast, edges, ink = _edge_codes(scaled)
            found += [_histogram(contrast, 56, ink), _histogram(edges, 252, ink)]
        six = (values * 5.999).long()
        found.append(_histogram(six[:, 0] * 36 + six[:, 1] * 6 + six[:, 2], 216, ink_of(values)))
        rows.append(torch.cat([*found, 0.5 * _stroke_shares(values), ink_of(values).float().mean((1, 2))[:, None]], 1))
    return torch.cat(rows)


def ink_of(values: Tensor) -> Tensor:
    """Where an image is not white."""
    return values.amin(1) < 0.94


@dataclass(frozen=True)
class StyleTeller:
    """Kernel ridge regression from style features to styles."""

    styles: tuple[str, ...]
    known: Tensor
    weights: Tensor
    width: float

    @classmethod
    def fit(cls, features: Mapping[str, Tensor], width: float = 0.6, ridge: float = 0.02) -> "StyleTeller":
        """Solve for the weights; every style counts the same, however many drawings it has."""
        known = torch.cat(list(features.values()))
        sizes = [len(rows) for rows in features.values()]
        labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        targets = F.one_hot(labels, len(sizes)).float() * 2 - 1
        slack = torch.tensor([ridge * size * len(sizes) / sum(sizes) for size in sizes])[labels]
        kernel = torch.exp(-torch.cdist(known, known).square() / width)
        return cls(tuple(features), known, torch.linalg.solve(kernel + torch.diag(slack), targets), width)

    def __call__(self, features: Tensor) -> list[str]:
        """The style of each row of features."""
        scores = torch.exp(-torch.cdist(features, self.known).square() / self.width) @ self.weights
        return [self.styles[number] for number in scores.argmax(1).tolist()]


def subject_maps(images: Tensor) -> Tensor:
    """A small picture of each image: its colours as distances from white, and its edges in four directions."""
    values = F.avg_pool2d(1 - _unit(images), 2)
    light = F.pad(values.mean(1), (1, 1, 1, 1), mode="replicate")
    across = light[:, 1:-1, 2:] - light[:, 1:-1, :-2]
    down = light[:, 2:, 1:-1] - light[:, :-2, 1:-1]
    edges = torch.stack([across.abs(), down.abs(), (across + down).abs() * 0.7, (across - down).abs() * 0.7], 1)
    small = F.interpolate(torch.cat([values, EDGE_WEIGHT * edges], 1), CELLS, mode="area")
    return F.avg_pool2d(F.pad(small, (1, 1, 1, 1)), 3, 1)


def _shifted(maps: Tensor, down: int, across: int) -> Tensor:
    padded = F.pad(maps, (SHIFTS,) * 4)
    top, left = SHIFTS + down, SHIFTS + across
    return padded[..., top : top + CELLS, left : left + CELLS]


def distances(maps: Tensor, known: Tensor) -> Tensor:
    """From each image to each known drawing, at the best of the shifts."""
    flat = known.flatten(1)
    moves = range(-SHIFTS, SHIFTS + 1)
    best = torch.full((len(maps), len(known)), float("inf"))
    for down in moves:
        for across in moves:
            best = torch.minimum(best, torch.cdist(_shifted(maps, down, across).flatten(1), flat))
    return best


@dataclass(frozen=True)
class Judge:
    """Real drawings of several styles, ready to judge others by."""

    galleries: Mapping[str, Gallery]
    teller: StyleTeller

    @classmethod
    def fit(cls, galleries: Mapping[str, Gallery], each: int = 300) -> "Judge":
        """A judge of these styles; `each` is how many drawings of a style are enough to tell it."""
        features = {}
        torch.manual_seed(0)
        for style, gallery in galleries.items():
            numbers = random.Random(0).sample(range(len(gallery.subjects)), min(each, len(gallery.subjects)))
            chosen = gallery.pixels[numbers]
            features[style] = torch.cat([style_features(chosen), style_features(perturbed(chosen))])
        return cls(galleries, StyleTeller.fit(features))

    def style(self, images: Tensor) -> list[str]:
        """The style of each image (count, 3, height, width), bytes or in [0, 1]."""
        return self.teller(style_features(images))

    def subject_rank(self, images: Tensor, style: str, subjects: list[str]) -> list[int]:
        """The rank, 1 the nearest, of the subject's own real drawing among all of that style, for each image."""
        if style not in self.galleries:
            raise ValueError(f"the judge has no drawings of {style!r}; it has {', '.join(self.galleries)}")
        gallery = self.galleries[style]
        missing = sorted(set(subjects) - set(gallery.subjects))
        if missing:
            raise ValueError(f"{style!r} has no drawing of {', '.join(missing[:5])}")
        known = torch.cat([subject_maps(piece) for piece in gallery.pixels.tensor_split(32)])
        ranks = []
        for row, subject in zip(distances(subject_maps(images), known), subjects, strict=True):
            own = [number for number, name in enumerate(gallery.subjects) if name == subject]
            ranks.append(1 + int((row < row[own].min()).sum()))
        return ranks


def perturbed(pixels: Tensor) -> Tensor:
    """Drawings resized by up to 8%, moved by up to 6 pixels, softened and made noisy, in [0, 1]."""
    values = 1 - _unit(pixels)
    theta = torch.zeros(len(values), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = torch.empty(len(values)).uniform_(0.92, 1.08)
    theta[:, :, 2] = torch.empty(len(values), 2).uniform_(-0.09, 0.09)
    moved = F.grid_sample(values, F.affine_grid(theta, list(values.shape), align_corners=False), align_corners=False)
    return (1 - _blurred(_blurred(moved)) + 0.006 * torch.randn_like(moved)).clamp(0, 1)


def calibrate(galleries: Mapping[str, Gallery], held_out: int = 60, each: int = 300) -> dict[str, dict[str, float]]:
    """For each style, from real drawings: how many held out are told right, and how many find themselves again."""
    torch.manual_seed(0)
    tests, rest = {}, {}
    for style, gallery in galleries.items():
        order = random.Random(1).sample(range(len(gallery.subjects)), len(gallery.subjects))
        count = min(held_out, len(order) // 4)
        tests[style], rest[style] = gallery.part(order[:count]), gallery.part(order[count:])
    judge = Judge.fit(rest, each)
    whole = Judge(galleries, judge.teller)
    figures = {}
    for style, test in tests.items():
        soft = perturbed(test.pixels)
        ranks = whole.subject_rank(soft, style, test.subjects)
        figures[style] = {
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
    judge = Judge({style: galleries[style]}, StyleTeller((), torch.empty(0), torch.empty(0), 1.0))
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
