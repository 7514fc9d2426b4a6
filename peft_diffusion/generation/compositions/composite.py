"""Each adapter alone, and the mean of their predictions. Imports no torch."""

from dataclasses import replace
from typing import TYPE_CHECKING

from ...core.errors import UserError
from .declared import Composition, used

if TYPE_CHECKING:
    from ..sampler import Cell


class Composite(Composition):
    """LoRA Composite (Zhong et al. 2024, https://arxiv.org/abs/2402.16843): a row of the batch for each adapter."""

    name = "composite"
    words = (
        "each alone, with the mean of their predictions, weighed by strength, which takes as many times as long as there "
        "are adapters"
    )

    def rows(self, cell: "Cell") -> "list[tuple[Cell, float]]":
        """Draw each adapter alone as trained, in the parts and over the steps that were said.

        Args:
            cell: The picture.

        Returns:
            A row for each adapter whose strength is not 0, weighed by it.

        Raises:
            UserError: Weights of a mean are below 0.
        """
        amounts = used(cell)
        if len(amounts) < 2:
            return [(cell, 1.0)]
        weights = {name: one.strength for name, one in amounts.items()}
        below = [name for name, weight in weights.items() if weight < 0]
        if below:
            raise UserError(f"composite averages by strengths, so that of {below[0]!r} cannot be {weights[below[0]]:g}")
        found = []
        for name, amount in amounts.items():
            alone = dict.fromkeys(cell.strengths or {}, 0.0) | {name: replace(amount, strength=1.0)}
            found.append((replace(cell, strengths=alone), weights[name] / sum(weights.values())))
        return found
