"""What a way of composing adapters declares. Imports no torch."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ...core.errors import UserError
from ...core.strength_schedule import ByPart
from ...core.wording import number_of

if TYPE_CHECKING:
    from ...bases.prompts import Encoding
    from ...core.learned_strengths import LearnedStrengths
    from ...formats.composition import CompositionSpec
    from ..adapters import Adapters
    from ..sampler import Cell


Found = TypeVar("Found")


@dataclass(frozen=True)
class Drawing:
    """What a picture is drawn with, as far as a composition may need it.

    Attributes:
        adapters: Those on the base.
        scheduler: What draws.
        steps: How many denoising steps there are from pure noise.
        reads: Reads the prompt of a picture, with the strengths that its adapters have in text encoders; None where no
            composition reads any.
        file: What was learned, where something was; None where not.
    """

    adapters: "Adapters"
    scheduler: Any
    steps: int
    reads: "Callable[[Cell], Encoding] | None" = None
    file: Path | None = None
    _found: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, key: Hashable, find: Callable[[], Found]) -> Found:
        """Compute what is the same for all pictures, and keep it until all are drawn.

        Args:
            key: What it is of, such as the names of adapters.
            find: Computes it.

        Returns:
            What was found, now or before.
        """
        if key not in self._found:
            self._found[key] = find()
        found: Found = self._found[key]
        return found

    def of_pass(self, steps: int) -> "Drawing":
        """Draw the same pictures in another number of steps, as a second pass does.

        Args:
            steps: How many there are from pure noise.

        Returns:
            Another drawing, which keeps what this one has found.
        """
        return replace(self, steps=steps)

    @property
    def learned(self) -> "tuple[CompositionSpec, LearnedStrengths]":
        """What the file says of itself, and what it holds. Raises UserError where there is none, or it is damaged."""
        from ...formats import composition

        if self.file is None:
            raise UserError("--compose learned needs what was learned: name it with --compose-file")
        found = composition.read(self.file)
        return self.once(("learned", self.file), lambda: (found, found.learned()))

    @cached_property
    def timesteps(self) -> tuple[float, ...]:
        """The noise levels at which the network is called, from the noisiest, each once.

        A sampler that calls the network at further levels within a step has several for a step.
        """
        own = type(self.scheduler).from_config(self.scheduler.config)
        own.set_timesteps(self.steps)
        return tuple(dict.fromkeys(own.timesteps.tolist()))

    def progress(self, level: int) -> float:
        """Tell how far the steps are at a noise level.

        Args:
            level: Its number, from 0.

        Returns:
            From 0 at the first to 1 at the last, as schedules count.
        """
        return level / max(1, len(self.timesteps) - 1)


class Composition:
    """How several adapters meet. By default they add up, as their strengths say.

    Attributes:
        name: What ``--compose`` calls it.
        words: What it does, for help: a clause that follows "How several adapters meet:".
        fewest: How many adapters it needs.
        most: How many it takes at most; None for any number.
    """

    name: ClassVar[str]
    words: ClassVar[str]
    fewest: ClassVar[int] = 2
    most: ClassVar[int | None] = None

    def check(self, adapters: int) -> None:
        """See that there is something to compose, before anything is loaded.

        Args:
            adapters: How many there are.

        Raises:
            UserError: There are too few or too many.
        """
        if adapters < self.fewest:
            raise UserError(
                f"--compose {self.name} does nothing with {adapters or 'no'} adapter; give two or more, or leave it away"
            )
        if self.most is not None and adapters > self.most:
            taken = number_of(self.most, "adapter")
            raise UserError(f"--compose {self.name} is for {taken}, and {adapters} are given; leave some away")

    def rows(self, cell: "Cell") -> "list[tuple[Cell, float]]":
        """Say what a picture is computed of, before anything is drawn.

        Args:
            cell: The picture.

        Returns:
            What each of its rows of a batch is drawn with, and by how much its prediction counts; the weights sum to 1.

        Raises:
            UserError: Its strengths do not allow it.
        """
        return [(cell, 1.0)]

    def strengths(self, cell: "Cell", drawing: Drawing) -> "Mapping[str, float | ByPart] | None":
        """Say how much of each adapter acts, by part and over the steps, when a row is about to be drawn.

        Args:
            cell: The row, as `rows` gave it.
            drawing: What it is drawn with.

        Returns:
            By name; None leaves all as they are.

        Raises:
            UserError: The adapters do not allow it.
        """
        return cell.strengths


def used(cell: "Cell") -> dict[str, ByPart]:
    """List the adapters of a picture that act.

    Args:
        cell: The picture.

    Returns:
        Those whose strength is not 0, in the order in which they were given.
    """
    amounts = {name: one if isinstance(one, ByPart) else ByPart(one) for name, one in (cell.strengths or {}).items()}
    return {name: one for name, one in amounts.items() if one.strength}
