"""Drawings compared by where their colours and edges lie: small maps, at the best of several shifts."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIZE = 128  # pixels a side at which drawings are compared
_CELLS = 24
_SHIFTS = 2
_EDGE_WEIGHT = 1.5


def pixels_of(images: Sequence[Image.Image], size: int = SIZE) -> Tensor:
    """Bring pictures to one size.

    Args:
        images: Of any size.
        size: Pixels a side.

    Returns:
        (count, 3, size, size) in bytes.
    """
    small = [one.convert("RGB") for one in images]
    small = [one if one.size == (size, size) else one.resize((size, size), Image.Resampling.LANCZOS) for one in small]
    return torch.from_numpy(np.stack([np.asarray(one) for one in small])).permute(0, 3, 1, 2).contiguous()


def unit(images: Tensor) -> Tensor:
    """Bring images to the size and range at which drawings are compared.

    Args:
        images: (count, 3, height, width), bytes or in [0, 1].

    Returns:
        (count, 3, 128, 128) in [0, 1].
    """
    values = images.float() / 255 if images.dtype == torch.uint8 else images.float().clamp(0, 1)
    return values if values.shape[-2:] == (SIZE, SIZE) else F.interpolate(values, (SIZE, SIZE), mode="area")


def maps_of(images: Tensor) -> Tensor:
    """Make a small map of each image: its colours as distances from white, and its edges in four directions.

    Args:
        images: (count, 3, height, width), bytes or in [0, 1].

    Returns:
        (count, 7, 24, 24).
    """
    values = F.avg_pool2d(1 - unit(images), 2)
    light = F.pad(values.mean(1), (1, 1, 1, 1), mode="replicate")
    across = light[:, 1:-1, 2:] - light[:, 1:-1, :-2]
    down = light[:, 2:, 1:-1] - light[:, :-2, 1:-1]
    edges = torch.stack([across.abs(), down.abs(), (across + down).abs() * 0.7, (across - down).abs() * 0.7], 1)
    small = F.interpolate(torch.cat([values, _EDGE_WEIGHT * edges], 1), _CELLS, mode="area")
    return F.avg_pool2d(F.pad(small, (1, 1, 1, 1)), 3, 1)


def distances(maps: Tensor, known: Tensor) -> Tensor:
    """Measure how far drawings are apart, at the best of the shifts by up to two cells.

    Args:
        maps: Of `maps_of`, (count, 7, 24, 24).
        known: Others, (others, 7, 24, 24).

    Returns:
        (count, others), 0 for the same.
    """
    flat = known.flatten(1)
    moves = range(-_SHIFTS, _SHIFTS + 1)
    best = torch.full((len(maps), len(known)), float("inf"))
    for down in moves:
        for across in moves:
            best = torch.minimum(best, torch.cdist(_shifted(maps, down, across).flatten(1), flat))
    return best


def _shifted(maps: Tensor, down: int, across: int) -> Tensor:
    padded = F.pad(maps, (_SHIFTS,) * 4)
    top, left = _SHIFTS + down, _SHIFTS + across
    return padded[..., top : top + _CELLS, left : left + _CELLS]
