"""A small network that tells what a drawing shows, whoever drew it; its weights are beside this file.

    python -m scripts.build_base.subject_net

Two hands draw the same cat with few pixels in common, so pixels cannot say whether a learned style kept its subject. This
network maps a drawing to a point, such that drawings of one subject in different sets lie close together and those of other
subjects far (supervised contrastive learning, Khosla et al. 2020). A picture's subject is then among the nearest of all
subjects, each at the mean of its real drawings. Subjects that `style_net.held_out` names are never shown to it, in any
style: `calibrate` says on them how far it is to be trusted, with drawings of a set that the means are made without.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import judge_files
from .packed import Drawing, load_packed
from .sources import CACHE, ICON_SETS
from .style_net import held_out, minimize, softened
from .training import affine

WEIGHTS = Path(__file__).with_name("subject_net.safetensors.xz")
STYLES = tuple(one.style for one in ICON_SETS if one.is_emoji)
SIZE, DIMENSIONS = 64, 64
WIDTHS = (16, 32, 64, 96)
FEWEST, DRAWN = 3, 3  # sets that draw a subject, and of them in a step
TEMPERATURE = 0.1


class SubjectNet(nn.Module):
    """Four residual stages; the last one's map, pooled to 4 x 4, is turned to a point on the unit sphere."""

    def __init__(self) -> None:
        super().__init__()
        self.begin = nn.ModuleList()
        self.refine = nn.ModuleList()
        before = 4
        for width in WIDTHS:
            self.begin.append(_layer(before, width, 2 if width > WIDTHS[0] else 1))
            self.refine.append(nn.Sequential(nn.ReLU(), _layer(width, width, 1), nn.ReLU(), _layer(width, width, 1)))
            before = width
        self.end = nn.Sequential(nn.Dropout(0.1), nn.Linear(16 * before, DIMENSIONS))

    def forward(self, images: Tensor) -> Tensor:
        """Points (count, 64) of images (count, 3, 128, 128) in [0, 1]."""
        small = F.avg_pool2d(1 - images, images.shape[-1] // SIZE)
        values = torch.cat([small, small.amax(1, keepdim=True) - small.amin(1, keepdim=True)], 1)
        for begin, refine in zip(self.begin, self.refine, strict=True):
            values = begin(values)
            values = F.relu(values + refine(values))
        return F.normalize(self.end(F.adaptive_avg_pool2d(values, 4).flatten(1)))


def _layer(inside: int, outside: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside))


