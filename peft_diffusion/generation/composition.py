"""How the sampler draws what a composition says: rows of a batch, whose predictions are averaged, and strengths over steps.

The ways there are lie in ``compositions``, a file each.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .compositions import COMPOSITIONS, Compose
from .compositions.declared import Drawing

if TYPE_CHECKING:
    from .sampler import Cell


@dataclass(frozen=True)
class Rows:
    """The rows in which pictures are computed: one for each, or under ``composite`` one for each of their adapters.

    Attributes:
        cells: What each row is drawn with.
        pictures: Of which picture each is, counted from 0, never falling.
        weights: What the prediction of each is multiplied by in the mean; those of a picture sum to 1.
    """

    cells: "list[Cell]"
    pictures: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def firsts(self) -> list[int]:
        """The first row of each picture, which all its other rows equal when it is drawn."""
        return [self.pictures.index(one) for one in dict.fromkeys(self.pictures)]

    @contextmanager
    def averaged(self, network: nn.Module) -> Iterator[None]:
        """Give all rows of a picture the mean of their predictions inside, so that their latents stay the same.

        The mean is taken before guidance, which is linear in the predictions: it is the mean of the guided ones.

        Args:
            network: What denoises. Guidance repeats the rows, which stay in order.

        Yields:
            Once.
        """
        if len(self.firsts) == len(self.cells):
            yield
            return

        def after(_: nn.Module, given: Any, output: Any) -> Any:
            if isinstance(output, Tensor):
                return self._mean(output)
            if isinstance(output, tuple):
                return (self._mean(output[0]), *output[1:])
            return type(output)(self._mean(output[0]))  # of diffusers, which holds the prediction alone

        handle = network.register_forward_hook(after)
        try:
            yield
        finally:
            handle.remove()

    def _mean(self, answer: Tensor) -> Tensor:
        """The means of predictions (repeats x rows, ...), in float32, one for each row."""
        mixing = torch.zeros(len(self.firsts), len(self.cells))
        for row, (picture, weight) in enumerate(zip(self.pictures, self.weights, strict=True)):
            mixing[picture, row] = weight
        rows = answer.float().unflatten(0, (-1, len(self.cells)))
        means = torch.einsum("pr,gr...->gp...", mixing.to(answer.device), rows)
        return means[:, list(self.pictures)].flatten(0, 1).to(answer.dtype)


def rows_of(cells: "Sequence[Cell]", compose: Compose) -> Rows:
    """Lay out pictures as rows of a batch.

    Args:
        cells: The pictures.
        compose: How their adapters meet.

    Returns:
        The rows that the composition makes of each, in order.

    Raises:
        UserError: Strengths do not allow it.
    """
    of_pictures = [COMPOSITIONS[compose].rows(cell) for cell in cells]
    found = [(cell, picture, weight) for picture, rows in enumerate(of_pictures) for cell, weight in rows]
    own, pictures, shares = zip(*found, strict=True)
    return Rows(list(own), pictures, shares)


def composed(cells: "Sequence[Cell]", compose: Compose, drawing: Drawing) -> "list[Cell]":
    """Give rows the strengths that the composition says, in parts and over the steps.

    Args:
        cells: The rows.
        compose: How their adapters meet.
        drawing: What they are drawn with.

    Returns:
        The rows, with their strengths.

    Raises:
        UserError: The adapters do not allow it.
    """
    return [replace(cell, strengths=COMPOSITIONS[compose].strengths(cell, drawing)) for cell in cells]
