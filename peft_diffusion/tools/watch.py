"""How far a tool is, how long it takes, and how much memory it holds."""

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

from ..core.events import Ended, Observer, observed, progress
from ..core.peak_memory import peak_memory
from .results import LayerError, Made, OutputError

Item = TypeVar("Item")


_SITES = 16  # after so many memory is given back, which takes a millisecond


def _give_back() -> None:
    """Give memory that C's library keeps back to the system: between results lie holes of what was let go."""
    trim = getattr(_library(), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)


@cache
def _library() -> object:
    import ctypes

    return ctypes.CDLL(None) if sys.platform == "linux" else None


class Watch:
    """What a tool tells while it works.

    Args:
        tell: Is told.
    """

    def __init__(self, tell: Observer) -> None:
        self.tell = tell
        self._start = time.monotonic()

    def ticks(self, what: str) -> Callable[[int, int], None]:
        """Make what is called with how many are done, and of how many. It gives back memory that nobody holds.

        Args:
            what: What is done, in words.

        Returns:
            The function to call.
        """
        tell = progress(self.tell, what)

        def tick(done: int, total: int) -> None:
            tell(done, total)
            if done % _SITES == 0:
                _give_back()

        return tick

    def each(self, what: str, given: Collection[Item]) -> Iterator[Item]:
        """Go through things, and tell how many are done.

        Args:
            what: What is done, in words.
            given: The things.

        Yields:
            Each of them.
        """
        tick = self.ticks(what)
        for number, one in enumerate(given):
            tick(number, len(given))
            yield one
        tick(len(given), len(given))

    def made(
        self,
        path: Path,
        sites: int,
        errors: Sequence[LayerError] = (),
        *,
        outputs: Sequence[OutputError] = (),
        last: bool = True,
    ) -> Made:
        """Say what came of it.

        Args:
            path: The file, or the folder.
            sites: How many sites it holds.
            errors: Of each site whose rank was reduced.
            outputs: Of each site and adapter, where outputs were matched.
            last: Whether nothing more comes of it.

        Returns:
            That, with time and memory.
        """
        found = Made(path, sites, tuple(errors), peak_memory(), time.monotonic() - self._start, tuple(outputs))
        if last:
            self.tell(Ended("finished", found))
        return found


@contextmanager
def watched(observers: Sequence[Observer]) -> Iterator[Watch]:
    """A tool at work inside.

    Args:
        observers: Are told `core.events.Progress`, notes and warnings, and `Ended` last.

    Yields:
        What tells them.
    """
    with observed(observers) as tell:
        yield Watch(tell)
