"""At each layer one adapter of two, from content to style over the steps. Imports no torch."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from ...core.strength_schedule import ByPart, Schedule
from .declared import Composition, Drawing, used

if TYPE_CHECKING:
    from ..sampler import Cell


class KLora(Composition):
    """K-LoRA (Ouyang et al. 2025, https://arxiv.org/abs/2502.18461): the first adapter is the content, the second the style.

    A layer of the network has the content's change until a point of the steps of its own, and the style's from there on:
    see `switching.measured`. A layer where one of both alone acts has that one all the time. A text encoder, which reads
    the prompt once, has each for the share of the steps that it has in the network on the mean.
    """

    name = "k-lora"
    words = "at each layer one of two, by their largest weights, from the first, a subject, to the second, a style"
    most = 2

    def strengths(self, cell: "Cell", drawing: Drawing) -> "Mapping[str, float | ByPart] | None":
        """Have each layer change from the content to the style at its own point of the steps.

        Args:
            cell: The row.
            drawing: What it is drawn with.

        Returns:
            The strengths, with a schedule for each layer.

        Raises:
            UserError: The adapters have no layer in common whose weights both change.
        """
        acting = used(cell)
        if cell.strengths is None or len(acting) < 2:
            return cell.strengths
        from .switching import measured  # imports torch

        content, style = acting
        whole = drawing.once((self.name, content, style), lambda: measured(drawing.adapters, content, style))
        places = whole.between(acting[content], acting[style])
        shares = {content: places.mean, style: 1 - places.mean}
        found = dict(cell.strengths)
        for name, first in ((content, True), (style, False)):
            amount = acting[name]
            encoders = {part: amount.components.get(part, 1.0) * shares[name] for part in places.encoders}
            steps = {layer: _until(place, first=first) for layer, place in places.layers.items()}
            found[name] = replace(amount, components={**amount.components, **encoders}, block_steps=steps)
        return found


def _until(place: float, *, first: bool) -> Schedule:
    """1 before a point of the steps and 0 from there on; or, of what is not first, 0 and then 1."""
    before, after = (1.0, 0.0) if first else (0.0, 1.0)
    if place <= 0:
        return Schedule([after])
    return Schedule([before]) if place > 1 else Schedule([before, before, after, after], [0, place, place, 1])
