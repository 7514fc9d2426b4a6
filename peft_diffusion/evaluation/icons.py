"""The judge that travels with the package, for drawings such as the embedded base makes."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from . import drawings
from .judge import Judge
from .style_net import load_style_net
from .subject_net import load_subject_net, points_of

_AT_ONCE = 64  # pictures that the network of styles sees


class IconJudge(Judge):
    """The networks of `style_net` and `subject_net`, which were trained on icon sets, and maps of colours and edges."""

    name = "icons (embedded)"

    def __init__(self) -> None:
        self.net = load_style_net()
        self.subjects = load_subject_net()

    @torch.no_grad()
    def style(self, images: Sequence[Image.Image]) -> Tensor:
        """Means and maxima of the layers of the network of styles."""
        return torch.cat([self.net.features(piece) for piece in self._pieces(images)])

    def subject(self, images: Sequence[Image.Image]) -> Tensor:
        """Points of the network of subjects."""
        return points_of(self.subjects, drawings.pixels_of(images))

    def words(self, texts: Sequence[str]) -> Tensor | None:
        """Nothing: the networks do not read."""
        return None

    @torch.no_grad()
    def names(self, images: Sequence[Image.Image]) -> list[str] | None:
        """The icon set that the network of styles says."""
        scores = torch.cat([self.net(piece) for piece in self._pieces(images)])
        return [self.net.styles[place] for place in scores.argmax(1).tolist()]

    def marks(self, images: Sequence[Image.Image]) -> Tensor:
        """Maps of colours and edges."""
        return drawings.maps_of(drawings.pixels_of(images))

    def apart(self, marks: Tensor, known: Tensor) -> Tensor:
        """The distance of the maps, at the best of several shifts."""
        return drawings.distances(marks, known)

    @staticmethod
    def _pieces(images: Sequence[Image.Image]) -> tuple[Tensor, ...]:
        return tuple(drawings.unit(drawings.pixels_of(images)).split(_AT_ONCE))
