"""Rows of an orthogonal basis that adapters share, so that none reads what another does (Orthogonal Adaptation).

Po et al. 2024, https://arxiv.org/abs/2312.02432.
"""

import math

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter, Site
from ...core.errors import UserError
from .adapter import LoraAdapter


def basis_rows(width: int, first: int, count: int, seed: int) -> Tensor:
    """Give rows of an orthogonal matrix, without making the others.

    It is the cosine transform (DCT-II) with its rows in a random order and its columns with random signs: orthogonal for any
    width, and none of its rows is like a picture or a direction of features.

    Args:
        width: That of the matrix, (width, width).
        first: The first row, from 0.
        count: How many.
        seed: What order and signs come from.

    Returns:
        (count, width), orthonormal rows.
    """
    chance = torch.Generator().manual_seed(seed)
    order = torch.randperm(width, generator=chance)[first : first + count].double()
    signs = torch.randint(2, (width,), generator=chance).double() * 2 - 1
    places = (torch.arange(width).double() + 0.5) * math.pi / width
    rows = torch.cos(order[:, None] * places) * math.sqrt(2 / width)
    rows[order == 0] /= math.sqrt(2)
    return (rows * signs).float()


def orthogonal_down(shape: tuple[int, ...], rank: int, seed: int, part: int) -> Tensor:
    """Make a ``down`` of a part of the shared basis.

    Args:
        shape: That of the weight, (out, in, ...).
        rank: Of the pair.
        seed: Of the basis.
        part: Which of its parts of so many rows, from 0.

    Returns:
        (rank, in, ...), with rows as long as those of a usual ``down`` are on average.

    Raises:
        UserError: The basis of that width has no such part.
    """
    inputs = shape[1:]
    width = math.prod(inputs)
    parts = width // rank
    if part >= parts:
        raise UserError(
            f"basis_part={part}: at a layer of {width} inputs the shared basis has {parts} parts of rank {rank}, from 0 on;"
            " lower the rank, or leave such layers out by --target"
        )
    # Uniform numbers of variance 1 / (3 width), as a Linear begins with, make rows of this length.
    return basis_rows(width, part * rank, rank, seed).view(rank, *inputs) / math.sqrt(3)


class SharedBasisLora(LoraAdapter):
    """A pair of which ``up`` alone is trained: its ``down`` are rows of the basis that others have other rows of."""

    def __init__(self, site: Site, down: Tensor, up: Tensor, alpha: float, dropout: float) -> None:
        super().__init__(site, down, up, alpha, dropout)
        self.down.requires_grad_(False)

    def by_rate(self) -> dict[float, list[nn.Parameter]]:
        """``up`` alone."""
        return {1.0: [self.up]}

    def begin_as(self, other: Adapter) -> float | None:
        """Take over nothing: what it reads is its part of the basis, and no other."""
        return None
