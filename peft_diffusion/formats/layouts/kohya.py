"""The kohya / LyCORIS layout, which ComfyUI, A1111, diffusers and the trainers read. It is the default of this package.

Each site is ``<prefix><path with _ for .>``, its tensors ``<site>.<suffix>``. See ``networks/lora.py`` of kohya's
sd-scripts and ``lycoris/modules`` of LyCORIS. What it cannot say stands beside it under keys of our own, with the path as it
is: ``peft_diffusion.<component>.<path>.<suffix>``; new words as the layout ``embedding`` has them.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, ClassVar

from ... import methods
from ...bases import family as families
from ...core.errors import UserError
from .. import metadata
from ..aliases import aliases
from ..container import Header
from ..layout import Content, Layout, Place, Reading, Written, register
from ..names import LYCORIS, OWN, Rows, claimants, known_rows, length_of, prefixes, with_text_model, written_prefix
from . import embedding

if TYPE_CHECKING:
    from torch import Tensor

Spelling = Callable[[str, str], str]
"""Spells the path of a module of a component as a file does, with its dots."""

Stem = Callable[[str, str], str]
"""Gives what the names of a site's tensors begin with, by its component and path, without the dot behind it."""


class Kohya(Layout):
    """Flat names, as kohya's trainer and LyCORIS write them."""

    name: ClassVar[str] = "kohya"
    told_by: ClassVar[frozenset[str] | None] = frozenset()

    def claims(self, name: str) -> int | None:
        """Names that begin with a component's prefix, with LyCORIS' own, or with ours."""
        starts = _starts(known_rows())
        if not name.startswith(starts):  # asked for the names of all layouts
            return None
        return length_of(name, starts)

    def read(self, header: Header, names: Sequence[str]) -> Reading:
        """By the names alone."""
        return read(names)

    def write(self, content: Content) -> Written:
        """All that there is to say."""
        return write(content, flat(content, with_text_model))


def read(names: Sequence[str]) -> Reading:
    """Find the places of flat names.

    Args:
        names: Of tensors.

    Returns:
        Their places.
    """
    places: dict[str, Place] = {}
    leftovers: dict[str, str] = {}
    for name in names:
        place = _own_place(name) if name.startswith(OWN) else _place(name)
        if place is None:
            leftovers[name] = "name no component and site that are known here"
        else:
            places[name] = place
    return Reading(places, leftovers)


def flat(content: Content, spelling: Spelling) -> Stem:
    """Give the names of kohya's trainer: a component's prefix, and the path with underscores.

    Args:
        content: What a file is to hold.
        spelling: How it spells paths.

    Returns:
        What the names of a site begin with.
    """
    family = str(content.spec.base.get("family", ""))
    return lambda component, path: written_prefix(component, family) + spelling(component, path).replace(".", "_")


def write(content: Content, stem: Stem, *, words_alone: bool = True) -> Written:
    """Make a file of the tensors that kohya's trainer and LyCORIS have.

    Args:
        content: What it is to hold.
        stem: What the names of a site begin with.
        words_alone: Whether new words without anything else are named as files of words alone, and not as in a bundle.

    Returns:
        The tensors and metadata.
    """
    tensors: dict[str, Tensor] = {}
    rest, words = embedding.parted(content)
    for component, path, part in rest:
        site = f"{OWN}{component}.{path}" if part.own_layout else stem(component, path)
        tensors.update({f"{site}.{suffix}": tensor for suffix, tensor in part.state().items()})
    kernels = any(map(_has_kernel, tensors.items()))
    learned = embedding.written(words, alone=words_alone and not tensors)
    told = metadata.of_kohya(content.spec, kernels) | dict(learned.metadata)
    return Written(tensors | dict(learned.tensors), told, needed=learned.needed)


def refuse_own(layout: str, content: Content) -> None:
    """Refuse what no published layout can say, for a layout that has no names of ours beside its own.

    Args:
        layout: What it is called.
        content: What a file is to hold.

    Raises:
        UserError: There is such a part; says where and of which method.
    """
    from ...core.adapter import method_of

    for component, path, part in embedding.parted(content)[0]:
        if part.own_layout:
            raise UserError(
                f"{component}.{path} carries {method_of(part)}, which no other program has, and the layout {layout!r} cannot"
                f" say it; take the layout {Kohya.name!r}, which keeps it under a name of its own"
            )


@cache
def _starts(known: Rows) -> tuple[str, ...]:
    """What flat names begin with, the longest first."""
    return tuple(sorted((OWN, LYCORIS, *prefixes()), key=len, reverse=True))


def _place(name: str) -> Place | None:
    stem, end = _parted(name)
    site = stem.replace(".", "_")
    found, path = _located(known_rows(), site)
    if not found:
        return None
    told, named = aliases().meaning(end), not site.startswith(LYCORIS)
    return Place(found[0], path, told.suffix, "", found[1:], named, told.change, stem, whole=told.whole)


@lru_cache(maxsize=4096)  # files name a site once for each tensor
def _located(known: Rows, site: str) -> tuple[tuple[str, ...], str]:
    """The components that a flat name of a site may mean, and its path there."""
    if site.startswith(LYCORIS):
        path = site.removeprefix(LYCORIS)
        return (claimants(path) if path else ()), path
    start, component = max(((start, one) for start, one in prefixes().items() if site.startswith(start)), key=_length)
    return (component,), site.removeprefix(start)


def _parted(name: str) -> tuple[str, str]:
    """The site of a flat name, and the end. diffusers' export for kohya leaves dots in the names of DoRA's sites."""
    site, _, end = name.partition(".")
    known = aliases()
    if end in known.own or known.end.fullmatch(end):
        return site, end
    parts = known.parts(name)
    return (site, end) if parts is None else (parts.where, parts.end)


def _own_place(name: str) -> Place | None:
    where, _, suffix = name.removeprefix(OWN).rpartition(".")
    component, _, path = where.partition(".")
    return Place(component, path, suffix, stem=f"{OWN}{where}") if component in families.components() else None


def _length(claim: tuple[str, str]) -> int:
    return len(claim[0])


def _has_kernel(named: "tuple[str, Tensor]") -> bool:
    """Whether this is the tensor of a rank, on a convolution with a kernel."""
    (_, _, suffix), tensor = named[0].partition("."), named[1]
    ranked = any(suffix in method.ranked for method in methods.known().values())
    return ranked and tensor.ndim > 2 and tensor[0, 0].numel() > 1


register(Kohya())
