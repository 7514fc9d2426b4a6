"""What a judge of pictures is."""

from collections.abc import Sequence
from typing import Protocol

from PIL import Image
from torch import Tensor


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

    def both(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """See how pictures are drawn and what they show, which one network may tell in one go.

        Args:
            images: RGB pictures.

        Returns:
            What `style` and `subject` return.
        """
        return self.style(images), self.subject(images)

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

    def marks(self, images: Sequence[Image.Image]) -> Tensor:
        """See what copies are found by.

        Args:
            images: RGB pictures.

        Returns:
            (count, ...), float32 on the CPU, as `apart` compares them.
        """
        ...

    def apart(self, marks: Tensor, known: Tensor) -> Tensor:
        """Measure how far pictures are from others, to find copies.

        Args:
            marks: The `marks` of pictures.
            known: Those of others.

        Returns:
            (pictures, others), 0 for the same picture.
        """
        ...
