"""A library of adapters: which files there are, what each teaches, and which of them a prompt asks for."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy

if TYPE_CHECKING:
    from .library import Library
    from .ranking import Found

__all__ = ["Found", "Library"]

if not TYPE_CHECKING:  # or a type checker takes any name for one of the package
    __getattr__, __dir__ = lazy(__name__, {"Found": "ranking", "Library": "library"})
