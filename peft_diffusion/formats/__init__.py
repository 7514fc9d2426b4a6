"""Adapter files: one safetensors file per adapter, in the layout that other programs read."""

from typing import TYPE_CHECKING, Any

from .inspection import Inspection, inspect
from .spec import Spec

if TYPE_CHECKING:
    from .file import Coverage, Loaded, load, save

__all__ = ["Coverage", "Inspection", "Loaded", "Spec", "inspect", "load", "save"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import file  # imports torch, which looking at a file's header does not need

        return getattr(file, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
