"""Names in adapter files, as data that several layouts share. Imports no torch."""

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from ..bases import family as families
from ..bases.family import Component, Family

if TYPE_CHECKING:
    from .aliases import Aliases

LYCORIS = "lycoris_"
"""What LyCORIS outside of kohya's trainer begins every name with, whatever model it is on: the path tells which."""

OWN = "peft_diffusion."
"""What stands beside a published layout that cannot say it: ``peft_diffusion.<component>.<path>.<suffix>``."""

TEXT_MODEL = "text_model."
"""What transformers 5 dropped from the paths of CLIP's text models. Files keep it."""

_COMPILED, _PARALLEL = "_orig_mod.", "module."  # what torch.compile and DistributedDataParallel put into names
_IN_TEXT_MODEL = ("encoder", "embeddings", "final_layer_norm")


class Rows(tuple[tuple[Component, ...], ...]):
    """The components of each family that is known now. What is made of them is kept, as it is asked for with every name.

    The same families are the same object, so that what is kept is found without comparing all of them.
    """

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class Settled(threading.local):
    """What holds while this thread goes through the names of a file; None for what is to be looked up each time."""

    rows: Rows | None = None
    aliases: "Aliases | None" = None


SETTLED = Settled()
_known: tuple[tuple[Family, ...], Rows] = ((), Rows())


@contextmanager
def settled() -> Iterator[None]:
    """Look up once for all names of a file which families and methods there are: layouts ask with each of them."""
    before = SETTLED.rows, SETTLED.aliases
    SETTLED.rows = known_rows()
    try:
        yield
    finally:
        SETTLED.rows, SETTLED.aliases = before


def length_of(name: str, starts: Iterable[str]) -> int:
    """Tell how long the beginning of a name is that is known.

    Args:
        name: The name.
        starts: What names may begin with, the longest first.

    Returns:
        The letters of the first of these that the name begins with; 0 where there is none.
    """
    for start in starts:  # several times quicker than with a generator
        if name.startswith(start):
            return len(start)
    return 0


def known_rows() -> Rows:
    """List the components of each family, with families that were registered a moment ago."""
    global _known
    if SETTLED.rows is not None:
        return SETTLED.rows
    now, (before, rows) = families.every(), _known
    if now is not before:
        rows = Rows(family.components for family in now)
        _known = now, rows
    return rows


def rows() -> list[Component]:
    """List the components of all families, those of one name once for each family that has another row for it.

    Returns:
        The rows, in the order of registration.
    """
    return list(dict.fromkeys(one for own in known_rows() for one in own))


def prefixes() -> Mapping[str, str]:
    """List what sites begin with in files of flat names, kohya's first of all.

    Returns:
        The component by prefix.
    """
    return _prefixes(known_rows())


@cache
def _prefixes(known: Rows) -> Mapping[str, str]:
    return {start: one.name for own in known for one in own for start in (one.kohya, *one.flat) if start}


def written_prefix(component: str, family: str) -> str:
    """Name what the sites of a component begin with in a file for a family.

    Args:
        component: Its name.
        family: That of the base.

    Returns:
        The prefix; for a component that the family has not, that of the first that has it.
    """
    own = {one.name: one.kohya for one in families.find(family).components}
    return own.get(component) or families.components()[component].kohya


def dotted_starts() -> Mapping[str, str]:
    """List what names begin with that keep the dots of paths.

    Returns:
        The component by beginning.
    """
    return _dotted_starts(known_rows())


@cache
def _dotted_starts(known: Rows) -> Mapping[str, str]:
    return {start: one.name for own in known for one in own for start in one.dotted}


def embeddings() -> Mapping[str, str]:
    """List what embeddings of new words are called, which have no site in their names.

    Returns:
        The component whose token embedding they belong to, by name.
    """
    return _embeddings(known_rows())


@cache
def _embeddings(known: Rows) -> Mapping[str, str]:
    first: dict[str, Component] = {}
    for one in (one for own in known for one in own):
        first.setdefault(one.name, one)
    return {name: component for component, one in first.items() for name in one.embeddings}


def claimants(site: str) -> tuple[str, ...]:
    """List the components that a site may lie in whose name tells none.

    Args:
        site: The path in the component, with dots or underscores.

    Returns:
        Their names, the likeliest first: those that claim paths that begin so, then those that take every path.
    """
    flat = _without_wrappers(site.replace(".", "_"))
    claims = {one.name: one.lycoris for one in reversed(rows()) if one.lycoris}
    every = [name for name, starts in reversed(claims.items()) if "" in starts]
    some = [name for name, starts in reversed(claims.items()) if name not in every and flat.startswith(starts)]
    return (*some, *every)


@lru_cache(maxsize=20_000)  # files name a site once for each tensor
def site_name(site: str) -> str:
    """Bring a path, or a name that a file gives a site, to the one spelling in which they are compared.

    Args:
        site: With dots or underscores, and with or without ``text_model``.

    Returns:
        With underscores, without that, and without what torch.compile and DistributedDataParallel put before paths.
    """
    flat = _without_wrappers(site.replace(".", "_"))
    bare = flat.removeprefix(TEXT_MODEL.replace(".", "_"))
    return bare if bare.startswith(_IN_TEXT_MODEL) else flat


def _without_wrappers(flat: str) -> str:
    compiled, parallel = _COMPILED.replace(".", "_"), _PARALLEL.replace(".", "_")
    return flat.replace(compiled, "").removeprefix(parallel)


def unwrapped(name: str) -> str:
    """Take from the name of a tensor what torch.compile and DistributedDataParallel put into names with dots.

    Args:
        name: As a file has it.

    Returns:
        The name that the tensor has without them.
    """
    bare = name.replace(_COMPILED, "")
    while bare.startswith(_PARALLEL):
        bare = bare.removeprefix(_PARALLEL)
    return bare


def with_text_model(component: str, path: str) -> str:
    """Spell a path as files do, in which CLIP's text models keep ``text_model``.

    Args:
        component: The name of the component.
        path: In the component as it is.

    Returns:
        The path that other programs know.
    """
    if families.role_of(component) != "text encoder":
        return path
    bare = path.removeprefix(TEXT_MODEL)
    return TEXT_MODEL + bare if bare.startswith(("encoder.", "embeddings.", "final_layer_norm")) else path
