"""The colour that pictures have all along their border: paper, or a frame, which belongs to a style as its lines do."""

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from PIL import Image

Colour: TypeAlias = tuple[int, int, int]
"""Red, green and blue, from 0 to 255."""

_WIDTH = 0.04  # of the shorter side
_FLAT, _FLAT_SHARE = 16, 0.9  # how far from the median, in 255ths of a channel, and how much of a border has to be as near
_SAME, _SAME_SHARE = 12, 0.8  # the same of the borders of several pictures
_LEAST = 3  # pictures
NEAR = 20
"""How far a channel of a colour may be off to be taken for the same paper."""


def border(picture: Image.Image) -> Colour | None:
    """Measure the colour along the border of a picture.

    Args:
        picture: RGB.

    Returns:
        The median of each channel; None where the border has several colours.
    """
    pixels = np.asarray(picture.convert("RGB")).astype(np.int16)
    height, width = pixels.shape[:2]
    deep = max(1, round(_WIDTH * min(height, width)))
    inside = np.zeros((height, width), bool)
    inside[deep : height - deep, deep : width - deep] = True
    along = pixels[~inside]
    middle = np.median(along, axis=0)
    flat = (np.abs(along - middle) <= _FLAT).all(axis=1).mean()
    return _colour(middle) if flat >= _FLAT_SHARE else None


def paper(pictures: Iterable[Image.Image]) -> Colour | None:
    """Measure the colour that the borders of pictures have in common.

    Args:
        pictures: RGB.

    Returns:
        The colour; None where they have none, or are too few to tell.
    """
    found = [border(picture) for picture in pictures]
    flat = [colour for colour in found if colour is not None]
    if len(found) < _LEAST or not flat:
        return None
    middle = _colour(np.median(np.array(flat), axis=0))
    return middle if sum(near(colour, middle, _SAME) for colour in flat) >= _SAME_SHARE * len(found) else None


def near(one: Colour, other: Colour, limit: int = NEAR) -> bool:
    """Tell whether two colours are taken for the same.

    Args:
        one: A colour.
        other: Another.
        limit: How far each channel may be off.

    Returns:
        Whether they are.
    """
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= limit


def missed(pictures: Sequence[Image.Image], wanted: Colour) -> list[Colour | None]:
    """Find the borders of pictures that are not of a colour.

    Args:
        pictures: RGB.
        wanted: The colour.

    Returns:
        What each of these has instead; None for several colours.
    """
    found = [border(picture) for picture in pictures]
    return [colour for colour in found if colour is None or not near(colour, wanted)]


def written(colour: Colour) -> str:
    """Write a colour as the web does.

    Args:
        colour: The colour.

    Returns:
        ``#rrggbb``.
    """
    return "#" + "".join(f"{value:02x}" for value in colour)


def _colour(values: np.ndarray) -> Colour:
    red, green, blue = (round(float(value)) for value in values)
    return red, green, blue
