"""Each adapter alone, and the mean of their predictions. Imports no torch."""

from dataclasses import replace
from typing import TYPE_CHECKING

from ...core.errors import UserError
from .declared import Composition, used

if TYPE_CHECKING:
    from ..sampler import Cell


_WHOLE = 1 - 1e-6  # a sum of strengths that is 1 but for rounding


class Composite(Composition):
    """LoRA Composite (Zhong et al. 2024, https://arxiv.org/abs/2402.16843): a row of the batch for each adapter.

    The authors' code averages all predictions alike, at one strength of all adapters. Here a strength is the share of its
    adapter in the mean. What they leave of 1 is the share of the base's own prediction; where they sum to more, they are
    divided by their sum. So a strength that comes near to 0 comes near to the picture without that adapter, and one adapter
    alone at 0.6 does about what it does at 0.6 without any composition.
    """

    name = "composite"
    words = (
        "each alone, with the mean of their predictions, in which strengths are shares and the base has what they leave of "
        "1; takes as many times as long as there are adapters"
    )

    def rows(self, cell: "Cell") -> "list[tuple[Cell, float]]":
        """Draw each adapter alone as trained, in the parts and over the steps that were said.

        Args:
            cell: The picture.

        Returns:
            A row for each adapter whose strength is not 0, and one without any where the strengths sum to less than 1;
            weighed by their shares.

        Raises:
            UserError: A share would be below 0.
        """
        amounts = used(cell)
        if not amounts:
            return [(cell, 1.0)]
        below = [name for name, one in amounts.items() if one.strength < 0]
        if below:
            raise UserError(
                f"composite averages by strengths, so that of {below[0]!r} cannot be {amounts[below[0]].strength:g}"
            )
        off, total = dict.fromkeys(cell.strengths or {}, 0.0), sum(one.strength for one in amounts.values())
        whole = total if total > _WHOLE else 1.0
        found = [
            (replace(cell, strengths=off | {name: replace(amount, strength=1.0)}), amount.strength / whole)
            for name, amount in amounts.items()
        ]
        return found if whole == total else [*found, (replace(cell, strengths=off), 1 - total)]
