"""Adapters that stay with a base from one call to the next, so that the next one reads no file that this one has read."""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..bases.pipelines import Pipeline
from ..formats import Plan
from .adapters import Adapters
from .settings import Choice, Key


class _File(NamedTuple):
    """A file that is kept: its adapter's name on the base, and what was parsed of it, by which a change of it is seen."""

    name: str
    plan: Plan


class Kept:
    """The adapters that calls have used, on one base.

    During a call the base carries the adapters of that call alone, in its order: others would cost time at each step though
    their strength is 0, and numbers that are not finite would spoil pictures that do not name them. After it they stay
    where they are, at strength 0, and leave for the memory of the host when another call has no use for them. Adapters that
    teach words, or stand before every prompt, act whatever their strength, and are not kept.

    A file that was replaced is read anew.

    Args:
        pipe: The base. It carries no adapters.
        budget: The most bytes that are kept, as the files hold them; what was used longest ago goes first. 0 keeps nothing.
        stay: Whether the adapters of a call stay on the base after it; if not they wait in memory at once, as a base needs
            whose parts are moved between host and card.

    Attributes:
        adapters: Those of the base. Its ``loads`` tells how many times a file was read.

    Raises:
        UserError: It is no base that takes adapters.
    """

    def __init__(self, pipe: Pipeline, budget: int, *, stay: bool = True) -> None:
        self.adapters = Adapters(pipe, budget=sys.maxsize)  # what a call uses is never refused; `end` keeps to the budget
        self.budget = budget
        self.stay = stay
        self._files: dict[Key, _File] = {}  # what was used last stands last
        self._in_use: set[Key] = set()

    def begin(self, choices: Sequence[Choice]) -> None:
        """Take off the base what a call has no use for, and forget those of its files that were replaced.

        Args:
            choices: The adapters of the call, in the order in which `load` will be asked for them.

        Raises:
            UserError: A file is gone.
        """
        for key in (choice.key for choice in choices):
            if key in self._files and not self._files[key].plan.is_current():
                self.adapters.remove(self._files.pop(key).name)
        wanted = [self._files[choice.key].name if choice.key in self._files else None for choice in choices]
        present = self.adapters.names
        # Sums in another order are rounded otherwise, so only what comes first in both stays.
        alike = next((n for n, (a, b) in enumerate(zip(present, wanted, strict=False)) if a != b), len(wanted))
        self.adapters.rest(*present[alike:])

    def load(self, choice: Choice, *, strict: bool, warn: Callable[[str], None]) -> str:
        """Put an adapter on the base, from its file where it is not kept.

        Args:
            choice: The adapter, and how much of it.
            strict: As for `Adapters.load`.
            warn: As for `Adapters.load`; of one that is kept it is told the same again.

        Returns:
            Its name on the base.

        Raises:
            UserError: As `Adapters.load` does.
        """
        found = None if choice.key in self._in_use else self._files.pop(choice.key, None)
        if found is None:
            plan = choice.parsed()
            name = self.adapters.load(plan, None, choice.amount, strict=strict, warn=warn)
            found = _File(name, plan)
        else:
            self._files[choice.key] = found
            self.adapters.set({found.name: choice.amount})
            for warning in self.adapters[found.name].warnings:
                warn(warning)
        self._in_use.add(choice.key)
        self._files.setdefault(choice.key, found)
        return found.name

    def end(self) -> None:
        """Set what the call has used to 0, and keep of it what may be kept."""
        adapters = self.adapters
        self._in_use.clear()
        adapters.set(dict.fromkeys(adapters.names, 0.0))
        teachers = adapters.teachers
        self._files = {key: file for key, file in self._files.items() if file.name not in teachers}
        room = self.budget - sum(file.plan.size for file in self._files.values())
        for key in list(self._files):
            if room >= 0:
                break
            file = self._files.pop(key)
            room += file.plan.size
            if file.name in adapters.waiting:
                adapters.remove(file.name)
        kept = {file.name for file in self._files.values()}
        for name in adapters.names:
            if name not in kept:
                adapters.remove(name)
        if not self.stay:
            adapters.rest(*adapters.names)
