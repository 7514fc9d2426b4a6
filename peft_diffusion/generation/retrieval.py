"""Adapters that a library chooses for prompts: what ``generate --auto`` does."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..bases.asked import PREDICTIONS
from ..bases.base import describe
from ..bases.pipelines import Pipeline
from ..core.events import Observer
from ..library.fits import Wanted, named
from ..library.library import Library
from .settings import Choice, GenerateConfig
from .tags import Shelf, Tag

if TYPE_CHECKING:
    from ..library.events import Chosen


class Retrieval:
    """Chooses adapters of a library for prompts, each prompt's once.

    Args:
        library: The library.
        count: How many for each prompt, at most.
        wanted: The base that they have to fit.
        given: Adapters that every prompt is drawn with already.
        tell: Is told what was chosen, and why.
    """

    def __init__(self, library: Library, count: int, wanted: Wanted, given: Sequence[Choice], tell: Observer) -> None:
        self._library = library
        self._count = count
        self._wanted = wanted
        self._given = [choice.path for choice in given]
        self._tell = tell
        self._known: dict[tuple[str, tuple[Path, ...]], Chosen] = {}

    def choose(self, prompt: str, used: Sequence[Path], shelf: Shelf) -> tuple[str, tuple[Tag, ...]]:
        """Choose adapters for a prompt.

        Args:
            prompt: As it is drawn.
            used: The files of adapters that its picture is drawn with beside those that are given.
            shelf: Where adapters are found; takes those that are chosen.

        Returns:
            The prompt with the triggers that it lacked, and the adapters that were chosen.

        Raises:
            UserError: The library cannot be read.
        """
        key = prompt, tuple(used)
        if key not in self._known:
            self._known[key] = self._library.choose(
                prompt, self._count, base=self._wanted, without=[*self._given, *used], observers=[self._tell]
            )
        chosen, tags = self._known[key], []
        for one in chosen.found:
            name = str(one.entry.path)
            shelf.chosen[name] = Choice(one.entry.path)
            tags.append(Tag(name, one.strength, one.strength))
        return chosen.prompt, tuple(tags)


@contextmanager
def retrieval(
    config: GenerateConfig, pipe: Pipeline | None, given: Sequence[Choice], tell: Observer
) -> Iterator[Retrieval | None]:
    """Open the library that adapters are chosen from, and close it at the end.

    Args:
        config: What was asked for.
        pipe: A base that is loaded already; None for the one that is named.
        given: The adapters that are given.
        tell: Is told what is chosen.

    Yields:
        What chooses; None where nothing is to be chosen.

    Raises:
        UserError: There is no library, or no such base.
    """
    if config.auto is None:
        yield None
        return
    wanted = named(config.base) if pipe is None else Wanted.of(asdict(describe(pipe)))
    if config.prediction != "auto":
        wanted = wanted._replace(prediction=PREDICTIONS[config.prediction])
    with Library(config.library, make=False) as library:
        yield Retrieval(library, config.auto, wanted, given, tell)
