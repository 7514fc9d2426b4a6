"""The methods. Importing this package registers them and imports no torch.

A method is one module, which declares its hyper-parameters and every fact that others ask for: see ``core.method``. A method
of one's own holds there what it computes at a site, too: see ``core.plugins``. So that files can be inspected and commands
explained without torch, which takes seconds to import, those of this package keep that in ``adapter.py`` beside the
declaration, and import it when an adapter is built. What several methods share is in ``shared``.
"""

import pkgutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from importlib import import_module

from ..core import plugins
from ..core.errors import UnknownMethodError, UserError, did_you_mean
from ..core.method import METHODS, Method

DEFAULT = "lora"
"""The method that is trained where none is named."""

for _module in pkgutil.iter_modules(__path__):
    if _module.name != "shared":
        import_module(f".{_module.name}", __name__)


def known() -> Mapping[str, type[Method]]:
    """Import the methods of installed plug-ins, if there are, and give all that there are by name.

    Returns:
        The methods of this package, of installed plug-ins, and of modules that were imported otherwise.

    Raises:
        UserError: A plug-in cannot be imported.
    """
    plugins.discover(plugins.METHODS_GROUP)
    return METHODS


def find(name: str) -> type[Method]:
    """Find a method by its name.

    Args:
        name: What a person calls it.

    Returns:
        The class of the method.

    Raises:
        UnknownMethodError: There is none of that name.
        UserError: A plug-in cannot be imported.
    """
    if name not in known():
        there = sorted(METHODS)
        raise UnknownMethodError(
            name, f"there is no method {name!r}; there are: {', '.join(there)}{did_you_mean(name, there)}"
        )
    return METHODS[name]


def method(name: str, **hyper_parameters: object) -> Method:
    """Make a method from its name.

    Args:
        name: What a person calls it.
        hyper_parameters: Those that are not at their defaults.

    Returns:
        The method.

    Raises:
        UserError: There is no such method or hyper-parameter, or one has a value that it cannot have.
    """
    kind = find(name)
    refuse_unknown(kind, hyper_parameters)
    return kind(**hyper_parameters)


def refuse_unknown(kind: type[Method], hyper_parameters: Iterable[str]) -> None:
    """See that a method has hyper-parameters of these names.

    Args:
        kind: The class of the method.
        hyper_parameters: The names.

    Raises:
        UserError: It has not.
    """
    known_names = sorted(field.name for field in fields(kind))
    unknown = sorted(set(hyper_parameters) - set(known_names))
    if unknown:
        raise UserError(
            f"method {kind.name} has no {', '.join(unknown)}; it has: {', '.join(known_names) or 'none'}"
            f"{did_you_mean(unknown[0], known_names)}"
        )


def lines(unloaded: Sequence[str] = ()) -> dict[str, str]:
    """Tell in a line what each method is, importing no plug-in whose source tells it.

    Args:
        unloaded: Modules of plug-ins that were not loaded yet.

    Returns:
        By name, the first line of the docstring of the method's module; of the class, where the module has none.

    Raises:
        UserError: A plug-in is not there, or had to be imported and failed.
    """
    installed = plugins.entry_points(plugins.METHODS_GROUP)
    found = {point.name: _first_line(_declared(point.module).get(point.name)) for point in installed}
    for module in unloaded:
        declared = _declared(module)
        if not declared:  # as of a package that imports them from its modules
            plugins.load_plugin(module)
        found |= {name: _first_line(text) for name, text in declared.items()}
    return found | {name: _first_line(sys.modules[one.__module__].__doc__ or one.__doc__) for name, one in METHODS.items()}


def _declared(module: str) -> dict[str, str]:
    """The methods that the source of a module declares, with its docstring, or theirs; nothing is imported."""
    import ast

    path = plugins.source(module)
    try:
        tree = ast.parse(path.read_bytes()) if path else None
    except (OSError, SyntaxError, ValueError):  # which importing it will say better
        tree = None
    if tree is None:
        return {}
    own = ast.get_docstring(tree)
    classes = [one for one in tree.body if isinstance(one, ast.ClassDef)]
    named = [(one, keyword.value) for one in classes for keyword in one.keywords if keyword.arg == "name"]
    return {
        str(value.value): own or ast.get_docstring(one) or ""
        for one, value in named
        if isinstance(value, ast.Constant) and isinstance(value.value, str)
    }


def _first_line(text: str | None) -> str:
    return ((text or "").strip().splitlines() or [""])[0]
