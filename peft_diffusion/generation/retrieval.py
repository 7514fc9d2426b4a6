"""Adapters that a library chooses for prompts: what ``--auto`` does."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..bases.asked import PREDICTIONS
from ..bases.base import BaseInfo, describe
from ..bases.pipelines import Pipeline
from ..core.events import Observer
from ..library.fits import Wanted, named
from ..library.library import Library
from .settings import Choice, DrawingConfig

if TYPE_CHECKING:
    from ..library.events import Chosen


class Retrieved(NamedTuple):
    """What was chosen for a prompt.

    Attributes:
        prompt: As it is drawn, with the triggers that it lacked.
        choices: The adapters that were chosen, each at its strength, the best first.
    """

    prompt: str
    choices: tuple[Choice, ...]

    @classmethod
    def of(cls, chosen: "Chosen") -> "Retrieved":
        """Take what a library chose.

        Args:
            chosen: What it told of that.

        Returns:
            The prompt and the adapters.
        """
        return cls(chosen.prompt, tuple(Choice(one.entry.path, one.strength) for one in chosen.every))


class Retrieval:
    """Chooses adapters of a library for prompts, each prompt's once.

    Args:
        library: The library.
        wanted: The base that they have to fit.
        given: Adapters that every prompt is drawn with already.
        tell: Is told what was chosen, and why.
    """

    def __init__(self, library: Library, wanted: Wanted, given: Sequence[Choice], tell: Observer) -> None:
        self._library = library
        self._wanted = wanted
        self._given = [choice.path for choice in given]
        self._tell = tell
        self._known: dict[tuple[tuple[str, ...], int, tuple[Path, ...]], tuple[Retrieved, ...]] = {}

    def choose(self, prompt: str, count: int, used: Sequence[Path]) -> Retrieved:
        """Choose adapters for a prompt.

        Args:
            prompt: As it is drawn.
            count: How many at most.
            used: The files of adapters that its picture is drawn with beside those that are given.

        Returns:
            The prompt and the adapters.

        Raises:
            UserError: The library cannot be read.
        """
        (made,) = self.choose_together([prompt], count, used)
        return made

    def choose_together(self, prompts: Sequence[str], count: int, used: Sequence[Path]) -> tuple[Retrieved, ...]:
        """Choose the same adapters for several prompts.

        Args:
            prompts: As they are drawn.
            count: How many at most, for all together.
            used: The files of adapters that pictures are drawn with beside those that are given.

        Returns:
            Each prompt, and the adapters, which are the same for all.

        Raises:
            UserError: The library cannot be read.
        """
        key = tuple(prompts), count, tuple(used)
        if key not in self._known:
            made = self._library.choose_together(
                prompts, count, base=self._wanted, without=[*self._given, *used], observers=[self._tell]
            )
            self._known[key] = tuple(map(Retrieved.of, made))
        return self._known[key]


def wanted_by(config: DrawingConfig, info: BaseInfo | None) -> Wanted:
    """Tell which base adapters have to fit.

    Args:
        config: What was asked for.
        info: A base that is loaded already; None for the one that is named.

    Returns:
        What is known of it.

    Raises:
        UserError: There is no such base.
    """
    wanted = named(config.base) if info is None else Wanted.of(asdict(info))
    return wanted if config.prediction == "auto" else wanted._replace(prediction=PREDICTIONS[config.prediction])


@contextmanager
def retrieval(
    config: DrawingConfig, pipe: Pipeline | None, given: Sequence[Choice], tell: Observer, *, used: bool
) -> Iterator[Retrieval | None]:
    """Open the library that adapters are chosen from, and close it at the end.

    Args:
        config: What was asked for.
        pipe: A base that is loaded already; None for the one that is named.
        given: The adapters that are given.
        tell: Is told what is chosen.
        used: Whether anything is to be chosen.

    Yields:
        What chooses; None where nothing is to be chosen.

    Raises:
        UserError: There is no library, or no such base.
    """
    if not used:
        yield None
        return
    with Library(config.library, make=False) as library:
        yield Retrieval(library, wanted_by(config, None if pipe is None else describe(pipe)), given, tell)
