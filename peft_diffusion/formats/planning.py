"""What an adapter file holds and what becomes of it: parsed once, from the header alone. Imports no torch.

`inspect` prints a plan, `load` builds adapters from the same plan, and commands pass it along, so that a file is parsed once
and hashed once however many of them ask.
"""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from .. import methods
from ..bases import family as families
from ..core.errors import UserError, did_you_mean
from ..core.files import at_home
from ..core.method import Method
from ..core.recent import Recent
from . import container
from .container import Header
from .layout import NO_LAYOUT, Layout, Place, Reading, known, reader_of
from .names import settled, site_name, unwrapped
from .pictures import is_picture, read_picture
from .spec import Spec

if TYPE_CHECKING:
    from torch import Tensor

NO_METHOD = "are of no method that is known here"
NO_SITE = "have no site in this base"
IDLE = "change a projection after a text encoder that no picture of this base depends on"
"""ComfyUI gives every text encoder a projection, and its saver writes it; Stable Diffusion reads that of XL alone, of its
second."""
NOT_CHOSEN = "are other words than the one that was chosen"
WHICH = "name no component, and this base has {}: say which is meant, as component= in Python or FILE@{} in a command"
_CHECKPOINTS = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
"""What tensors of a whole Stable Diffusion in one file are called."""
NOT_WHOLE = "are of sites that other tensors, which are not understood, change too"


@dataclass(frozen=True)
class Source:
    """A tensor of a file and what becomes of it.

    Attributes:
        name: What the file calls it.
        shape: Its shape in the file, of that part which belongs to the place.
        layout: The layout that its name is of.
        place: Where it belongs.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    place: Place


@dataclass(frozen=True)
class SitePlan:
    """What a file holds for one site. Where a part of it is not understood, nothing of it is used: the rest would be wrong.

    Attributes:
        sources: Its tensors.
        constants: By suffix, numbers that the file holds elsewhere than in a tensor.
        strangers: The names of further tensors that are the site's by their names, and that no layout or method knows.
    """

    sources: tuple[Source, ...]
    constants: Mapping[str, float] = field(default_factory=dict)
    strangers: tuple[str, ...] = ()

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of its tensors by suffix; of a tensor in pieces, that of all pieces one after the other."""
        found: dict[str, tuple[int, ...]] = {}
        for source in self.sources:
            shape, suffix = source.shape, source.place.suffix
            if source.place.piece:
                rows, width = (1, *shape) if len(shape) == 1 else shape
                shape = (rows + (found[suffix][0] if suffix in found else 0), width)
            found[suffix] = shape
        return found

    @cached_property
    def simple(self) -> Mapping[str, str] | None:
        """Its tensors by suffix, by the names of the file, where each is as its one method knows it; None where not."""
        plain = all(one.place.change is None and one.place.whole is None and not one.place.piece for one in self.sources)
        return {one.place.suffix: one.name for one in self.sources} if plain and len(self.methods) == 1 else None

    @cached_property
    def _recognized(self) -> tuple[type[Method], ...]:
        return recognized(self.shapes.keys() | self.constants.keys())

    @cached_property
    def _unknown(self) -> tuple[str, ...]:
        """The names of those of its tensors that are of no known method."""
        suffixes = known_suffixes(self._recognized)
        return tuple(source.name for source in self.sources if source.place.suffix not in suffixes)

    @cached_property
    def methods(self) -> tuple[type[Method], ...]:
        """The methods that its tensors are of; none where that leaves one over."""
        return () if self._unknown or self.strangers else self._recognized

    @cached_property
    def damage(self) -> str | None:
        """The first tensor that a method of the site must have and has not, whatever the base; None where there is none."""
        held = {*self.shapes, *self.constants, *(one.place.whole.picks for one in self.sources if one.place.whole)}
        return next((name for one in self.methods if (name := one.missing(held)) is not None), None)

    @cached_property
    def leftovers(self) -> Mapping[str, str]:
        """By name, why its tensors make no part of an adapter."""
        if self.methods:
            return {}
        known = {source.name: NOT_WHOLE for source in self.sources}
        return {**known, **dict.fromkeys(self._unknown, NO_METHOD)}

    def with_strangers(self, names: Sequence[str]) -> "SitePlan":
        """Add tensors that are the site's by their names.

        Args:
            names: Theirs.

        Returns:
            The plan with them.
        """
        return replace(self, strangers=(*self.strangers, *names))

    def renamed(self, names: Mapping[str, str]) -> "SitePlan":
        """Call the tensors otherwise.

        Args:
            names: What the file calls each tensor.

        Returns:
            The plan with those names.
        """
        sources = tuple(replace(one, name=names[one.name]) for one in self.sources)
        return replace(self, sources=sources, strangers=tuple(names[name] for name in self.strangers))

    def joined(self, other: "SitePlan", path: Path) -> "SitePlan":
        """Take what a file holds for the same site under another name.

        Args:
            other: That.
            path: The file.

        Returns:
            Both together.

        Raises:
            UserError: Both hold the same tensor.
        """
        places = {(one.place.suffix, one.place.piece): one.name for one in self.sources}
        for one in other.sources:
            if (first := places.get((one.place.suffix, one.place.piece))) is not None:
                raise same_place(path, first, one.name)
        strangers = (*self.strangers, *other.strangers)
        return SitePlan((*self.sources, *other.sources), {**self.constants, **other.constants}, strangers)


