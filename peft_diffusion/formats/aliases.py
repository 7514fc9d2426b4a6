"""What other programs call the tensors of methods, as the methods declare it. Imports no torch."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

from .. import methods
from ..core.method import Method

if TYPE_CHECKING:
    from torch import Tensor

_LONGEST = 8  # words with dots between them in an end
# The oldest scripts of diffusers named a part of the attention's processor.
_PROCESSOR = re.compile(r"(.*)\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")


@dataclass(frozen=True)
class Aliases:
    """The aliases of all methods.

    Attributes:
        suffixes: What each alias means.
        methods: The first method that has an alias.
        ranked: The suffixes of tensors whose first size is the rank.
        own: All suffixes.
        end: Finds an alias at the end of a name.
    """

    suffixes: Mapping[str, str]
    methods: Mapping[str, type[Method]]
    ranked: frozenset[str]
    own: frozenset[str]
    end: re.Pattern[str]

    def meaning(self, end: str) -> "tuple[str, Callable[[Tensor], Tensor] | None]":
        """Tell which tensor of a method the end of a name means.

        Args:
            end: What stands behind a site's name and its dot.

        Returns:
            The method's suffix, or the end itself where no method has such an alias; and what brings the tensor into the
            method's shape, None where it is so already.
        """
        match = None if end in self.own else self.end.fullmatch(end)
        if match is None:
            return end, None
        alias = match[1]
        return self.suffixes[alias], partial(self.methods[alias].from_alias, alias)

    def parts(self, name: str) -> tuple[str, str] | None:
        """Part a name that keeps the dots of a path.

        Args:
            name: The name of a tensor.

        Returns:
            The path with all that stands before it, and the end, for ``meaning``; None where no method has such an end.
        """
        if match := _PROCESSOR.fullmatch(name):
            return f"{match[1]}.{match[2]}{'.0' if match[2] == 'to_out' else ''}", f"lora.{match[3]}.weight"
        words = name.split(".")
        for number in range(1, min(len(words) - 1, _LONGEST)):  # of several ends the shortest
            end = ".".join(words[-number:])
            if self.end.fullmatch(end):
                return ".".join(words[:-number]), end
        return None


def aliases() -> Aliases:
    """Collect the aliases of all methods that are known now."""
    return _aliases_of(tuple(methods.known().values()))


@cache
def _aliases_of(known: tuple[type[Method], ...]) -> Aliases:
    suffixes = {alias: suffix for one in known for alias, suffix in one.aliases.items()}
    owners = {alias: one for one in reversed(known) for alias in one.aliases}
    kinds = "|".join(re.escape(alias) for alias in sorted(suffixes, key=len, reverse=True)) or r"(?!)"
    ranked = frozenset[str]().union(*(one.ranked for one in known))
    own = frozenset[str]().union(*(one.suffixes for one in known))
    return Aliases(suffixes, owners, ranked, own, re.compile(rf"({kinds})(?:\.default)?(?:\.weight)?"))
