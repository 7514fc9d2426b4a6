"""Names of a package that are imported when they are used: importing the package must not cost an import of torch."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make names of a package that are imported when they are used (PEP 562).

    Args:
        package: Its name.
        homes: The module that each name lives in, relative to the package.

    Returns:
        The ``__getattr__`` and ``__dir__`` of the package.

    Raises:
        AttributeError: Not here, but by ``__getattr__``, for a name that the package does not have.
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        # Not kept in the package: what stands in the module is what one gets, also where it was replaced.
        return getattr(import_module(f".{homes[name]}", package), name)

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return find, listed
