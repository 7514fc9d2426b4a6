"""What a component of a base carries: the one place where the truth about its adapters stands.

It hangs on the component itself, in the slots of its sites. So every pipeline that shares the component sees the same, and a
copy of the component has a copy of it.
"""

import copy
import time
import weakref
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from .slab import Slab
from .strength import Strengths

_Target = TypeVar("_Target")


@dataclass(frozen=True)
class Entry:
    """An adapter on a component.

    Attributes:
        since: When it was attached, in nanoseconds since the epoch: the smaller number came first.
        info: Where it came from, as whoever loaded it says; None where it was attached without a file.
    """

    since: int
    info: object | None = None


@dataclass(frozen=True)
class Word:
    """A placeholder, or a soft prompt, that an adapter of a text encoder or language model teaches its tokenizers.

    Attributes:
        owner: The name of the adapter; None where it is gone, and only the numbers are still kept for it.
        tokens: The names of its tokens, the first being the placeholder itself.
        ids: Their numbers, which are greater than any vocabulary has.
        block: The index of the block that the token embedding lies in, of ``Strengths.blocks``.
        precedes: Whether it is a soft prompt, which stands before every prompt unless its strength is 0.
    """

    owner: str | None
    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    block: int
    precedes: bool

    def given_up(self) -> "Word":
        """Keep the numbers of a word whose adapter is gone: those of other words come after them.

        Returns:
            The same without an owner, under names that no text holds.
        """
        return replace(self, owner=None, tokens=tuple(f"\0{number}" for number in self.ids))


class ComponentState(nn.Module):
    """The adapters of one component: strengths, schedules, whether they are merged, where they came from, their words.

    Attributes:
        strengths: What is applied of each adapter. Its rows are the adapters, in the order of attachment.
        entries: What else is known of each adapter, by name.
        words: What the adapters teach tokenizers, as ``bases.words.teach`` last found it. Tokenizers read it here.
        slab: The pairs of low rank of all sites, where ``site.pack`` put them.
    """

    strengths: Strengths
    slab: Slab

    def __init__(self, blocks: tuple[str, ...], device: torch.device) -> None:
        super().__init__()
        self.strengths = Strengths(blocks, device)
        self.slab = Slab(device)
        self.entries: dict[str, Entry] = {}
        self.words: tuple[Word, ...] = ()
        self._replaced: dict[tuple[str, str], tuple[Any, Any]] = {}  # by path and attribute: its own value, and ours

    def add(self, name: str) -> None:
        """Make room for an adapter, at strength 1, behind the others.

        Args:
            name: What it is called.
        """
        self.strengths.add(name)
        # By the clock, as components are shared by pipelines that know nothing of each other; which may be set back.
        last = max((entry.since for entry in self.entries.values()), default=0)
        self.entries[name] = Entry(max(time.time_ns(), last + 1))

    def remove(self, name: str) -> None:
        """Forget an adapter and its words. Their numbers stay taken until ``bases.words.teach`` is called.

        Args:
            name: What it is called.
        """
        self.strengths.remove(name)
        del self.entries[name]
        self.words = tuple(word.given_up() if word.owner == name else word for word in self.words)

    def enter(self, name: str, info: object) -> None:
        """Say where an adapter came from.

        Args:
            name: What it is called.
            info: What whoever loaded it knows of it.
        """
        self.entries[name] = replace(self.entries[name], info=info)

    def replace_attribute(self, component: nn.Module, path: str, attribute: str, value: object) -> None:
        """Give a module of the component another value for an attribute, for as long as adapters need it.

        Args:
            component: The component that this is the state of.
            path: The path of the module in it.
            attribute: The name of the attribute, which the module has.
            value: The new value.
        """
        module = component.get_submodule(path)
        own, _ = self._replaced.get((path, attribute), (getattr(module, attribute), None))
        self._replaced[path, attribute] = (own, value)
        setattr(module, attribute, value)

    def forget_words(self, component: nn.Module) -> None:
        """Teach tokenizers nothing more, and give modules of the component their own attributes back.

        An attribute that somebody else has changed since keeps that change.

        Args:
            component: The component whose state this is.
        """
        self.words = ()
        for (path, attribute), (own, ours) in self._replaced.items():
            module = component.get_submodule(path)
            if getattr(module, attribute) == ours:
                setattr(module, attribute, own)
        self._replaced = {}


class Link(Generic[_Target]):
    """A weak reference that can be copied.

    In a copy it refers to what was copied together with it, and where that was not, to the same as before. Without a target
    that lives it gives None.
    """

    def __init__(self, *targets: _Target) -> None:
        self._targets = tuple(weakref.ref(target) for target in targets)

    def __call__(self) -> _Target | None:
        """The first target that lives."""
        return next((found for target in self._targets if (found := target()) is not None), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Link[_Target]":
        target = self()
        # The copy lives on if what owns the target is copied too, be it before this or after; else only until all is copied.
        return Link() if target is None else Link(copy.deepcopy(target, memo), target)

    def __reduce__(self) -> tuple[Any, ...]:
        target = self()
        return Link, () if target is None else (target,)
