"""Judges of blended pictures: how much of each style or character is there, and whether the prompt was followed.

Likenesses are cosines from the centre of all known styles, scaled so that 0 is what real drawings of other styles have and 1
what real drawings of the style have that the judge does not know. They do not sum to 1, so a blend may have much of both.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from peft_diffusion.evaluation.drawings import pixels_of, unit
from peft_diffusion.evaluation.style_net import load_style_net
from peft_diffusion.evaluation.subject_net import load_subject_net, points_of

COLOURS: dict[str, str] = {
    "white": "ffffff", "yellow": "ffd23f", "pink": "ffc0d8", "orange": "f28c38", "grey": "9a9fa6",
    "purple": "6b4c9a", "green": "2f9e6e", "blue": "3d7fd6", "black": "15151a",
}  # fmt: skip
NEAREST = 5  # of all subjects, among which that of the prompt has to be
_AT_ONCE = 256
_LARGEST = 4.0  # deviations of a feature, beyond which it says no more
_SAME = 40  # of 255: as far as pixels of a plain background differ
_BORDER = 4  # pixels


def read(folder: Path) -> Tensor:
    """The pictures of a folder in the order of their names, as pixels (count, 3, 128, 128) in bytes."""
    return pixels_of([Image.open(path) for path in sorted(folder.glob("*.webp"))])


def captions(folder: Path) -> list[str]:
    """What is said of the pictures of a folder, in the order of their names."""
    return [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]


class StyleJudge:
    """Tells styles by features of a network that need not have learned them, each at the mean of known drawings."""

    def __init__(self, data: Path, device: torch.device) -> None:
        self.net, self.device = load_style_net().to(device), device
        folders = {folder.parent.name: folder for folder in sorted((data / "styles").glob("*/known"))}
        features = {name: self._features(read(folder)) for name, folder in folders.items()}
        within = torch.cat([found - found.mean(0) for found in features.values()])
        self.spread = within.std(0).clamp_min(1e-3)
        self.centre = torch.stack([found.mean(0) for found in features.values()]).mean(0)
        known = {name: self._scaled(found) for name, found in features.items()}
        self.means = {name: found.mean(0) for name, found in known.items()}
        held = {name: data / "styles" / name / "held" for name in folders}
        self.held = {name: self.points(read(folder)) for name, folder in held.items() if folder.exists()}
        others = torch.cat([found for name, found in known.items() if name not in self.held])
        self.ends = {
            name: (self._cosine(others, name).mean().item(), self._cosine(own, name).mean().item())
            for name, own in self.held.items()
        }

    def points(self, pixels: Tensor) -> Tensor:
        """What the judge sees of pictures in bytes, (count, features)."""
        return self._scaled(self._features(pixels))

    def likeness(self, points: Tensor, style: str) -> Tensor:
        """How much of a style is there: 0 as in drawings of others, 1 as in its own."""
        zero, one = self.ends[style]
        return (self._cosine(points, style) - zero) / (one - zero)

    def first(self, points: Tensor, one: str, other: str) -> Tensor:
        """Whether each picture is nearer to the first of two styles."""
        nearer: Tensor = (points - self.means[one]).norm(dim=1) < (points - self.means[other]).norm(dim=1)
        return nearer

    def nearest(self, points: Tensor) -> list[str]:
        """The style, of all that are known, that each picture is nearest to."""
        names = list(self.means)
        places = torch.cdist(points, torch.stack([self.means[name] for name in names])).argmin(1)
        return [names[place] for place in places.tolist()]

    def trust(self, one: str, other: str) -> float:
        """The share of real drawings, unknown to the judge, that are told right of two styles."""
        right = (
            self.first(self.held[one], one, other).float().mean() + self.first(self.held[other], other, one).float().mean()
        )
        return right.item() / 2

    @torch.no_grad()
    def _features(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.net.features(unit(one.to(self.device))).cpu() for one in pixels.split(_AT_ONCE)])

    def _scaled(self, features: Tensor) -> Tensor:
        return ((features - self.centre) / self.spread).clamp(-_LARGEST, _LARGEST)

    def _cosine(self, points: Tensor, style: str) -> Tensor:
        return F.cosine_similarity(points, self.means[style][None])


class ThingJudge:
    """Tells what pictures show by a network that looks past styles: characters, and the subjects of prompts."""

    def __init__(self, data: Path, device: torch.device) -> None:
        self.net = load_subject_net().to(device)
        with safe_open(data / "subjects.safetensors", "pt") as file:
            self.names: list[str] = json.loads(file.metadata()["subjects"])
            self.means = file.get_tensor("means").float()
        self.characters: dict[str, Tensor] = {}
        self.ends: dict[str, tuple[float, float]] = {}
        self.trust: dict[str, float] = {}
        for folder in sorted((data / "subjects").iterdir()):
            own, others = self.points(plain(read(folder / "held"))), self.points(plain(read(folder / "others")))
            self.characters[folder.name] = F.normalize(own.mean(0), dim=0)
            alone = torch.stack([self._without(own, place) for place in range(len(own))])  # each by the others of its own
            of_others = others @ self.characters[folder.name]
            self.ends[folder.name] = (of_others.mean().item(), alone.mean().item())
            self.trust[folder.name] = (alone[:, None] > of_others[None]).float().mean().item()

    def points(self, pixels: Tensor) -> Tensor:
        """The points of pictures in bytes, (count, 64)."""
        return points_of(self.net, pixels)

    def shows(self, points: Tensor, subjects: Sequence[str]) -> Tensor:
        """Whether what each picture should show is among the five nearest of 200 subjects."""
        scores, own = points @ self.means.T, torch.tensor([self.names.index(subject) for subject in subjects])
        shown: Tensor = (scores > scores.gather(1, own[:, None])).sum(1) < NEAREST
        return shown

    def likeness(self, points: Tensor, character: str) -> Tensor:
        """How much of a character is there: 0 as in others of the same hand, 1 as in its own pictures."""
        zero, one = self.ends[character]
        return (points @ self.characters[character] - zero) / (one - zero)

    @staticmethod
    def _without(points: Tensor, place: int) -> Tensor:
        return points[place] @ F.normalize(torch.cat([points[:place], points[place + 1 :]]).mean(0), dim=0)


def border(pixels: Tensor) -> Tensor:
    """The median colour of the border of each picture, (count, 3), 0 to 255."""
    values = pixels.float()
    sides = [values[..., :_BORDER, :], values[..., -_BORDER:, :], values[..., :_BORDER].mT, values[..., -_BORDER:].mT]
    return torch.cat([side.flatten(2) for side in sides], 2).median(2).values


def plain(pixels: Tensor) -> Tensor:
    """Pictures on white: what has the colour of the border becomes white."""
    far = (pixels.float() - border(pixels)[..., None, None]).abs().amax(1, keepdim=True) > _SAME
    return torch.where(far, pixels, torch.full_like(pixels, 255))


def before(pixels: Tensor, colours: Sequence[str]) -> Tensor:
    """Whether the colour of each picture's border is nearest to the one it was asked for, of all that have names."""
    names = list(COLOURS)
    known = torch.tensor([list(bytes.fromhex(COLOURS[name])) for name in names]).float()
    asked: Tensor = torch.tensor([names.index(colour) for colour in colours])
    return torch.cdist(border(pixels), known).argmin(1).eq(asked)
