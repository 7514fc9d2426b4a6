"""Drawings made other than they are, so that a UNet learns to clear noise from any drawing and not from those it knows.

A network that saw every drawing hundreds of times, always in the same place and colours, knows them by heart: a mirrored
one is as strange to it as a photograph, and so is a style that it is taught later.  `moved` drawings keep their colours and
may take any timestep.  `strange` ones have other colours and another surface too; they belong to little noise alone, where
what is drawn is plain to see, so that nobody is shown them for a prompt (Daras et al. 2025, "Ambient Diffusion Omni").

Images are (count, 3, height, width) in [-1, 1] on white, and so are the results.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .training import placed

RECOLOURED, TINTED, GREY, DRESSED = 0.7, 0.1, 0.1, 0.7  # shares
LINE = 0.06  # a difference of lightness that is an edge


def moved(images: Tensor) -> Tensor:
    """Mirrored half the time, turned by up to 20 degrees, resized by up to a fourth, and moved by up to a tenth."""
    count, device = len(images), images.device
    angle = torch.empty(count, device=device).uniform_(-math.pi / 9, math.pi / 9)
    angle = torch.where(_chance(images, 0.5).flatten(), angle, angle * 0)
    size = torch.empty(count, device=device).uniform_(0.85, 1.3)
    mirror = torch.where(_chance(images, 0.5).flatten(), -1.0, 1.0)
    rows = torch.stack([mirror * angle.cos(), -angle.sin(), mirror * angle.sin(), angle.cos()], 1).view(count, 2, 2)
    shift = torch.empty(count, 2, device=device).uniform_(-0.1, 0.1)
    return placed(images, torch.cat([rows * size.view(-1, 1, 1), shift[..., None]], 2)).clamp(-1, 1)


def strange(images: Tensor) -> Tensor:
    """Moved, in other colours, and with another surface: flat, shaded, outlined or soft."""
    ink = _recoloured((1 - moved(images)) / 2)
    chosen = torch.randint(len(_SURFACES), (len(ink),), device=ink.device)
    dressed = _chance(ink, DRESSED)
    for number, surface in enumerate(_SURFACES):
        ink = torch.where(dressed & (chosen == number).view(-1, 1, 1, 1), surface(ink), ink)
    return 1 - 2 * ink.clamp(0, 1)


def _chance(images: Tensor, share: float) -> Tensor:
    return torch.rand(len(images), 1, 1, 1, device=images.device) < share


def _recoloured(ink: Tensor) -> Tensor:
    """Ink, 1 less the light, with its channels exchanged and weighed; some of it grey, some on coloured paper."""
    count, device = len(ink), ink.device
    order = torch.rand(count, 3, device=device).argsort(1)[:, :, None, None].expand_as(ink)
    weights = torch.empty(count, 3, 1, 1, device=device).uniform_(0.5, 1.2)
    found = torch.where(_chance(ink, RECOLOURED), ink.gather(1, order) * weights, ink)
    found = torch.where(_chance(ink, GREY), found.mean(1, keepdim=True).expand_as(found), found)
    paper = torch.rand(count, 3, 1, 1, device=device) * 0.8
    return torch.where(_chance(ink, TINTED), 1 - (1 - found) * (1 - paper), found).clamp(0, 1)


def _soft(ink: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(ink, (1, 1, 1, 1), mode="replicate"), 3, 1)


def _flat(ink: Tensor) -> Tensor:
    """Three to eight levels of each colour."""
    levels = torch.randint(2, 8, (len(ink), 1, 1, 1), device=ink.device)
    return (_soft(ink) * levels).round() / levels


def _shaded(ink: Tensor) -> Tensor:
    """Lighter and darker in large parts."""
    coarse = torch.empty(len(ink), 1, 3, 3, device=ink.device).uniform_(0.6, 1.3)
    return ink * F.interpolate(coarse, ink.shape[-2:], mode="bicubic")


def _outlined(ink: Tensor) -> Tensor:
    """Dark lines, two or three pixels wide, where the lightness changes."""
    light = F.pad(_soft(ink).mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across, down = light[..., 1:-1, 2:] - light[..., 1:-1, :-2], light[..., 2:, 1:-1] - light[..., :-2, 1:-1]
    lines = ((across.square() + down.square()).sqrt() > LINE).float()
    return torch.maximum(ink, _soft(F.max_pool2d(lines, 3, 1, 1)) * 0.95)


_SURFACES: tuple[Callable[[Tensor], Tensor], ...] = (_flat, _shaded, _outlined, _soft)
