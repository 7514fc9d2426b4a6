"""Inpainting masks for training bases that repaint parts of an image: 1 is repainted, 0 is given."""

import math
import random

import torch
from torch import Tensor

COUNT = 4
"""Masks of a picture, of which the first covers it all: such a base is then asked for a whole picture, as any other is."""


def mask(digest: str, number: int, width: int, height: int) -> Tensor:
    """Make an inpainting mask that depends on the arguments alone.

    Number 0 covers the whole image. The others are rectangles and ellipses of an eighth of the image to all of it.

    Args:
        digest: The image's SHA-256, from which the shape is drawn.
        number: From 0 to `COUNT` - 1.
        width: Pixels.
        height: Pixels.

    Returns:
        Zeros and ones, (1, height, width), float32.
    """
    if number == 0:
        return torch.ones(1, height, width)
    chance = random.Random(f"mask {digest} {number}")
    area = chance.uniform(1 / 8, 1) * width * height
    aspect = math.exp(chance.uniform(-0.7, 0.7)) * width / height
    across, down = min(width, round(math.sqrt(area * aspect))), min(height, round(math.sqrt(area / aspect)))
    left, top = chance.randint(0, width - across), chance.randint(0, height - down)
    x = (torch.arange(width) + 0.5 - left) / max(1, across)
    y = (torch.arange(height) + 0.5 - top) / max(1, down)
    if chance.random() < 0.5:
        inside = ((x > 0) & (x < 1))[None, :] & ((y > 0) & (y < 1))[:, None]
    else:
        inside = ((x - 0.5) ** 2)[None, :] + ((y - 0.5) ** 2)[:, None] < 0.25
    return inside.float()[None]