@dataclass(frozen=True)
class Plan:
    """What an adapter file holds and what becomes of it.

    Attributes:
        header: Of the file.
        spec: What the file says of itself; None in files of other programs.
        layouts: The names of its layouts, by their number of tensors.
        sites: By component, and by the name of the site as `names.site_name` spells it. Of a site whose name tells no
            component, the likeliest.
        unread: By name, why a tensor has no place whatever the base.
        warnings: What the person should know of it.
        loaded: The tensors of a pickle, which has no header to be planned from.
        component: What was said to be meant by names that tell no component; None for nothing.
        word: What was said of the file's learned words; None for nothing.
    """

    header: Header
    spec: Spec | None
    layouts: tuple[str, ...]
    sites: Mapping[str, Mapping[str, SitePlan]]
    unread: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    loaded: "Mapping[str, Tensor] | None" = field(default=None, repr=False)
    component: str | None = None
    word: str | None = None
    _data: list[container.Data] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def path(self) -> Path:
        """The file."""
        return self.header.path

    @property
    def leftovers(self) -> Mapping[str, str]:
        """By name, why a tensor makes no part of an adapter, whatever the base."""
        return {**self.unread, **{name: why for _, _, one in self.each() for name, why in one.leftovers.items()}}

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the file as hex digits, taken when it is first asked for.

        Raises:
            UserError: The file was changed since it was parsed.
        """
        if self._data or "_digests" in self.__dict__:
            return self._digests[0]
        container.refuse_changed(self.header)
        return container.sha256(self.path)

    @cached_property
    def _digests(self) -> tuple[str, str]:
        """Of what `tensors` read, which is let go then."""
        return self._data.pop().digests()

    @cached_property
    def data_sha256(self) -> str:
        """The SHA-256 of the tensors alone, by which A1111 and kohya know a file: as its metadata says, or taken now.

        A pickle has that of the whole file.

        Raises:
            UserError: The file was changed since it was parsed.
        """
        told = self.header.metadata.get("sshs_model_hash", "")
        if re.fullmatch("[0-9a-f]{64}", told):
            return told
        if self._data or "_digests" in self.__dict__:
            return self._digests[1]
        container.refuse_changed(self.header)
        return self.sha256 if self.loaded is not None else container.data_sha256(self.path)

    def each(self) -> Iterator[tuple[str, str, SitePlan]]:
        """Go through the sites.

        Yields:
            The component, the name of the site, and what the file holds for it.
        """
        return ((component, name, one) for component, found in self.sites.items() for name, one in found.items())

    def is_current(self) -> bool:
        """Tell whether the file is still the one that was parsed, by its size, time of change and inode.

        Returns:
            Whether it is.

        Raises:
            UserError: The file is gone.
        """
        return container.stamp_of(self.path) == self.header.stamp

    def let_go(self) -> None:
        """Keep nothing more of what was read for a digest, which is of the file then."""
        self._data.clear()

    def tensors(self, *, keep: bool = False, pinned: bool = False) -> "dict[str, Tensor]":
        """Read the tensors of the file.

        Args:
            keep: Whether to keep what was read until a digest is asked for, which is of that then, and not of the file.
            pinned: Whether to read into memory that stays in its place, from which a GPU copies faster.

        Returns:
            The tensors by the names of the file.

        Raises:
            UserError: As `container.read_data` and `container.Data.tensors` do.
        """
        return dict(self.loaded) if self.loaded is not None else self.data(keep=keep, pinned=pinned).tensors()

    def data(self, *, keep: bool = False, pinned: bool = False) -> container.Data:
        """Read what a safetensors file holds.

        Args:
            keep: As for `tensors`.
            pinned: As for `tensors`.

        Returns:
            Its bytes.

        Raises:
            UserError: As `container.read_data` does.
        """
        data = container.read_data(self.header, pinned=pinned)
        if keep and not self._data and not self.__dict__.keys() & {"sha256", "_digests"}:
            self._data.append(data)
        return data

    @property
    def size(self) -> int:
        """Bytes of its tensors, as the file holds them."""
        if self.loaded is not None:
            return sum(tensor.nbytes for tensor in self.loaded.values())
        return sum(entry.end - entry.start for entry in self.header.tensors.values())

    @property
    def digests(self) -> "Digests":
        """The digests of the file, which need not be known yet."""
        return Digests(self)

    def stored(self) -> "Mapping[str, Tensor]":
        """Give the tensors of the file, each read when it is asked for; those of a pickle are in memory.

        Returns:
            The tensors by the names of the file, as `tensors` gives them.

        Raises:
            UserError: The file changed since it was parsed.
        """
        return container.Stored(self.header) if self.loaded is None else self.loaded

    def is_none(self) -> UserError:
        """Say that this is no adapter.

        Returns:
            The error to raise.
        """
        told = by_reason({name: why for name, why in self.leftovers.items() if why != NO_LAYOUT})
        if any(name.startswith(_CHECKPOINTS) for name in self.header.tensors):
            return UserError(
                f"{self.path} is a checkpoint, of a whole model, and no adapter: it is named as --base, or as --into of"
                " merge; what was trained into it is taken out with: peft-diffusion extract"
                f" {shlex.quote(str(self.path))} BASE --rank 32 --output NAME.safetensors"
            )
        if told:
            reasons = "; ".join(listed(reason, names) for reason, names in told.items())
            return UserError(f"{self.path} holds nothing that can be used here: {reasons}")
        shown = some(list(self.header.tensors)) or "no tensor"
        return UserError(f"{self.path} is no adapter of a known layout: it holds {shown}")


class Digests:
    """The digests of a file, each waited for when it is first asked for. Copies share it.

    Args:
        of: The plan of the file, or both digests.
    """

    def __init__(self, of: Plan | tuple[str, str]) -> None:
        self._of = of

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Digests) and self._known() == other._known())

    def __hash__(self) -> int:
        return hash(self._known())

    def __deepcopy__(self, memo: dict[int, object]) -> "Digests":
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return Digests, (self._known(),)

    @property
    def sha256(self) -> str:
        """Of the file's bytes."""
        return self._known()[0]

    @property
    def data_sha256(self) -> str:
        """Of its tensors alone, by which A1111 knows it."""
        return self._known()[1]

    def _known(self) -> tuple[str, str]:
        if not isinstance(self._of, tuple):
            self._of = self._of.sha256, self._of.data_sha256
        return self._of


