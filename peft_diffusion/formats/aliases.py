"""What other programs call the tensors of methods, as the methods declare it. Imports no torch."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING

from .. import methods
from ..core.method import Method
from .layout import Whole
from .names import SETTLED

if TYPE_CHECKING:
    from torch import Tensor

_KEPT = 10_000  # names whose parts are remembered
_LONGEST = 8  # words with dots between them in an end
_JOINED = re.compile(r"(.+)_lora\.(down|up)\.weight")  # of the oldest scripts of diffusers: ``<path>_lora.down.weight``
# What peft trained has the adapter's name behind the tensor's in a state dict: ``lora_A.style.weight``.
_NO_ADAPTER = ("weight", "bias")


@dataclass(frozen=True)
class Parts:
    """The parts of a name that keeps the dots of a path.

    Attributes:
        where: The path, with all that stands before it.
        end: What its method calls the tensor, for `Aliases.meaning`.
        adapter: The name that the adapter had in peft; "" where the name of the tensor tells none.
    """

    where: str
    end: str
    adapter: str = ""


@dataclass(frozen=True)
class Meaning:
    """What the end of a name means.

    Attributes:
        suffix: What the method calls the tensor.
        change: What brings it into the method's shape; None where it is so already.
        whole: How a weight itself becomes a change; None where it is one.
    """

    suffix: str
    change: "Callable[[Tensor], Tensor] | None" = None
    whole: Whole | None = None


@dataclass(frozen=True)
class Aliases:
    """The aliases of all methods.

    Attributes:
        suffixes: What each alias means.
        methods: The first method that has an alias.
        ranked: The suffixes of tensors whose first size is the rank.
        own: All suffixes.
        constants: The suffixes of scales and marks.
        end: Finds an alias at the end of a name.
        replacing: The aliases of weights that take the place of the base's.
    """

    suffixes: Mapping[str, str]
    methods: Mapping[str, type[Method]]
    ranked: frozenset[str]
    own: frozenset[str]
    constants: frozenset[str]
    end: re.Pattern[str]
    replacing: frozenset[str] = frozenset()
    _parted: "dict[str, Parts | None]" = field(default_factory=dict, compare=False, repr=False)

    def meaning(self, end: str) -> "Meaning":
        """Tell which tensor of a method the end of a name means.

        Args:
            end: What stands behind a site's name and its dot.

        Returns:
            What it means; of an end that no method has as an alias, that it is itself a suffix.
        """
        match = None if end in self.own else self.end.fullmatch(end)
        if match is None:
            return Meaning(end)
        alias = match[1]
        owner = self.methods[alias]
        as_it_is = getattr(owner.from_alias, "__func__", None) is getattr(Method.from_alias, "__func__", owner)
        change = None if as_it_is else partial(owner.from_alias, alias)
        return Meaning(self.suffixes[alias], change, Whole("weight") if alias in self.replacing else None)

    def parts(self, name: str) -> "Parts | None":
        """Part a name that keeps the dots of a path.

        Args:
            name: The name of a tensor.

        Returns:
            Its parts; None where no method has such an end.
        """
        if name not in self._parted:  # several layouts ask for the same name one after the other
            if len(self._parted) >= _KEPT:
                self._parted.clear()
            self._parted[name] = self._parts(name)
        return self._parted[name]

    def _parts(self, name: str) -> "Parts | None":
        if match := _JOINED.fullmatch(name):
            return Parts(match[1], f"lora.{match[2]}.weight")
        words = name.split(".")
        ends = [(words[:-number], words[-number:]) for number in range(1, min(len(words) - 1, _LONGEST))]
        for where, end in ends:  # of several ends the shortest
            if self.end.fullmatch(".".join(end)):
                return Parts(".".join(where), ".".join(end), "default" if "default" in end else "")
        for where, (kind, *rest) in ends:
            if not rest or rest[0] in _NO_ADAPTER or self.suffixes.get(kind) in self.constants:
                continue
            end = [kind, *rest[1:]]
            if self.end.fullmatch(".".join(end)):
                return Parts(".".join(where), ".".join(end), rest[0])
        return None


def aliases() -> Aliases:
    """Collect the aliases of all methods that are known now. It is asked for with every name of a file."""
    global _latest
    if SETTLED.aliases is not None:
        return SETTLED.aliases
    now, (before, found) = tuple(methods.known().values()), _latest
    if found is None or now != before:
        found = _aliases_of(now)
        _latest = now, found
    if SETTLED.rows is not None:  # a file's names are gone through
        SETTLED.aliases = found
    return found


_latest: "tuple[tuple[type[Method], ...], Aliases | None]" = ((), None)


@cache
def _aliases_of(known: tuple[type[Method], ...]) -> Aliases:
    suffixes = {alias: suffix for one in known for alias, suffix in one.aliases.items()}
    owners = {alias: one for one in reversed(known) for alias in one.aliases}
    kinds = "|".join(re.escape(alias) for alias in sorted(suffixes, key=len, reverse=True)) or r"(?!)"
    ranked = frozenset[str]().union(*(one.ranked for one in known))
    own = frozenset[str]().union(*(one.suffixes for one in known))
    constants = frozenset[str]().union(*(one.constants for one in known))
    replacing = frozenset[str]().union(*(one.replacing for one in known))
    end = re.compile(rf"({kinds})(?:\.default)?(?:\.weight)?")
    return Aliases(suffixes, owners, ranked, own, constants, end, replacing)
