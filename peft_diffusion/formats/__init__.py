"""Adapter files: one safetensors file per adapter, in the layout that other programs read."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy
from .spec import Spec

if TYPE_CHECKING:
    from .file import Coverage, Loaded, load, save
    from .inspection import Inspection, inspect
    from .planning import Plan, plan

__all__ = ["Coverage", "Inspection", "Loaded", "Plan", "Spec", "inspect", "load", "plan", "save"]

# Looking at the header of a file needs no torch, and settings need neither.
if not TYPE_CHECKING:  # or a type checker takes any name for one of the package
    _ASIDE = {
        "file": ("Coverage", "Loaded", "load", "save"),
        "inspection": ("Inspection", "inspect"),
        "planning": ("Plan", "plan"),
    }
    __getattr__, __dir__ = lazy(__name__, {name: module for module, names in _ASIDE.items() for name in names})
