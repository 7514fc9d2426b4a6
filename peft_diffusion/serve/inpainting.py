"""Pictures to start from as A1111 prepares them: brought to size, cut to what a mask shows, filled where it hides."""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, ImageOps

from ..core.errors import UserError

Box: TypeAlias = tuple[int, int, int, int]
_Floats: TypeAlias = npt.NDArray[np.float64]
RESIZE, CROP = 0, 1
FILL, ORIGINAL = 0, 1


@dataclass(frozen=True)
class Prepared:
    """What is drawn from, and where what is drawn belongs.

    Attributes:
        image: The picture to start from.
        mask: White where it is painted anew; None for all of it.
        whole: The picture that the drawn part is put back into; None where the drawn one is whole.
        box: The place of the part: left, top, right and bottom in pixels.
        part: The mask of the part, at its own size.
        changed: The picture differs from the one that was given.
        beneath: What shows where the mask hides what is painted; None for the picture to start from.
    """

    image: Image.Image
    mask: Image.Image | None = None
    whole: Image.Image | None = None
    box: Box = (0, 0, 0, 0)
    part: Image.Image | None = None
    changed: bool = False
    beneath: Image.Image | None = None

    def finished(self, drawn: Image.Image) -> Image.Image:
        """Put what was drawn where it belongs.

        Args:
            drawn: The picture.

        Returns:
            The whole picture.
        """
        if self.whole is None or self.part is None:
            return drawn
        left, top, right, bottom = self.box
        # What the mask hides was put back already, at the size that was drawn: only what it does not hide at all is taken.
        touched = self.part.point(lambda value: 255 if value else 0)
        whole = self.whole.copy()
        whole.paste(drawn.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top), touched)
        return whole


def resized(image: Image.Image, sides: tuple[int, int], mode: int) -> Image.Image:
    """Bring a picture to a size.

    Args:
        image: The picture.
        sides: Width and height in pixels.
        mode: A1111's resize_mode: 0 stretches, 1 crops.

    Returns:
        The picture.

    Raises:
        UserError: It is another mode.
    """
    if mode not in (RESIZE, CROP):
        raise UserError(f"resize_mode {mode} is not done here; take 0, which stretches, or 1, which crops")
    if image.size == sides:
        return image
    if mode == CROP:
        return ImageOps.fit(image, sides, Image.Resampling.LANCZOS)
    return image.resize(sides, Image.Resampling.LANCZOS)


def prepared(
    image: Image.Image,
    mask: Image.Image | None,
    sides: tuple[int, int],
    *,
    mode: int = RESIZE,
    blur: float = 0,
    invert: bool = False,
    fill: int = ORIGINAL,
    only_masked: bool = False,
    padding: int = 0,
) -> Prepared:
    """Prepare a picture.

    Args:
        image: RGB.
        mask: L, of any size; None for none.
        sides: Width and height of what is drawn, in pixels.
        mode: As of `resized`.
        blur: The deviation of the Gaussian by which the mask is blurred, in pixels.
        invert: What the mask shows stays, and the rest is painted.
        fill: A1111's inpainting_fill: 0 fills what is painted from around it, 1 leaves the picture as it is.
        only_masked: Draw the part around what the mask shows alone, at the full size.
        padding: Pixels around that part.

    Returns:
        What is drawn from.

    Raises:
        UserError: A mode is not known, or the mask shows nothing.
    """
    if fill not in (FILL, ORIGINAL):
        raise UserError(
            f"inpainting_fill {fill} is not done here; take 0, which fills from around, or 1, the picture itself"
        )
    if mask is None:
        fitted = resized(image, sides, mode)
        return Prepared(fitted, changed=mode == CROP and fitted is not image)
    shown = mask if mask.size == image.size else mask.resize(image.size, Image.Resampling.BILINEAR)
    shown = ImageOps.invert(shown) if invert else shown
    shown = shown.filter(ImageFilter.GaussianBlur(blur)) if blur > 0 else shown
    changed = shown is not mask or fill == FILL or mode == CROP or only_masked
    if not only_masked:
        fitted, shown = resized(image, sides, mode), resized(shown, sides, mode)
        started = filled(fitted, shown) if fill == FILL else fitted
        return Prepared(started, shown, changed=changed, beneath=fitted)
    bounds = shown.getbbox()
    if bounds is None:
        raise UserError("the mask is black: nothing would be painted; white is what is painted anew")
    box = around(bounds, image.size, sides, padding)
    part, shown_part = image.crop(box), shown.crop(box)
    fitted, fitted_mask = resized(part, sides, RESIZE), resized(shown_part, sides, RESIZE)
    drawn_from = filled(fitted, fitted_mask) if fill == FILL else fitted
    return Prepared(drawn_from, fitted_mask, image, box, shown_part, changed=True, beneath=fitted)


def around(bounds: Box, size: tuple[int, int], sides: tuple[int, int], padding: int) -> Box:
    """Find the part of a picture around some bounds, in the proportions of what is drawn as far as the picture reaches.

    Args:
        bounds: Left, top, right and bottom in pixels.
        size: Of the picture.
        sides: Of what is drawn.
        padding: Pixels around the bounds.

    Returns:
        The part.
    """
    ends = []
    lengths = [bounds[axis + 2] - bounds[axis] + 2 * padding for axis in (0, 1)]
    scale = max(length / side for length, side in zip(lengths, sides, strict=True))
    for axis in (0, 1):
        length = min(size[axis], max(round(sides[axis] * scale), 1))
        middle = (bounds[axis] + bounds[axis + 2]) / 2
        begin = min(max(round(middle - length / 2), 0), size[axis] - length)
        ends.append((begin, begin + length))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Fill what a mask shows from what is around it, by pull and push (Gortler et al. 1996, "The Lumigraph").

    Args:
        image: RGB.
        mask: L, of the same size.

    Returns:
        The picture; what the mask hides stays as it is.
    """
    known = 1 - np.asarray(mask, dtype=np.float64)[..., None] / 255
    pixels = np.asarray(image, dtype=np.float64)
    spread = _pull_push(pixels * known, known)
    return Image.fromarray(np.round(pixels * known + spread * (1 - known)).clip(0, 255).astype(np.uint8))


def _pull_push(colours: _Floats, weights: _Floats) -> _Floats:
    """Colours everywhere, from those that are known: height x width x 3, times their weights, and the weights."""
    height, width = weights.shape[:2]
    if height == width == 1:
        return colours / weights if weights.all() else np.full_like(colours, 127.5)
    even = ((0, height % 2), (0, width % 2), (0, 0))
    sums, weight = (_halved(np.pad(one, even)) for one in (colours, weights))
    most = np.maximum(weight, 1)
    coarse = _pull_push(sums / most, weight / most)
    finer = coarse.repeat(2, 0).repeat(2, 1)[:height, :width]
    return colours + finer * (1 - weights)


def _halved(values: _Floats) -> _Floats:
    """The sums of squares of two by two."""
    return values[::2, ::2] + values[1::2, ::2] + values[::2, 1::2] + values[1::2, 1::2]
