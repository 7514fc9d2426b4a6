"""Train the judge of subjects, `peft_diffusion.evaluation.subject_net`, on the real drawings.

    python -m scripts.build_base.subject_net

Subjects that `held_out` names are never shown to it, in any style: `calibrate` says on them how far it is to be trusted,
with drawings of a set that the means are made without.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from peft_diffusion.evaluation.style_net import held_out
from peft_diffusion.evaluation.subject_net import WEIGHTS, SubjectNet, Subjects, load_subject_net, points_of

from . import judge_files
from .packed import Drawing, load_packed
from .sources import CACHE, ICON_SETS
from .style_net import minimize, softened
from .training import affine

STYLES = tuple(one.style for one in ICON_SETS if one.is_emoji)
FEWEST, DRAWN = 3, 3  # sets that draw a subject, and of them in a step
TEMPERATURE = 0.1


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


def subjects_of(rows: Sequence[Drawing], pixels: Tensor, net: SubjectNet, without: Sequence[str] = ()) -> Subjects:
    """The subjects that the emoji sets share, known by the drawings of all sets but those ``without``."""
    kept = [number for number, row in enumerate(rows) if row.style in STYLES]
    shared = Shared.of([rows[number] for number in kept])
    points = points_of(net, pixels[kept])
    known = {
        subject: points[[place for style, place in places.items() if style not in without]]
        for subject, places in zip(shared.subjects, shared.places, strict=True)
    }
    return Subjects({subject: found for subject, found in known.items() if len(found)})


def calibrate(rows: Sequence[Drawing], pixels: Tensor, net: SubjectNet, nearest: int = 5) -> dict[str, dict[str, float]]:
    """For each set: how many of its drawings of subjects new to the network are told, from the other sets' drawings."""
    figures = {}
    for style in STYLES:
        subjects = subjects_of(rows, pixels, net, without=(style,))
        known = set(subjects.names)
        fresh = [n for n, row in enumerate(rows) if row.style == style and row.subject in known and held_out(row.subject)]
        ranks = subjects.ranks(points_of(net, pixels[fresh]), [rows[number].subject for number in fresh])
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
