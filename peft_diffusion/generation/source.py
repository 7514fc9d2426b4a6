"""The picture that others are made from: all of it anew to a degree, or the part that a mask shows."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from ..bases import BaseInfo, denoiser_of
from ..bases.loading import quiet
from ..bases.pipelines import Pipeline
from ..core.errors import UserError
from ..data.images import open_picture
from ..data.problems import PictureError
from ..formats.container import sha256
from .recipe import UsedPicture

DEFAULT_STRENGTH = 0.8  # of a picture without mask, as diffusers has it; what a mask shows is painted wholly anew


@dataclass(frozen=True)
class Source:
    """A picture to start from, RGB, and perhaps a mask of its size (L), white where it is painted anew.

    ``strength`` is how far it is left behind: 1 is wholly. Small ones take fewer denoising steps. ``of`` and ``mask_of`` are
    what recipes say of where both came from. ``beneath`` is what shows where the mask hides what is painted, where that is
    not the picture itself, as where something else was filled in to start from.
    """

    image: Image.Image = field(repr=False)
    of: UsedPicture
    mask: Image.Image | None = field(default=None, repr=False)
    mask_of: UsedPicture | None = None
    strength: float = 1.0
    beneath: Image.Image | None = field(default=None, repr=False)

    @property
    def path(self) -> str:
        """What the picture is called in errors."""
        return self.of.path

    def steps(self, asked: int) -> int:
        """Tell how many of the denoising steps are taken.

        Args:
            asked: How many were asked for.

        Returns:
            As many, or fewer where the picture is not left behind wholly.
        """
        return min(int(asked * self.strength), asked)

    def fitted(self, info: BaseInfo, width: int | None, height: int | None) -> "Source":
        """Bring the picture to the size that was asked for.

        Args:
            info: The base.
            width: Pixels; None for its own.
            height: Pixels; None for its own.

        Returns:
            The picture and its mask at that size.

        Raises:
            UserError: The base cannot make its own size, or the mask is too thin for the new one.
        """
        sides = width or self.image.width, height or self.image.height
        if (width is None or height is None) and any(side % info.step for side in sides):
            near = "x".join(str(max(info.step, round(side / info.step) * info.step)) for side in sides)
            raise UserError(
                f"{self.path} is {self.image.width}x{self.image.height}, and the sides must be multiples of {info.step} for"
                f" the base {info.name!r}; crop it, or give --width and --height, such as {near}, to have it resized"
            )
        if sides == self.image.size:
            return self
        mask = None if self.mask is None else self.mask.resize(sides, Image.Resampling.BILINEAR)
        if mask is not None and not _paints(mask):
            raise UserError(
                f"the white of the mask is too thin for {self.path} at {sides[0]}x{sides[1]}: nothing would be painted;"
                " widen it, or paint at the picture's own size"
            )
        image = self.image.resize(sides, Image.Resampling.LANCZOS)
        beneath = None if self.beneath is None else self.beneath.resize(sides, Image.Resampling.LANCZOS)
        return replace(self, image=image, mask=mask, beneath=beneath)

    def pipeline(self, pipe: Pipeline) -> Pipeline:
        """Make the pipeline of the same parts that starts from a picture.

        Args:
            pipe: The pipeline.

        Returns:
            The other.

        Raises:
            UserError: diffusers has none.
        """
        made = beginning_with_pictures(pipe, masked=self.mask is not None)
        if made is None:
            raise UserError(
                f"{self.path}: a {type(pipe).__name__} cannot start from a picture; leave --image away, or take another"
                " --base"
            )
        return made

    def call_arguments(self, count: int) -> dict[str, Any]:
        """Say what the pipeline that starts from a picture is told besides the prompt.

        Args:
            count: How many pictures are drawn.

        Returns:
            Further arguments of the call.
        """
        told: dict[str, Any] = {"image": [self.image] * count, "strength": self.strength}
        if self.mask is None:
            return told
        return told | {"mask_image": [self.mask] * count, "width": self.image.width, "height": self.image.height}

    def kept(self, painted: Image.Image) -> Image.Image:
        """Put the very pixels of the picture back where the mask hides them: a VAE changes all a little.

        Args:
            painted: What was drawn.

        Returns:
            The result.
        """
        return painted if self.mask is None else Image.composite(painted, self.beneath or self.image, self.mask)


def beginning_with_pictures(pipe: Pipeline, *, masked: bool = False) -> Pipeline | None:
    """Make the pipeline of the same parts that starts from a picture.

    Args:
        pipe: The pipeline.
        masked: Whether a mask shows what is painted anew.

    Returns:
        The other; None where diffusers has none.
    """
    kind = diffusers.AutoPipelineForInpainting if masked else diffusers.AutoPipelineForImage2Image
    with quiet(diffusers_logging):
        try:
            made: Pipeline = kind.from_pipe(pipe)
        except ValueError:  # as it says that there is no such class
            return None
    made.set_progress_bar_config(disable=True)
    return made


def read_source(image: Path, mask: Path | None, strength: float | None, steps: int) -> Source:
    """Read the files that pictures start from.

    Args:
        image: The picture.
        mask: White where it is painted anew.
        strength: How far it is left behind, above 0 and up to 1; None for the usual.
        steps: The denoising steps that were asked for.

    Returns:
        The source.

    Raises:
        UserError: They are no pictures, do not fit, or no step would be left.
    """
    found = None if mask is None else opened(mask, "black").convert("L")
    masked = None if mask is None else UsedPicture(str(mask), sha256(mask))
    source = Source(opened(image), UsedPicture(str(image), sha256(image)), found, masked)
    return begin(source, strength, steps)


def begin(source: Source, strength: float | None, steps: int) -> Source:
    """Say how far a picture is left behind, and see that something of it is painted.

    Args:
        source: The picture, and its mask.
        strength: How far, above 0 and up to 1; None for the usual.
        steps: The denoising steps that were asked for.

    Returns:
        The source.

    Raises:
        UserError: The mask does not fit or is black, or no step would be left.
    """
    picture, mask = source.image, source.mask
    called = source.mask_of.path if source.mask_of else ""
    if mask is not None and mask.size != picture.size:
        raise UserError(
            f"the mask {called} is {mask.width}x{mask.height} and the picture {source.path} is"
            f" {picture.width}x{picture.height}; bring it to the picture's size"
        )
    if mask is not None and not _paints(mask):
        raise UserError(f"the mask {called} is black: nothing would be painted; white is what is painted anew")
    begun = replace(source, strength=strength or (DEFAULT_STRENGTH if mask is None else 1.0))
    if begun.steps(steps) < 1:
        raise UserError(f"--strength {begun.strength:g} leaves none of {steps} steps; raise it, or --steps")
    return begun


def opened(path: Path, background: str = "white") -> Image.Image:
    """Open a picture that a person named.

    Args:
        path: The file.
        background: The CSS colour behind what is transparent.

    Returns:
        The picture, RGB.

    Raises:
        UserError: It is none.
    """
    try:
        return open_picture(path, background)
    except PictureError as error:
        raise UserError(f"{path}: {error.problem.message}; choose another file") from None


def _paints(mask: Image.Image) -> bool:
    """Whether anything of a mask is white enough to be painted anew."""
    return any(mask.histogram()[128:])


def check_mask(pipe: Pipeline, source: Source | None, name: str) -> None:
    """See that a base that paints parts anew is told which.

    Args:
        pipe: The pipeline.
        source: What is given.
        name: What the base is called.

    Raises:
        UserError: There is a picture and no mask.
    """
    if source is not None and source.mask is None and denoiser_of(pipe).inpaints:
        raise UserError(
            f"the base {name!r} paints parts of a picture anew, and is not told which; give --mask, a picture of the same"
            " size that is white there and black elsewhere, or another --base"
        )
