"""Adapters in three tiers: on the base, waiting in the memory of the host, and waiting in their files."""

from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import UserError
from ..formats import Loaded, Plan


@dataclass
class Known:
    """An adapter of which more is known than what is on the base.

    Attributes:
        plan: What its file holds.
        told: What is said of it, as ``Adapters[name]`` gives it.
        strict: Whether a file is refused of which a tensor is left out.
        read: What was read of the file; None where that is to be read again.
        coming: What another thread reads of it; None where none does.
    """

    plan: Plan
    told: Any
    strict: bool
    read: Loaded | None = None
    coming: "Future[Loaded] | None" = None

    @property
    def size(self) -> int:
        """Bytes of its tensors, as the file holds them."""
        return self.plan.size

    @property
    def held(self) -> int:
        """Bytes of it in the memory of the host."""
        return 0 if self.read is None else self.size


@dataclass
class Tiers:
    """Which adapters are on the base, which wait, and which leave first.

    Attributes:
        budget: Bytes of the adapters on the base, as their files hold them.
        host_budget: The same of those that wait in memory; None for no limit.
        load: Reads a plan.
        lift: Puts what was read on the base, under a name, at strength 0.
        lower: Takes an adapter off the base.
        evictions: How many times one left the base for lack of room.

    Raises:
        UserError: A budget is no number of bytes.
    """

    budget: int
    host_budget: int | None
    load: Callable[[Plan, bool], Loaded]
    lift: Callable[[str, Known, Loaded], None]
    lower: Callable[[str], None]
    evictions: int = 0
    _known: dict[str, Known] = field(default_factory=dict)  # what was used last stands last
    _up: set[str] = field(default_factory=set)
    _reader: ThreadPoolExecutor | None = None

    def __post_init__(self) -> None:
        for name, value in (("budget", self.budget), ("host_budget", self.host_budget)):
            if value is not None and value < 0:
                raise UserError(f"{name} is a number of bytes, not {value}")

    @property
    def waiting(self) -> tuple[str, ...]:
        """Those that are not on the base, from the one that was used longest ago."""
        return tuple(name for name in self._known if name not in self._up)

    def told(self, name: str) -> Any:
        """Say of an adapter that waits what ``Adapters[name]`` does.

        Args:
            name: What it is called.

        Returns:
            That; None for any other.
        """
        return self._known[name].told if name in self._known and name not in self._up else None

    def enter(self, name: str, known: Known, *, up: bool) -> None:
        """Know of an adapter that was loaded.

        Args:
            name: What it is called.
            known: What is known of it.
            up: Whether it is on the base.
        """
        self._known[name] = known
        (self._up.add if up else self._up.discard)(name)
        self._spare()

    def forget(self, name: str) -> None:
        """Know of an adapter no more.

        Args:
            name: What it is called; it may be one that was never known.
        """
        self._known.pop(name, None)
        self._up.discard(name)

    def touch(self, names: Iterable[str]) -> None:
        """Note that adapters are used now.

        Args:
            names: What they are called.
        """
        for name in names:
            if name in self._known:
                self._known[name] = self._known.pop(name)

    def has_room(self, size: int, idle: Collection[str]) -> bool:
        """Make room on the base.

        Args:
            size: How many bytes.
            idle: The adapters that may leave.

        Returns:
            Whether there is; where not, none has left.
        """
        leaving: list[str] = []
        free = self.budget - sum(self._known[name].size for name in self._up)
        for name in (one for one in self._known if one in self._up and one in idle):
            if free >= size:
                break
            leaving.append(name)
            free += self._known[name].size
        if free < size:
            return False
        for name in leaving:
            self.rest(name)
            self.evictions += 1
        return True

    def rest(self, name: str) -> None:
        """Take an adapter off the base, to wait.

        Args:
            name: What it is called.
        """
        self.lower(name)
        self._up.discard(name)
        read = self._known[name].read
        if read is not None and read.components:  # modules that have been on the base
            self._let_go(self._known[name])
        self._spare()

    def no_room(self, name: str, size: int) -> UserError:
        """Say that those in use leave no room for an adapter.

        Args:
            name: What it is called.
            size: Its bytes.

        Returns:
            The error to raise.
        """
        return UserError(
            f"the adapter {name!r} has no room beside those in use: {size:,} bytes, of a budget of {self.budget:,}; set"
            " others to 0 first, load it at strength 0, or take a larger budget"
        )

    def bring(self, name: str, idle: Collection[str]) -> None:
        """Put an adapter that waits on the base.

        Args:
            name: What it is called.
            idle: The adapters that may leave.

        Raises:
            UserError: It has no room beside those in use, or its file cannot be read any more.
        """
        known = self._known[name]
        if not self.has_room(known.size, idle):
            raise self.no_room(name, known.size)
        coming, known.coming = known.coming, None
        read = known.read if coming is None else coming.result()
        read = self.load(known.plan, known.strict) if read is None else read
        self.lift(name, known, read)
        known.read = read
        self._up.add(name)

    def prefetch(self, name: str) -> None:
        """Begin to read an adapter that waits in its file, on another thread.

        Args:
            name: What it is called.
        """
        known = self._known[name]
        if known.read is None and known.coming is None and name not in self._up:
            self._reader = self._reader or ThreadPoolExecutor(1, "adapters")
            known.coming = self._reader.submit(self.load, known.plan, known.strict)

    def _spare(self) -> None:
        """Keep to the budget of the host."""
        if self.host_budget is None:
            return
        held = [self._known[name] for name in self.waiting]
        total = sum(one.held for one in held)
        for one in held:
            if total <= self.host_budget:
                break
            total -= one.held
            self._let_go(one)

    @staticmethod
    def _let_go(known: Known) -> None:
        known.read = None
        known.plan.let_go()
