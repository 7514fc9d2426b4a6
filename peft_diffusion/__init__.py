"""Teach Stable Diffusion a style from a folder of images, generate with it, blend several."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .bases import load_base
    from .core.errors import UserError
    from .formats import Inspection, Spec, inspect
    from .generation import Adapters, Schedule
    from .generation.blend import Blend, blend
    from .generation.config import BlendConfig, GenerateConfig
    from .generation.generate import Picture, generate
    from .training import TrainConfig, train

__all__ = [
    "Adapters",
    "Blend",
    "BlendConfig",
    "GenerateConfig",
    "Inspection",
    "Picture",
    "Schedule",
    "Spec",
    "TrainConfig",
    "UserError",
    "blend",
    "generate",
    "inspect",
    "load_base",
    "train",
]

# Where each name lives. Importing the package must not cost an import of torch, so a name is looked up when it is used.
_HOMES = {
    "Adapters": "generation",
    "Blend": "generation.blend",
    "BlendConfig": "generation.config",
    "GenerateConfig": "generation.config",
    "Inspection": "formats",
    "Picture": "generation.generate",
    "Schedule": "generation",
    "Spec": "formats",
    "TrainConfig": "training",
    "UserError": "core.errors",
    "blend": "generation.blend",
    "generate": "generation.generate",
    "inspect": "formats",
    "load_base": "bases",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
