"""What a layout of adapter files is, and the table of those that there are. Imports no torch.

A layout is one file that says in both directions how one program names and shapes the tensors of adapters. All that lies
between is neutral: a component of the base, the path of a module in it, and the suffix by which a method knows its tensor
(`core.method.Method.suffixes`, what ``Adapter.state()`` speaks). A layout of one's own is registered with `register`, from
a plug-in or an entry point of the group ``peft_diffusion.layouts``: see `core.plugins`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeAlias

from ..core import plugins
from ..core.errors import UserError, did_you_mean
from .container import Header
from .spec import Spec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..bases.base import AnyBase
    from ..core.adapter import Adapter

DEFAULT = "kohya"
"""The layout that files are written in where none is named."""

SaveDtype: TypeAlias = Literal["fp16", "bf16", "float32"]
"""What the numbers of a file are rounded to, in the words of kohya's trainer."""

OTHER_NAMES = {"kohya-sgm": "original"}
"""What a layout is called too: the original's names of a UNet are those that kohya's trainer writes for XL."""

NO_LAYOUT = "are of no layout that is known here"
"""Why a tensor is left out whose name nothing here reads."""


@dataclass(frozen=True)
class Whole:
    """That a tensor is a weight or bias itself, or rows of one, whose distance from the base's own is the change.

    Attributes:
        parameter: ``weight`` or ``bias``.
        rows: Which rows of the weight the tensor holds; nothing for all.
        picks: With rows, the suffix of the matrix (rows of the weight, rows here) that picks them.
        tied: Whether modules that share the weight with the site change with it.
    """

    parameter: str
    rows: tuple[int, ...] = ()
    picks: str = ""
    tied: bool = False


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file belongs, as far as its name and the header tell.

    Attributes:
        component: The component that its site lies in; the likeliest where the name tells none.
        site: The module in that component, by its path or by a name that `Layout.sites` gives. Dots and underscores are the
            same here, as in files.
        suffix: What its method calls the tensor.
        piece: Which piece of the tensor it is, for layouts that keep one tensor in several.
        others: The further components that a name may mean which tells none; empty with ``component_named``.
        component_named: Whether the name tells the component.
        change: What brings the tensor into the shape and scale that its method knows; None where it is so already.
        shape: The shape of that part of the tensor which ``change`` takes, of a tensor that the file has in one for several
            sites; None where it takes all of it.
        whole: How a tensor that is no change becomes one; None where it is one.
        stem: What the file calls the site, without the dot behind it. Other names that begin so belong to the site too, also
            where no layout reads them. "" where the name holds no site.
    """

    component: str
    site: str
    suffix: str
    piece: str = ""
    others: tuple[str, ...] = ()
    component_named: bool = True
    change: "Callable[[Tensor], Tensor] | None" = None
    stem: str = ""
    shape: tuple[int, ...] | None = None
    whole: Whole | None = None


@dataclass(frozen=True)
class Reading:
    """What a layout makes of the names of a file that it claims.

    Attributes:
        places: By name.
        leftovers: By name, why a tensor has no place.
        constants: By place, numbers that the file holds elsewhere than in a tensor, such as alphas of a configuration.
        warnings: What the person should know, in whole sentences with the file's path.
        further: By name, the other places of a tensor that belongs to several sites.
    """

    places: Mapping[str, Place]
    leftovers: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[Place, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    further: Mapping[str, tuple[Place, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Content:
    """What a file is to hold.

    Attributes:
        adapters: By component and path.
        components: The modules of the base, by component.
        spec: What the file says of itself.
    """

    adapters: "Mapping[str, Mapping[str, Adapter]]"
    components: "Mapping[str, nn.Module]"
    spec: Spec


@dataclass(frozen=True)
class Written:
    """What a layout makes of an adapter.

    Attributes:
        tensors: By name.
        metadata: Of the file's header.
        beside: Texts of further files that belong into the same folder, by name.
        file_name: The only name under which programs find the file; "" where any will do.
        needed: Those entries of the metadata without which the tensors mean something else.
        pickled: What torch.save is given where a file of this layout is wanted as ``.pt``; None where no program reads such.
    """

    tensors: "Mapping[str, Tensor]"
    metadata: Mapping[str, str]
    beside: Mapping[str, str] = field(default_factory=dict)
    file_name: str = ""
    needed: frozenset[str] = frozenset()
    pickled: "Mapping[str, object] | None" = None


class Layout(Protocol):
    """How one program names and shapes the tensors of adapters.

    Attributes:
        name: What a person calls it, and what ``inspect`` shows.
        told_by: The entries of the metadata that `read` looks at, where it looks at nothing else but names and shapes: files
            of the same are then read once. None where it looks at more, as at the file's name or at what lies beside it.
    """

    name: ClassVar[str]
    told_by: ClassVar[frozenset[str] | None] = None

    def claims(self, name: str) -> int | None:
        """Tell whether a tensor's name is of this layout.

        Args:
            name: The name of a tensor in a file.

        Returns:
            How many letters at its beginning show that, 0 where only its end does; None where it is of another layout. Of
            several layouts the one with the most letters reads it.
        """
        ...

    def read(self, header: Header, names: Sequence[str]) -> Reading:
        """Find the places of tensors.

        Args:
            header: Of the file. What lies beside the file may be read too; tensors may not.
            names: The tensors that this layout reads: the names that it claims, and no other layout more.

        Returns:
            A place or a reason for each of the names. A name may go without where its tensor changes nothing: it is the
            base's own, or another tensor of the file again.

        Raises:
            UserError: The names contradict one another, or what lies beside the file cannot be read.
        """
        ...

    def write(self, content: Content) -> Written:
        """Make the tensors and metadata of a file.

        Args:
            content: What it is to hold.

        Returns:
            All that there is to write.

        Raises:
            UserError: The layout cannot say this. The message says what, why, and what to do instead.
        """
        ...

    def sites(self, component: str, module: "nn.Module") -> Mapping[str, str]:
        """Name the modules of a component that this layout knows by other names than their paths.

        Args:
            component: Its name.
            module: The component itself.

        Returns:
            Paths by name.
        """
        return {}

    def joined(self, pieces: "Mapping[str, Tensor]", header: Header, base: "AnyBase", component: str) -> "dict[str, Tensor]":
        """Join a tensor that this layout keeps in pieces.

        Args:
            pieces: By `Place.piece`, in the order of the file.
            header: Of the file.
            base: The base that the adapter is for, or its skeleton.
            component: The component that the site lies in.

        Returns:
            The tensor, and whatever else the method needs beside it, by suffix.

        Raises:
            UserError: The file is damaged.
        """
        raise TypeError(f"{self.name} keeps no tensor in pieces")


class ReadOnly(Layout):
    """A layout in which nothing here writes files, as no program does or not those for the bases here."""

    def write(self, content: Content) -> Written:
        """Refused."""
        raise _is_read_only(self.name)


class WrittenOnly(Layout):
    """A layout that another one reads too."""

    def claims(self, name: str) -> int | None:
        """None: another layout reads its names."""
        return None

    def read(self, header: Header, names: Sequence[str]) -> Reading:
        """Nothing, as it claims nothing."""
        return Reading({})


LAYOUTS: dict[str, Layout] = {}
"""Every layout that was registered, by name. `known` imports those that there are."""


def register(layout: Layout) -> None:
    """Add a layout, so that files of it are read and can be written.

    Args:
        layout: The layout.

    Raises:
        UserError: Another layout has its name.
    """
    other = LAYOUTS.get(layout.name)
    if other is not None and type(other).__qualname__ != type(layout).__qualname__:
        raise UserError(f"there is a layout {layout.name!r} already; give this one another name")
    LAYOUTS[layout.name] = layout


def known() -> Mapping[str, Layout]:
    """Import the layouts of this package and of installed plug-ins, once.

    Returns:
        All that are registered, by name.

    Raises:
        UserError: A plug-in cannot be imported.
    """
    _import_own()
    plugins.discover(plugins.LAYOUTS_GROUP)
    return LAYOUTS


@cache
def _import_own() -> None:
    """Import the layouts of this package."""
    package = import_module(".layouts", __package__)
    for module in iter_modules(package.__path__):
        import_module(f".{module.name}", package.__name__)


def find(name: str) -> Layout:
    """Find a layout to write in by its name.

    Args:
        name: What a person calls it.

    Returns:
        The layout.

    Raises:
        UserError: There is none of that name, nothing writes it, or a plug-in cannot be imported.
    """
    found, there = known().get(OTHER_NAMES.get(name, name)), writable()
    if found is None:
        raise UserError(f"there is no layout {name!r}; there are: {', '.join(there)}{did_you_mean(name, there)}")
    if isinstance(found, ReadOnly):
        raise _is_read_only(name)
    return found


def _is_read_only(name: str) -> UserError:
    return UserError(f"nothing writes files of the layout {name!r}; take one of {', '.join(writable())}")


def writable() -> list[str]:
    """List the names of the layouts that files can be written in.

    Returns:
        The names, sorted.
    """
    return sorted([*(name for name, one in LAYOUTS.items() if not isinstance(one, ReadOnly)), *OTHER_NAMES])


def reader_of(name: str, layouts: Iterable[Layout]) -> Layout | None:
    """Find the layout that a tensor's name is of.

    Args:
        name: The name of a tensor in a file.
        layouts: Those to choose from.

    Returns:
        The layout that recognizes the longest beginning; None where there is none.

    Raises:
        UserError: Two layouts recognize the same beginning.
    """
    claims = [(length, layout) for layout in layouts if (length := layout.claims(name)) is not None]
    most = max((length for length, _ in claims), default=0)
    found = [layout for length, layout in claims if length == most]
    if len(found) > 1:
        names = " and ".join(layout.name for layout in found)
        raise UserError(f"the layouts {names} both claim the tensor {name}; leave one of their plug-ins away")
    return found[0] if found else None