def plan(path: str | Path, *, component: str | None = None, word: str | None = None) -> Plan:
    """Parse an adapter file.

    Args:
        path: The file, or the folder that it lies in, as peft and diffusers make it. Of a safetensors file only the header
            is read; a pickle, or a picture in which A1111 keeps a word, is read whole, which takes torch.
        component: Which component is meant by names that tell none, such as those of LyCORIS and peft on the second text
            encoder of Stable Diffusion XL.
        word: What to call the learned word of a file that holds one, whatever its file is called; of a file with several,
            the one to load.

    Returns:
        What it holds.

    Raises:
        UserError: There is no such file, it is no adapter, or it is damaged.
    """
    where = container.adapter_file(at_home(Path(path)))
    if container.is_pickle(where):
        header, loaded = container.read_pickle(where)
    elif is_picture(where):
        header, loaded = read_picture(where)
    else:
        return planned(container.read_header(where), component=component, word=word)
    return planned(header, loaded, component=component, word=word)


def takes_torch(path: Path) -> bool:
    """Tell by a file's name whether parsing it takes torch, and reads it whole.

    Args:
        path: The file.

    Returns:
        Whether it does: of a pickle or a picture.
    """
    return container.is_pickle(path) or is_picture(path)


def planned(
    header: Header,
    loaded: "Mapping[str, Tensor] | None" = None,
    *,
    component: str | None = None,
    word: str | None = None,
) -> Plan:
    """Plan what becomes of the tensors of a header.

    Args:
        header: Of the file.
        loaded: The tensors themselves, of a pickle.
        component: As for ``plan``.
        word: As for ``plan``.

    Returns:
        What the file holds.

    Raises:
        UserError: It is no adapter, or it is damaged; or it holds nothing that a component or a word could be said of.
    """
    if container.CHECKPOINT in header.metadata:
        raise UserError(
            f"{header.path} is a checkpoint, from which a run goes on, and no adapter; write the adapter in it with:"
            f" peft-diffusion runs export {shlex.quote(str(header.path))} --output NAME.safetensors"
        )
    if container.COMPOSITION in header.metadata:
        raise UserError(f"{header.path} composes adapters and is none; give it with --compose-file, to what draws")
    spec = Spec.from_metadata(header.metadata, str(header.path))
    read = _read(header, component, word)
    found = Plan(header, spec, read.layouts, read.sites, read.unread, read.warnings, loaded, component, word)
    if not read.sites and spec is None:
        raise found.is_none()
    return found


