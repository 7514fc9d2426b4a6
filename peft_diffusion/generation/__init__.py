"""Generating with what was taught: the loader, pictures, blends and sheets."""

from typing import TYPE_CHECKING, Any

from .schedule import Schedule

if TYPE_CHECKING:
    from .adapters import Adapters, LoadedAdapter

__all__ = ["Adapters", "LoadedAdapter", "Schedule"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import adapters  # imports torch

        return getattr(adapters, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
