"""One adapter a step, in turn. Imports no torch."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ...core.strength_schedule import ByPart, Schedule
from .declared import Composition, Drawing, used

if TYPE_CHECKING:
    from ..sampler import Cell


class Switch(Composition):
    """LoRA Switch (Zhong et al. 2024, https://arxiv.org/abs/2402.16843): turns of one denoising step each, in order.

    A sampler that calls the network at further noise levels within a step has the adapter of that step there.
    """

    name = "switch"
    words = "one a step, in turn"

    def strengths(self, cell: "Cell", drawing: Drawing) -> "Mapping[str, float | ByPart] | None":
        """Multiply each strength by 1 where its adapter's turn is and by 0 elsewhere.

        Args:
            cell: The row.
            drawing: What it is drawn with.

        Returns:
            The strengths, with schedules over the steps.
        """
        if cell.strengths is None:
            return None
        acting, found, levels = used(cell), dict(cell.strengths), len(drawing.timesteps)
        for turn, (name, amount) in enumerate(acting.items() if len(acting) > 1 else ()):
            factors = []
            for level in range(levels):
                at = 1.0 if amount.steps is None else amount.steps.at(drawing.progress(level))
                factors.append(at if level * drawing.steps // levels % len(acting) == turn else 0.0)
            found[name] = replace(amount, steps=Schedule(factors))
        return found
