"""Adapters that stay with a base from one call to the next, so that the next one reads no file that this one has read."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..bases.pipelines import Pipeline
from ..core.errors import UserError
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
        self._users: Counter[Key] = Counter()  # of calls that joined one under way

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

    def join(self, choices: Sequence[Choice], *, strict: bool, warn: Callable[[str], None]) -> list[str]:
        """Put the adapters of a call on the base beside those of others under way, which may have the same.

        Args:
            choices: The adapters of the call.
            strict: As for `load`.
            warn: As for `load`.

        Returns:
            Their names on the base. Their strengths are for the call to set.

        Raises:
            UserError: As `load` does; or a file was replaced of which others still use what it was. Nothing is used then.
        """
        names: list[str] = []
        for number, choice in enumerate(choices):
            try:
                names.append(self._joined(choice, strict, warn))
            except BaseException:
                self.leave(choices[:number])
                raise
            self._users[choice.key] += 1
        return names

    def _joined(self, choice: Choice, strict: bool, warn: Callable[[str], None]) -> str:
        """The name of an adapter that others may have already. Raises UserError as `join` does."""
        held = self._files.get(choice.key)
        current = held is not None and held.plan.is_current()
        if held is not None and choice.key in self._in_use:
            if not current:
                raise UserError(f"{choice.path} was replaced while pictures are drawn with what it was")
            for warning in self.adapters[held.name].warnings:
                warn(warning)
            return held.name
        if held is not None and not current:
            self.adapters.remove(self._files.pop(choice.key).name)
        return self.load(choice, strict=strict, warn=warn)

    def leave(self, choices: Sequence[Choice]) -> None:
        """Take off the base what a call that joined has used, and no other that is under way; where none is, it stays.

        Args:
            choices: Its adapters.
        """
        self._users.subtract(choice.key for choice in choices)
        gone = [key for key, count in self._users.items() if count <= 0]
        names = [self._files[key].name for key in gone if key in self._files]
        for key in gone:
            del self._users[key]
        self._in_use.difference_update(gone)
        self.adapters.set(dict.fromkeys(names, 0.0))
        if not self._users:
            return
        teachers = self.adapters.teachers
        self.adapters.rest(*(name for name in names if name not in teachers))
        for key in [key for key in gone if key in self._files and self._files[key].name in teachers]:
            self.adapters.remove(self._files.pop(key).name)
        self._keep_to_budget()

    def _keep_to_budget(self) -> None:
        """Forget files that are not in use, and what waits of them, from the one used longest ago."""
        adapters, idle = self.adapters, [key for key in self._files if key not in self._in_use]
        room = self.budget - sum(file.plan.size for file in self._files.values())
        for key in idle:
            if room >= 0:
                break
            file = self._files.pop(key)
            room += file.plan.size
            if file.name in adapters.waiting:
                adapters.remove(file.name)

    def end(self) -> None:
        """Set what the call has used to 0, and keep of it what may be kept."""
        adapters = self.adapters
        self._in_use.clear()
        self._users.clear()
        adapters.set(dict.fromkeys(adapters.names, 0.0))
        teachers = adapters.teachers
        self._files = {key: file for key, file in self._files.items() if file.name not in teachers}
        self._keep_to_budget()
        kept = {file.name for file in self._files.values()}
        for name in adapters.names:
            if name not in kept:
                adapters.remove(name)
        if not self.stay:
            adapters.rest(*adapters.names)
