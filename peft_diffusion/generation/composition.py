"""Adapters that meet in turn or in their predictions instead of in the weights.

Both ways are of Zhong et al. 2024, Multi-LoRA Composition for Image Generation (https://arxiv.org/abs/2402.16843).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import UserError
from ..core.strength_schedule import ByPart, Schedule
from .settings import Compose

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
        Under ``composite`` a row for each adapter of a picture whose strength is not 0: that adapter alone as trained, in
        the parts and over the steps that were said, weighed by its strength. Else a row for each picture.

    Raises:
        UserError: Weights of a mean are below 0.
    """
    found: list[tuple[Cell, int, float]] = []
    for picture, cell in enumerate(cells):
        amounts = _used(cell) if compose == "composite" else {}
        if len(amounts) < 2:
            found.append((cell, picture, 1.0))
            continue
        weights = {name: one.strength for name, one in amounts.items()}
        below = [name for name, weight in weights.items() if weight < 0]
        if below:
            raise UserError(f"composite averages by strengths, so that of {below[0]!r} cannot be {weights[below[0]]:g}")
        for name, amount in amounts.items():
            alone = dict.fromkeys(cell.strengths or {}, 0.0) | {name: replace(amount, strength=1.0)}
            found.append((replace(cell, strengths=alone), picture, weights[name] / sum(weights.values())))
    own, pictures, shares = zip(*found, strict=True)
    return Rows(list(own), pictures, shares)


def in_turn(cells: "Sequence[Cell]", compose: Compose, scheduler: Any, steps: int) -> "list[Cell]":
    """Let the adapters of each picture take turns under ``switch``: one a step, in order, at its own strength.

    Args:
        cells: The pictures.
        compose: How their adapters meet.
        scheduler: What draws.
        steps: How many denoising steps there are from pure noise.

    Returns:
        The pictures, with schedules over the steps. A sampler that calls the network at further noise levels within a step
        has the adapter of that step there.
    """
    if compose != "switch":
        return list(cells)
    own = type(scheduler).from_config(scheduler.config)
    own.set_timesteps(steps)
    levels = len(dict.fromkeys(own.timesteps.tolist()))
    return [replace(cell, strengths=_turns(cell, levels, steps)) for cell in cells]


def _turns(cell: "Cell", levels: int, steps: int) -> dict[str, float | ByPart] | None:
    """The strengths of a picture, each multiplied by 1 where its adapter's turn is and by 0 elsewhere."""
    if cell.strengths is None:
        return None
    used, found = _used(cell), dict(cell.strengths)
    for turn, (name, amount) in enumerate(used.items() if len(used) > 1 else ()):
        factors = []
        for level in range(levels):
            at = 1.0 if amount.steps is None else amount.steps.at(level / max(1, levels - 1))
            factors.append(at if level * steps // levels % len(used) == turn else 0.0)
        found[name] = replace(amount, steps=Schedule(factors))
    return found


def _used(cell: "Cell") -> dict[str, ByPart]:
    """The adapters of a picture whose strength is not 0, in order."""
    amounts = {name: one if isinstance(one, ByPart) else ByPart(one) for name, one in (cell.strengths or {}).items()}
    return {name: one for name, one in amounts.items() if one.strength}
