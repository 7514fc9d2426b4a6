"""Strengths that change over the steps of a generation, and that differ between parts of a base. No torch here."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from .block_names import holder, weighed
from .errors import UserError


@dataclass(frozen=True)
class Schedule:
    """Strengths from the first step (pure noise) to the last, with straight lines between them.

    ``Schedule([0, 1])`` fades an adapter in: composition from the base, detail from the adapter. A text encoder, which
    runs once before the steps, takes the mean.

    Attributes:
        values: The strengths.
        places: Where each holds, from 0 at the first step to 1 at the last, never falling; before the first and behind the
            last the strength stays. By default they are evenly spaced.
    """

    values: Sequence[float]
    places: Sequence[float] = ()

    def __post_init__(self) -> None:
        values, places = _numbers(self.values), _numbers(self.places)
        if not values:
            raise UserError(f"a schedule is a list of finite strengths, as Schedule([0, 1]), not {self.values!r}")
        if not places:
            places = tuple(number / max(1, len(values) - 1) for number in range(len(values)))
        if len(places) != len(values) or not all(0 <= a <= b <= 1 for a, b in pairwise((0.0, *places, 1.0))):
            raise UserError(f"the places of a schedule rise from 0 to 1, one for each strength; {self.places!r} do not")
        object.__setattr__(self, "values", values)  # of arrays and tensors too
        object.__setattr__(self, "places", places)

    def at(self, progress: float) -> float:
        """Give the strength at a point of the steps.

        Args:
            progress: From 0 at the first step to 1 at the last.

        Returns:
            The strength.
        """
        right = bisect_right(self.places, progress)
        if right == 0 or right == len(self.places):
            return self.values[max(0, right - 1)]
        left = right - 1
        share = (progress - self.places[left]) / (self.places[right] - self.places[left])
        return self.values[left] + share * (self.values[right] - self.values[left])

    @property
    def mean(self) -> float:
        """The mean over all steps: the area below the lines."""
        places, values = (0.0, *self.places, 1.0), (self.values[0], *self.values, self.values[-1])
        lines = zip(pairwise(places), pairwise(values), strict=True)
        return sum((b - a) * (one + other) / 2 for (a, b), (one, other) in lines)


def _numbers(values: object) -> tuple[float, ...]:
    """Finite numbers; nothing for what are none."""
    try:
        found = () if isinstance(values, str) else tuple(float(value) for value in values)  # type: ignore[attr-defined]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last for a tensor of more than one dimension
        return ()
    return found if all(math.isfinite(value) for value in found) else ()


@dataclass(frozen=True)
class ByPart:
    """A strength that differs between components, between blocks and over the steps; where several say, they multiply.

    ``ByPart(0.8, components={"text_encoder": 0.5}, blocks={"mid": 1, "up.1": 0.5})``.

    Attributes:
        strength: Of all.
        components: What it is multiplied by in a component; 1 in those that are not named.
        blocks: What it is multiplied by in a block, by a path as ``up_blocks.1`` or ``up_blocks.1.attentions.0``, in short
            as ``mid`` or ``up.1``, or as ``IN05``, ``M00``, ``OUT03``. Of a component with a block that is named, the others
            get 0; a component without one is left as it is.
        steps: What it is multiplied by over the steps.
        block_steps: What it is multiplied by over the steps in a block or a layer, by its own name; of two that hold a layer
            the inner one counts. What lies in none that is named, and a component without one, is left as it is.
    """

    strength: float = 1.0
    components: Mapping[str, float] = field(default_factory=dict)
    blocks: Mapping[str, float] = field(default_factory=dict)
    steps: Schedule | None = None
    block_steps: Mapping[str, Schedule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in (self.strength, *self.components.values(), *self.blocks.values()):
            if not _numbers((value,)):
                raise UserError(f"a strength must be a finite number, not {value!r}")

    def __hash__(self) -> int:
        parts = (self.components, self.blocks, self.block_steps)
        return hash((self.strength, *(tuple(part.items()) for part in parts), self.steps))

    def scaled(self, share: float) -> "ByPart":
        """Make so much of it.

        Args:
            share: What it is multiplied by.

        Returns:
            Another one.
        """
        return replace(self, strength=self.strength * share)

    @property
    def over_steps(self) -> bool:
        """Whether it changes over the steps."""
        return self.steps is not None or bool(self.block_steps)

    def timed(self, component: str, blocks: Sequence[str]) -> "ImageStrengths":
        """Give what it is in a component, with the steps.

        Args:
            component: Its name.
            blocks: Its blocks.

        Returns:
            The strengths of the blocks, and what they are multiplied by.
        """
        held = {block: holder(block, self.block_steps) for block in blocks} if self.block_steps else {}
        own = {block: self.block_steps[name] for block, name in held.items() if name is not None}
        return ImageStrengths(self.on(component, blocks), self.steps, own)

    def on(self, component: str, blocks: Sequence[str]) -> dict[str, float]:
        """Give the strength of each block of a component, without the steps.

        Args:
            component: Its name.
            blocks: Its blocks.

        Returns:
            By block.
        """
        whole = self.strength * self.components.get(component, 1.0)
        meant = weighed(self.blocks, blocks)
        shares = {block: self.blocks[meant[block]] if block in meant else 0.0 for block in blocks}
        return {block: whole * (shares[block] if meant else 1.0) for block in blocks}


@dataclass(frozen=True)
class ImageStrengths:
    """The strengths of an image.

    Attributes:
        blocks: By block of one component.
        steps: What all are multiplied by over the steps.
        block_steps: What some are multiplied by besides, by block.
    """

    blocks: Mapping[str, float]
    steps: Schedule | None = None
    block_steps: Mapping[str, Schedule] = field(default_factory=dict)

    def taken(self, value: Callable[[Schedule], float]) -> dict[str, float]:
        """Give the strengths with one number for each schedule.

        Args:
            value: Makes the number of a schedule, such as its mean.

        Returns:
            By block.
        """
        whole = 1.0 if self.steps is None else value(self.steps)
        own = self.block_steps
        if not own:
            return {name: one * whole for name, one in self.blocks.items()}
        return {name: one * whole * (value(own[name]) if name in own else 1.0) for name, one in self.blocks.items()}


@dataclass(frozen=True)
class Timed:
    """Strengths of the blocks of one component for each image, over the steps."""

    images: tuple[ImageStrengths, ...]

    def at(self, progress: float) -> dict[str, list[float]]:
        """Give the strengths at a point of the steps.

        Args:
            progress: From 0 at the first step to 1 at the last.

        Returns:
            By block, one for each image.
        """
        return self._of_blocks(lambda schedule: schedule.at(progress))

    @property
    def mean(self) -> dict[str, list[float]]:
        """The means over all steps; of two that multiply, the product of the means."""
        return self._of_blocks(lambda schedule: schedule.mean)

    def _of_blocks(self, value: Callable[[Schedule], float]) -> dict[str, list[float]]:
        taken = [one.taken(value) for one in self.images]  # all of them in the order of the blocks
        return {
            block: list(row) for block, *row in zip(self.images[0].blocks, *(one.values() for one in taken), strict=True)
        }