@dataclass(frozen=True)
class _Read:
    """What the layouts make of a header: see `Plan`."""

    layouts: tuple[str, ...]
    sites: Mapping[str, Mapping[str, SitePlan]]
    unread: Mapping[str, str]
    warnings: tuple[str, ...]


_remembered: Recent[Hashable, _Read] = Recent(32)  # most files of a base are of a few shapes


def forget() -> None:
    """Forget what was read of earlier files, as for measuring how long a file of a new shape takes."""
    _remembered.forget()


def _told_by(layout: Layout) -> frozenset[str] | None:
    return getattr(layout, "told_by", None)  # plug-ins may have been written without it


def _depends_on(header: Header, component: str | None) -> Hashable:
    """All that a reading depends on whose layouts say which metadata they look at."""
    layouts = tuple(known().values())
    told_by = frozenset[str]().union(*(_told_by(layout) or () for layout in layouts))
    told = tuple((key, header.metadata.get(key)) for key in sorted(told_by))
    shapes = tuple(entry.shape for entry in header.tensors.values())
    plugged = (layouts, tuple(methods.known().values()), tuple(one.name for one in families.every()))
    return tuple(header.tensors), shapes, told, component, plugged


def _read(header: Header, component: str | None, word: str | None) -> _Read:
    """Read a header, or remember what was read of another one that tells the same. Raises UserError."""
    key = _depends_on(header, component)
    found = _remembered.get(key) if word is None else None
    if found is not None:
        return found
    bare, names_of = _unwrapped(header)
    with settled():
        by_layout, nobodys = _by_layout(bare)
        readings = [(layout, layout.read(bare, names)) for layout, names in by_layout.items()]
    if component is not None:
        readings = _of_component(header.path, readings, component)
    if word is not None:
        readings = _of_word(header.path, readings, word)
    unread = {**nobodys, **{name: why for _, reading in readings for name, why in reading.leftovers.items()}}
    sites = _with_strangers(_sites(bare, readings), unread)
    if names_of:
        unread = {names_of[name]: why for name, why in unread.items()}
        sites = {part: {at: one.renamed(names_of) for at, one in found.items()} for part, found in sites.items()}
    layouts = Counter({layout.name: len(reading.places) for layout, reading in readings if reading.places})
    warnings = tuple(warning for _, reading in readings for warning in reading.warnings)
    read = _Read(tuple(name for name, _ in layouts.most_common()), sites, unread, warnings)
    if word is None and not warnings and all(_told_by(layout) is not None for layout, _ in readings):
        _remembered.put(key, read)  # with a warning it is not kept, as that names the file
    return read


def recognized(suffixes: Set[str]) -> tuple[type[Method], ...]:
    """Find the methods that made the tensors of a site.

    Args:
        suffixes: What the methods call the tensors.

    Returns:
        The methods, in the order of their registration.
    """
    return _recognized_by(tuple(methods.known().values()), frozenset(suffixes))


@lru_cache(maxsize=1000)  # most sites of a file have the same
def _recognized_by(known: tuple[type[Method], ...], suffixes: frozenset[str]) -> tuple[type[Method], ...]:
    return tuple(method for method in known if method.recognizes(suffixes))


