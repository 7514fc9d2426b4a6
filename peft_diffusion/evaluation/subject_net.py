"""A small network that tells what a drawing shows, whoever drew it.

Two hands draw the same cat with few pixels in common, so pixels cannot say whether a learned style kept its subject. This
network maps a drawing to a point, such that drawings of one subject in different sets lie close together and those of other
subjects far (supervised contrastive learning, Khosla et al. 2020, https://arxiv.org/abs/2004.11362). Subjects that
`style_net.held_out` names were never shown to it, in any style. ``scripts/build_base/subject_net.py`` trains it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import stored

WEIGHTS = Path(__file__).with_name("subject_net.safetensors.xz")
SIZE, DIMENSIONS = 64, 64
WIDTHS = (16, 32, 64, 96)
_AT_ONCE = 128  # pictures


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
    """Load the trained network.

    Args:
        path: Its weights; by default those that travel with the package.

    Returns:
        The network, ready to tell.
    """
    net = SubjectNet()
    net.load_state_dict(stored.read(path)[0], strict=False)
    return net.eval()


@torch.no_grad()
def points_of(net: SubjectNet, pixels: Tensor) -> Tensor:
    """Map pictures to points.

    Args:
        net: The network.
        pixels: (count, 3, 128, 128) in bytes.

    Returns:
        (count, 64) of length 1, on the CPU.
    """
    device = next(net.parameters()).device
    return torch.cat([net(piece.to(device).float() / 255).cpu() for piece in pixels.split(_AT_ONCE)])


class Subjects:
    """Known subjects, each at the mean of the points of its real drawings.

    Args:
        points: Those of each subject's drawings, (drawings, dimensions) of length 1, by its words.
    """

    def __init__(self, points: Mapping[str, Tensor]) -> None:
        self.names = list(points)
        self.means = F.normalize(torch.stack([found.mean(0) for found in points.values()]))

    def ranks(self, points: Tensor, subjects: Sequence[str]) -> list[int]:
        """Rank each picture's own subject among all by nearness.

        Args:
            points: Of the pictures, (count, dimensions) of length 1.
            subjects: What each should show, which must be known.

        Returns:
            The rank of each, 1 the nearest.
        """
        own = [self.names.index(subject) for subject in subjects]
        return [1 + int((row > row[place]).sum()) for row, place in zip(points @ self.means.T, own, strict=True)]