def load_subject_net(path: Path = WEIGHTS) -> SubjectNet:
    """The trained network, ready to tell."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}: run `python -m scripts.build_base.subject_net` first")
    net = SubjectNet()
    net.load_state_dict(judge_files.read(path)[0], strict=False)
    return net.eval()


def _changed(images: Tensor) -> Tensor:
    """Images in [0, 1] in other places, sizes, colours and softness; random."""
    values = affine(images * 2 - 1, (0.85, 1.2), 0.08).clamp(-1, 1) / 2 + 0.5
    each = torch.rand(3, len(values), 1, 1, 1, device=images.device)
    values = torch.where(each[0] < 0.3, softened(softened(values)), values)
    ink = 1 - values
    tint = 1 + 0.5 * (torch.rand(len(values), 3, 1, 1, device=images.device) - 0.5)
    ink = torch.where(each[1] < 0.2, ink.mean(1, keepdim=True).expand_as(ink), ink * tint)
    return (1 - ink).clamp(0, 1)


@dataclass(frozen=True)
class Shared:
    """Subjects that several sets draw, and the places of their drawings by set."""

    subjects: list[str]
    places: list[dict[str, int]]

    @classmethod
    def of(cls, rows: Sequence[Drawing], fewest: int = FEWEST) -> "Shared":
        """The subjects among drawings that at least ``fewest`` sets have."""
        found: dict[str, dict[str, int]] = {}
        for place, row in enumerate(rows):
            found.setdefault(row.subject, {}).setdefault(row.style, place)
        kept = {subject: places for subject, places in found.items() if len(places) >= fewest}
        return cls(list(kept), list(kept.values()))


def fit(pixels: Tensor, shared: Shared, steps: int, batch: int, rate: float) -> SubjectNet:
    """Train on subjects in three hands each, on the device that the drawings are on."""
    device = pixels.device
    known = [torch.tensor(list(places.values())) for places, name in zip(shared.places, shared.subjects, strict=True)
             if not held_out(name)]  # fmt: skip
    net = SubjectNet()
    net.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # which torch does not declare
    labels = torch.arange(batch, device=device).repeat_interleave(DRAWN)
    same = labels[:, None] == labels[None]
    itself = torch.eye(len(labels), dtype=torch.bool, device=device)

    def loss() -> Tensor:
        chosen = [known[number] for number in torch.randperm(len(known))[:batch]]
        places = torch.cat([row[torch.randperm(len(row))[:DRAWN]] for row in chosen])
        images = _changed(pixels[places.to(device)].float() / 255).contiguous(memory_format=torch.channels_last)
        points: Tensor = net(images)
        scores = (points @ points.T / TEMPERATURE).masked_fill(itself, -1e9).log_softmax(1)
        return -(scores * (same & ~itself)).sum(1).mean() / (DRAWN - 1)

    minimize(net, loss, steps, rate)
    return net.eval()


@torch.no_grad()
def points_of(net: SubjectNet, pixels: Tensor) -> Tensor:
    """The points of pictures (count, 3, 128, 128) in bytes."""
    device = next(net.parameters()).device
    return torch.cat([net(piece.to(device).float() / 255).cpu() for piece in pixels.split(128)])


class SubjectJudge:
    """Ranks subjects by how near they are to a picture, each at the mean of its real drawings in all sets but some."""

    def __init__(self, net: SubjectNet, subjects: Mapping[str, Tensor]) -> None:
        self.net = net
        self.subjects = list(subjects)
        self.means = F.normalize(torch.stack([points.mean(0) for points in subjects.values()]))

    @classmethod
    def of(cls, rows: Sequence[Drawing], pixels: Tensor, net: SubjectNet, without: Sequence[str] = ()) -> "SubjectJudge":
        """A judge that knows the shared subjects of the emoji sets, but no drawing of the sets ``without``."""
        shared = Shared.of([row for row in rows if row.style in STYLES])
        kept = [number for number, row in enumerate(rows) if row.style in STYLES]
        points = points_of(net, pixels[kept])
        known = {
            subject: points[[place for style, place in places.items() if style not in without]]
            for subject, places in zip(shared.subjects, shared.places, strict=True)
        }
        return cls(net, {subject: found for subject, found in known.items() if len(found)})

    def ranks(self, images: Tensor, subjects: Sequence[str]) -> list[int]:
        """The rank, 1 the nearest, of each picture's own subject among all that the judge knows; pictures in bytes."""
        scores = points_of(self.net, images) @ self.means.T
        own = [self.subjects.index(subject) for subject in subjects]
        return [1 + int((row > row[place]).sum()) for row, place in zip(scores, own, strict=True)]


def calibrate(rows: Sequence[Drawing], pixels: Tensor, net: SubjectNet, nearest: int = 5) -> dict[str, dict[str, float]]:
    """For each set: how many of its drawings of subjects new to the network are told, from the other sets' drawings."""
    figures = {}
    for style in STYLES:
        judge = SubjectJudge.of(rows, pixels, net, without=(style,))
        known = set(judge.subjects)
        fresh = [n for n, row in enumerate(rows) if row.style == style and row.subject in known and held_out(row.subject)]
        ranks = judge.ranks(pixels[fresh], [rows[number].subject for number in fresh])
        figures[style] = {
            "drawings": len(ranks),
            "told_first": round(sum(rank == 1 for rank in ranks) / len(ranks), 3),
            "told_in_five": round(sum(rank <= nearest for rank in ranks) / len(ranks), 3),
        }
    return figures


def main() -> None:
    """Train, save, and print the calibration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=CACHE / "drawings.zip", help="the packed drawings")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="file to write")
    parser.add_argument("--device", default="cpu", help="where to train")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=48, help="subjects of a step, in three hands each")
    parser.add_argument("--rate", type=float, default=3e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows, pixels = load_packed(options.data, STYLES)
    net = fit(pixels.to(options.device), Shared.of(rows), options.steps, options.batch, options.rate)
    numbers = {name: tensor for name, tensor in net.state_dict().items() if tensor.is_floating_point()}
    halves = {name: tensor.half().cpu().contiguous() for name, tensor in numbers.items()}
    judge_files.write(options.output, halves)
    print(f"{sum(tensor.numel() for tensor in halves.values())} parameters: {options.output}")
    for style, row in calibrate(rows, pixels, load_subject_net(options.output)).items():
        print(style, row)


if __name__ == "__main__":
    main()
