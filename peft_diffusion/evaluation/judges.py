"""What judges pictures: the small networks that travel with the package for icons, CLIP or DINOv2 for other bases."""

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from . import drawings
from .style_net import load_style_net
from .subject_net import load_subject_net, points_of

JudgeKind: TypeAlias = Literal["icons", "clip", "dino"]
_AT_ONCE = 64  # pictures that a network of icons sees


class Judge(Protocol):
    """Sees pictures as rows of numbers, in which styles and subjects are told apart.

    Attributes:
        name: What it is, for people.
    """

    name: str

    def style(self, images: Sequence[Image.Image]) -> Tensor:
        """See how pictures are drawn.

        Args:
            images: RGB pictures.

        Returns:
            (count, width), float32 on the CPU; near for the same style.
        """
        ...

    def subject(self, images: Sequence[Image.Image]) -> Tensor:
        """See what pictures show.

        Args:
            images: RGB pictures.

        Returns:
            (count, width) of length 1, float32 on the CPU; a cosine near 1 for the same subject.
        """
        ...

    def words(self, texts: Sequence[str]) -> Tensor | None:
        """See what texts say, among what pictures show.

        Args:
            texts: Prompts.

        Returns:
            (count, width) of length 1, comparable with `subject`; None for a judge that does not read.
        """
        ...

    def names(self, images: Sequence[Image.Image]) -> list[str] | None:
        """Name the style of each picture, among those that the judge was trained on.

        Args:
            images: RGB pictures.

        Returns:
            A name each; None for a judge that was trained on no styles.
        """
        ...

    def apart(self, images: Sequence[Image.Image], known: Sequence[Image.Image]) -> Tensor:
        """Measure how far pictures are from others, to find copies.

        Args:
            images: RGB pictures.
            known: Others.

        Returns:
            (images, known), 0 for the same picture.
        """
        ...


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

    def apart(self, images: Sequence[Image.Image], known: Sequence[Image.Image]) -> Tensor:
        """The distance of maps of colours and edges, at the best of several shifts."""
        maps, others = (drawings.maps_of(drawings.pixels_of(one)) for one in (images, known))
        return drawings.distances(maps, others)

    @staticmethod
    def _pieces(images: Sequence[Image.Image]) -> tuple[Tensor, ...]:
        return tuple(drawings.unit(drawings.pixels_of(images)).split(_AT_ONCE))


def judge_of(kind: JudgeKind, model: str | None = None, device: str = "cpu") -> Judge:
    """Load a judge.

    Args:
        kind: Which.
        model: The folder or hub id of CLIP or DINOv2; None for a usual one, which is fetched from the hub.
        device: Where CLIP or DINOv2 computes.

    Returns:
        The judge.

    Raises:
        UserError: There is no such model, or it is none of that kind.
    """
    if kind == "icons":
        return IconJudge()
    from . import vision  # which brings transformers

    return vision.clip_judge(model, device) if kind == "clip" else vision.dino_judge(model, device)
