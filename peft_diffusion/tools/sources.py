"""Adapter files that a tool works on: bound to the skeleton of their base, and read one site at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from ..bases.base import Skeleton
from ..bases.skeleton import PUBLISHED
from ..core.adapter import Adapter
from ..core.errors import FoldError, UserError
from ..core.events import Observer, Warned
from ..core.weight_change import Change, change_of, with_weights
from ..formats import Plan
from ..formats.container import title, torch_dtype
from ..formats.file import DTYPES, Bound, bind
from ..formats.fitting import fitting
from ..formats.layout import SaveDtype
from .weights import Weights, open_weights

Where = tuple[str, str]
"""A component and the path of a site in it."""


@dataclass(frozen=True)
class Source:
    """An adapter file.

    Attributes:
        bound: Its sites.
        tensors: Its tensors, each read when it is asked for.
        weights: Those of the base, where they are at hand.
        strength: How much of it is meant; 1 is as trained.
    """

    bound: Bound
    tensors: Mapping[str, Tensor]
    weights: Weights | None = None
    strength: float = 1.0

    @property
    def path(self) -> Path:
        """The file."""
        return self.bound.plan.path

    @property
    def name(self) -> str:
        """What a person calls it: the file's name without the ending, or that of its folder."""
        return title(self.path)

    @property
    def plan(self) -> Plan:
        """What it holds."""
        return self.bound.plan

    @property
    def sites(self) -> tuple[Where, ...]:
        """Its sites, in the order of the file."""
        return tuple(self.bound.sites)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds all its numbers, but for those of single ones such as alphas."""
        entries = [entry for entry in self.plan.header.tensors.values() if entry.shape not in ((), (1,))]
        kinds = {torch_dtype(entry) for entry in entries} if self.plan.loaded is None else set()
        kinds |= {tensor.dtype for tensor in (self.plan.loaded or {}).values() if tensor.numel() > 1}
        floats = [kind for kind in kinds if kind.is_floating_point and kind.itemsize > 1]
        return joined_dtype(floats)

    def module(self, where: Where) -> nn.Module:
        """Give the module of a site.

        Args:
            where: The site.

        Returns:
            The module, with its weights where they are at hand.
        """
        component, path = where
        bare = self.bound.parts[component].get_submodule(path)
        return bare if self.weights is None else with_weights(bare, self.weights.of_module(component, path))

    def adapter(self, where: Where, module: nn.Module | None = None) -> Adapter:
        """Read the adapter of a site.

        Args:
            where: The site.
            module: What it is built for; None: the site's module.

        Returns:
            The adapter.

        Raises:
            UserError: The file is damaged.
        """
        built = self.bound.build(*where, self.tensors, self.module(where) if module is None else module)
        if built is None:
            raise UserError(f"{self.path}: {'.'.join(where)} holds no adapter of a method that is known here")
        return built

    def opened(self, where: Where) -> tuple[Adapter, Change | None]:
        """Read the adapter of a site, and tell what it changes at strength 1.

        Args:
            where: The site.

        Returns:
            The adapter, and the change of weight and bias; None where it is none of these.

        Raises:
            UserError: The change depends on a weight that is not at hand, or the file is damaged.
        """
        module = self.module(where)
        adapter = self.adapter(where, module)
        try:
            return adapter, change_of(adapter, module, f"{self.path}: {'.'.join(where)}")
        except FoldError:
            return adapter, None


def file_dtype(sources: Sequence[Source], chosen: SaveDtype | None) -> torch.dtype:
    """Choose the dtype of a file that is made of others.

    Args:
        sources: The files.
        chosen: What a person chose; None for nothing.

    Returns:
        That, or the dtype that holds the numbers of all files.
    """
    return joined_dtype([one.dtype for one in sources]) if chosen is None else DTYPES[chosen]


def joined_dtype(kinds: Sequence[torch.dtype]) -> torch.dtype:
    """Choose the dtype that holds numbers of several.

    Args:
        kinds: Dtypes of floating-point numbers.

    Returns:
        The narrowest that loses nothing; float32 of none, and instead of float64.
    """
    found = reduce(torch.promote_types, kinds) if kinds else torch.float32
    return torch.float32 if found == torch.float64 else found


def open_sources(
    plans: Sequence[Plan], base: str | None, tell: Observer, strengths: Sequence[float] | None = None
) -> tuple[list[Source], Skeleton]:
    """Bind adapter files to the skeleton of the base that they are for.

    Args:
        plans: What the files hold.
        base: Their base, as a person names it, with its weights where there are some; None: by what the files hold.
        tell: Is told what of a file is left out.
        strengths: Of each file; None: 1 of all.

    Returns:
        The files, and the skeleton.

    Raises:
        UserError: The base is not known, or a file is for another one than the others.
    """
    weights = None if base is None or base in PUBLISHED else open_weights(base)
    largest = max(plans, key=lambda one: sum(map(len, one.sites.values())))
    bones = fitting(largest, base) if weights is None else weights.skeleton
    named = f"{bones.info.name!r}, which {largest.path} is for; take files of one base, or name the base with --base"
    return bind_sources(plans, bones, weights, named, tell, strengths), bones


def bind_sources(
    plans: Sequence[Plan],
    bones: Skeleton,
    weights: Weights | None,
    named: str,
    tell: Observer,
    strengths: Sequence[float] | None = None,
) -> list[Source]:
    """Bind adapter files to a skeleton.

    Args:
        plans: What the files hold.
        bones: The skeleton of their base.
        weights: Of the base, where they are at hand.
        named: What errors call the base, and what they advise.
        tell: Is told what of a file is left out.
        strengths: Of each file; None: 1 of all.

    Returns:
        The files.

    Raises:
        UserError: A file has no site in the base.
    """
    given = [1.0] * len(plans) if strengths is None else strengths
    sources = [Source(bind(one, bones), one.stored(), weights, strength) for one, strength in zip(plans, given, strict=True)]
    for source in sources:
        if not source.sites:
            raise UserError(f"{source.path} has no site in the base {named}")
        for warning in source.bound.warnings:
            tell(Warned(warning))
    return sources
