"""Generating with what was taught: the loader, pictures, blends and sheets."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy
from ..core.strength_schedule import ByPart, Schedule

if TYPE_CHECKING:
    from .adapters import Adapters, LoadedAdapter
    from .batching import Request

__all__ = ["Adapters", "ByPart", "LoadedAdapter", "Request", "Schedule"]

if not TYPE_CHECKING:  # or a type checker takes any name for one of the package
    __getattr__, __dir__ = lazy(__name__, {"Adapters": "adapters", "LoadedAdapter": "adapters", "Request": "batching"})
