"""Masks for bases that paint parts of a picture anew: what is to be painted is 1, what is given is 0."""

import math
import random

import torch
from torch import Tensor

COUNT = 4
"""Masks of a picture, of which the first covers it all: such a base is then asked for a whole picture, as any other is."""


def mask(digest: str, number: int, width: int, height: int) -> Tensor:
    """Mask ``number`` of a picture, (1, height, width), of zeros and ones; it depends on the arguments alone.

    The first is full; the others are rectangles and ellipses of an eighth of the picture to all of it, anywhere.
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