def known_suffixes(chosen: Sequence[type[Method]]) -> frozenset[str]:
    """Collect what some methods call their tensors.

    Args:
        chosen: The methods.

    Returns:
        All of their suffixes.
    """
    return _suffixes_of(tuple(chosen))


@lru_cache(maxsize=1000)
def _suffixes_of(chosen: tuple[type[Method], ...]) -> frozenset[str]:
    return frozenset[str]().union(*(method.suffixes for method in chosen))


def _by_layout(header: Header) -> tuple[dict[Layout, list[str]], dict[str, str]]:
    """The names that each layout reads, and why others are read by none."""
    layouts = known().values()
    found: dict[Layout, list[str]] = {}
    nobodys: dict[str, str] = {}
    for name in header.tensors:
        layout = reader_of(name, layouts)
        if layout is None:
            nobodys[name] = NO_LAYOUT
        else:
            found.setdefault(layout, []).append(name)
    return found, nobodys


def _of_component(path: Path, readings: Sequence[tuple[Layout, Reading]], component: str) -> list[tuple[Layout, Reading]]:
    """What layouts made of a file, with the component that names without one mean. Raises UserError."""
    known = families.components()
    if component not in known:
        raise UserError(
            f"there is no component {component!r}; there are: {', '.join(known)}{did_you_mean(component, known)}"
        )
    changed: set[Place] = set()

    def meant(place: Place) -> Place:
        free = not place.component_named or place.others
        if not free or families.role_of(place.component) != families.role_of(component):
            return place
        changed.add(place)
        return replace(place, component=component, others=(), component_named=True)

    found = [(layout, _replaced(reading, meant)) for layout, reading in readings]
    if not changed:
        raise UserError(f"{path}: its names tell their components, so leave {component} away")
    return found


def _of_word(path: Path, readings: Sequence[tuple[Layout, Reading]], word: str) -> list[tuple[Layout, Reading]]:
    """What layouts made of a file, with its learned word called otherwise, or one of its words alone. Raises UserError."""
    suffixes = frozenset(one.embedding[0] for one in methods.known().values() if one.embedding is not None)
    every = [(name, place) for _, reading in readings for name, place in _places(reading)]
    words = list(dict.fromkeys(place.piece for _, place in every if place.suffix in suffixes and place.piece))
    if not words:
        raise UserError(f"{path} holds no learned word that could be called {word!r}")
    if len(words) > 1 and word not in words:
        raise UserError(f"{path} holds the words {', '.join(words)}, and none {word!r}{did_you_mean(word, words)}")
    if len(words) == 1:
        if not word or any(letter.isspace() for letter in word):
            raise UserError(f"a word to call is one without spaces, such as <cat>; {word!r} is not")
        return [
            (layout, _replaced(reading, lambda one: replace(one, piece=word) if one.suffix in suffixes else one))
            for layout, reading in readings
        ]
    left = {name for name, place in every if place.suffix in suffixes and place.piece != word}
    return [
        (
            layout,
            replace(
                reading,
                places={k: v for k, v in reading.places.items() if k not in left},
                leftovers={**reading.leftovers, **dict.fromkeys(left & reading.places.keys(), NOT_CHOSEN)},
            ),
        )
        for layout, reading in readings
    ]


def _places(reading: Reading) -> list[tuple[str, Place]]:
    """Every place of every tensor."""
    return [*reading.places.items(), *((name, one) for name, places in reading.further.items() for one in places)]


def _replaced(reading: Reading, change: Callable[[Place], Place]) -> Reading:
    return replace(
        reading,
        places={name: change(place) for name, place in reading.places.items()},
        constants={change(place): value for place, value in reading.constants.items()},
        further={name: tuple(map(change, places)) for name, places in reading.further.items()},
    )


def _unwrapped(header: Header) -> tuple[Header, dict[str, str]]:
    """The header with the names that tensors have without the wrappers of modules, and what the file calls each of those;
    nothing where that is the same. Raises UserError where two have one name."""
    names: dict[str, str] = {}
    for name in header.tensors:
        first = names.setdefault(unwrapped(name), name)
        if first != name:
            raise same_place(header.path, first, name)
    if all(bare == name for bare, name in names.items()):
        return header, {}
    return replace(header, tensors={bare: header.tensors[name] for bare, name in names.items()}), names


