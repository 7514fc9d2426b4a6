"""Plug-ins: modules of others that add methods, families of bases or layouts of files. Imports no torch.

A plug-in is a module that registers what it adds when it is imported: a subclass of ``Method``, a family, a layout. It comes
in by an entry point of an installed package, in one of `GROUPS`, or by its name: ``--plugin MODULE`` of the command line,
``plugin = ["MODULE"]`` in a settings file, ``peft_diffusion.load_plugin("MODULE")`` in Python.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

METHODS_GROUP = "peft_diffusion.methods"
FAMILIES_GROUP = "peft_diffusion.families"
LAYOUTS_GROUP = "peft_diffusion.layouts"
GROUPS = (METHODS_GROUP, FAMILIES_GROUP, LAYOUTS_GROUP)

_loaded: list[str] = []
_discovered: set[str] = set()


def load_plugin(module: str) -> None:
    """Import a plug-in by the name of its module, once; it may lie in the present directory.

    Args:
        module: The module's name, with dots for one in a package.

    Raises:
        UserError: There is no such module, a file is named in its place, or importing it failed.
    """
    if module in _loaded:
        return
    if module.endswith(".py") or "/" in module or os.sep in module:
        file = Path(module)
        raise UserError(f"--plugin {module}: name the module, not its file: --plugin {file.stem}, where {file.stem}.py lies")
    _look_in_the_present_directory()
    _import(module, f"--plugin {module}")
    _loaded.append(module)


def loaded() -> tuple[str, ...]:
    """The modules that were loaded by name, in order."""
    return tuple(_loaded)


def imported(module: str) -> bool:
    """Tell whether a module was imported, as a plug-in or otherwise.

    Args:
        module: Its name, as `importable` gives it.

    Returns:
        Whether it was.
    """
    return module in sys.modules or module == importable("__main__")


def importable(module: str) -> str:
    """Name a module so that it can be imported again: one that is run as a script is not called ``__main__`` then.

    Args:
        module: The ``__module__`` of a class.

    Returns:
        The name.
    """
    if module != "__main__":
        return module
    main = sys.modules[module]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    return spec.name if spec is not None else module if file is None else Path(file).stem


def origin(module: str) -> str | None:
    """Name the plug-in that a method or a family of bases comes from.

    Args:
        module: The module that declared or registered it.

    Returns:
        The module, for ``--plugin``; None for one of this package.
    """
    package = __name__.partition(".")[0]
    return None if module == package or module.startswith(f"{package}.") else importable(module)


def discover(group: str) -> None:
    """Import the plug-ins of a group that installed packages bring by their entry points, once.

    Args:
        group: One of `GROUPS`.

    Raises:
        UserError: Importing one of them failed.
    """
    if group in _discovered:
        return
    for point in entry_points(group):
        package = f" of the installed package {point.dist.name!r}" if point.dist else ""
        _import(point.module, f"the plug-in {point.module!r}{package}")
    _discovered.add(group)


def entry_points(group: str) -> "list[EntryPoint]":
    """List what installed packages offer, by name; nothing is imported.

    Args:
        group: The group of entry points.

    Returns:
        The entry points.
    """
    if not _may_offer(group):
        return []
    from importlib import metadata  # which takes as long as half of this package

    return sorted(metadata.entry_points(group=group), key=lambda point: point.name)


def _may_offer(group: str) -> bool:
    """Whether an installed package may have entry points of a group.

    Most people have none, and to find that out through ``importlib.metadata`` takes a fifth of the time of a help. What is
    not installed as a plain folder is left to it.
    """
    if any(hasattr(finder, "find_distributions") and finder is not PathFinder for finder in sys.meta_path):
        return True
    named = group.encode()
    for place in sys.path:
        try:
            with os.scandir(place or ".") as entries:
                found = [entry for entry in entries if entry.name.endswith((".dist-info", ".egg-info", ".egg"))]
        except NotADirectoryError:  # an archive
            return True
        except OSError:
            continue
        for entry in found:
            try:
                if entry.name.endswith(".egg") or named in Path(entry, "entry_points.txt").read_bytes():
                    return True
            except OSError:  # most have none
                continue
    return False


def source(module: str) -> Path | None:
    """The file of a module, found without importing it or the packages that it lies in.

    Args:
        module: The module's name, with dots for one in a package.

    Returns:
        The file with its Python source; None where there is none, as for compiled modules.
    """
    places: list[str] | None = [*sys.path, str(Path.cwd())]
    spec: ModuleSpec | None = None
    for part in _prefixes(module):
        spec = None if places is None else PathFinder.find_spec(part, places)
        if spec is None:
            return None
        places = None if spec.submodule_search_locations is None else list(spec.submodule_search_locations)
    path = Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None
    return path if path is not None and path.suffix == ".py" else None


def _prefixes(module: str) -> Iterator[str]:
    """``a``, ``a.b``, ``a.b.c`` of ``a.b.c``."""
    parts = module.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _look_in_the_present_directory() -> None:
    """Let modules of the present directory be found, after all others: the installed command does not look there."""
    here = os.getcwd()  # noqa: PTH109  (as sys.path holds it)
    if not {"", here} & set(sys.path):
        sys.path.append(here)


def _import(module: str, named: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in list(_prefixes(module)):
            raise UserError(f"{named} cannot be imported: {error}; install what it needs") from error
        raise UserError(
            f"{named}: there is no module {error.name!r}; install it, or run where {error.name}.py lies"
        ) from None
    except UserError as error:  # such as a name that is taken
        raise UserError(f"{named} cannot be used: {error}") from error
    except Exception as error:  # anything may come out of the code of others
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"{named} cannot be imported: {type(error).__name__}: {first}; mend it or leave it away") from error
