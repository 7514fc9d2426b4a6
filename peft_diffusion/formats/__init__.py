"""Adapter files: one safetensors file per adapter, in the layout that other programs read."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy
from .inspection import Inspection, inspect
from .planning import Plan, plan
from .spec import Spec

if TYPE_CHECKING:
    from .file import Coverage, Loaded, load, save

__all__ = ["Coverage", "Inspection", "Loaded", "Plan", "Spec", "inspect", "load", "plan", "save"]

# Looking at the header of a file needs no torch.
if not TYPE_CHECKING:  # or a type checker takes any name for one of the package
    __getattr__, __dir__ = lazy(__name__, {"Coverage": "file", "Loaded": "file", "load": "file", "save": "file"})