def by_reason(left: Mapping[str, str]) -> dict[str, list[str]]:
    """Group tensors that were left out.

    Args:
        left: The reason of each.

    Returns:
        Their names by reason, in the order of the file.
    """
    found: dict[str, list[str]] = {}
    for name, reason in left.items():
        found.setdefault(reason, []).append(name)
    return found


def some(names: Sequence[str]) -> str:
    """Show a few names.

    Args:
        names: Of tensors, as the file has them.

    Returns:
        The first three.
    """
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def listed(reason: str, names: Sequence[str]) -> str:
    """Tell tensors that are left out.

    Args:
        reason: Why, as of several: "are of no layout that is known here".
        names: Of the tensors.

    Returns:
        The reason, how many they are, and the first of them.
    """
    return f"tensors {reason} ({len(names)}): {some(names)}"


def told_damage(where: str, missing: str) -> str:
    """Say that a site of a file is damaged.

    Args:
        where: Its component, a dot, and its path.
        missing: The tensor that is not there: `SitePlan.damage`.

    Returns:
        A sentence.
    """
    return f"{where}: {missing} is missing; the file is damaged"


def refuse_leftovers(path: Path, left: Mapping[str, str]) -> None:
    """Refuse a file of which a tensor is left out.

    Args:
        path: The file.
        left: The reason of each such tensor.

    Raises:
        UserError: There is one, and what it changes would be seen.
    """
    lost = {name: why for name, why in left.items() if why != IDLE}
    if lost:
        told = "; ".join(listed(reason, names) for reason, names in by_reason(lost).items())
        raise UserError(f"{path} would not be used whole: {told}")


def same_place(path: Path, first: str, second: str) -> UserError:
    """Say that a file holds two tensors for one place: which of them counts is not known, and adding them may be wrong.

    Args:
        path: The file.
        first: What it calls the one.
        second: What it calls the other.

    Returns:
        The error to raise.
    """
    return UserError(f"{path}: {first} and {second} are one tensor under two names; take one of them out of the file")


def _sites(header: Header, readings: Sequence[tuple[Layout, Reading]]) -> dict[str, dict[str, SitePlan]]:
    """The tensors of each site. Raises UserError where two are of one place."""
    kept: dict[tuple[str, str, str, str], Source] = {}
    constants: dict[tuple[str, str], dict[str, float]] = {}
    for layout, reading in readings:
        for name, place in _places(reading):
            key = (place.component, site_name(place.site), place.suffix, place.piece)
            if key in kept:
                raise same_place(header.path, kept[key].name, name)
            shape = header.tensors[name].shape
            kept[key] = Source(name, shape if place.shape is None else place.shape, layout, place)
        for place, value in reading.constants.items():
            constants.setdefault((place.component, site_name(place.site)), {})[place.suffix] = value
    sources: dict[tuple[str, str], list[Source]] = {}
    for (component, site, _, _), source in kept.items():
        sources.setdefault((component, site), []).append(source)
    sites: dict[str, dict[str, SitePlan]] = {}
    for (component, site), own in sources.items():
        sites.setdefault(component, {})[site] = SitePlan(tuple(own), constants.get((component, site), {}))
    return sites


def _with_strangers(sites: dict[str, dict[str, SitePlan]], unread: Mapping[str, str]) -> dict[str, dict[str, SitePlan]]:
    """The sites with those tensors that are theirs by their names, and that were not understood."""
    stems: dict[str, tuple[str, str]] = {}
    not_understood = list(unread)
    for component, found in sites.items():
        for name, one in found.items():
            if not one.methods:
                not_understood += one.leftovers
            stems |= {_flat(stem): (component, name) for source in one.sources if (stem := source.place.stem)}
    strangers: dict[tuple[str, str], list[str]] = {}
    for name in not_understood:
        beginnings = accumulate(name.split("."), lambda one, part: f"{one}.{part}")
        owner = next((stems[flat] for one in reversed(list(beginnings)[:-1]) if (flat := _flat(one)) in stems), None)
        if owner is not None and name not in (source.name for source in sites[owner[0]][owner[1]].sources):
            strangers.setdefault(owner, []).append(name)
    for (component, name), names in strangers.items():
        sites[component][name] = sites[component][name].with_strangers(names)
    return sites


def _flat(stem: str) -> str:
    return stem.replace(".", "_")
