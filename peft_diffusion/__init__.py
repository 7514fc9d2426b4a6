"""Teach Stable Diffusion a style from a folder of images, generate with it, blend several."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .bases import LanguageModel, load_base, load_lm
    from .core.errors import UserError
    from .formats import Inspection, Spec, inspect
    from .generation import Adapters, Schedule
    from .generation.blend import Blend, blend
    from .generation.config import BlendConfig, GenerateConfig
    from .generation.generate import Picture, generate
    from .generation.language import generate_text
    from .generation.language_config import TextGenerateConfig
    from .training import TextTrainConfig, TrainConfig, train, train_text

__all__ = [
    "Adapters",
    "Blend",
    "BlendConfig",
    "GenerateConfig",
    "Inspection",
    "LanguageModel",
    "Picture",
    "Schedule",
    "Spec",
    "TextGenerateConfig",
    "TextTrainConfig",
    "TrainConfig",
    "UserError",
    "blend",
    "generate",
    "generate_text",
    "inspect",
    "load_base",
    "load_lm",
    "train",
    "train_text",
]

# Where each name lives. Importing the package must not cost an import of torch, so a name is looked up when it is used.
_HOMES = {
    "Adapters": "generation",
    "Blend": "generation.blend",
    "BlendConfig": "generation.config",
    "GenerateConfig": "generation.config",
    "Inspection": "formats",
    "LanguageModel": "bases",
    "Picture": "generation.generate",
    "Schedule": "generation",
    "Spec": "formats",
    "TextGenerateConfig": "generation.language_config",
    "TextTrainConfig": "training",
    "TrainConfig": "training",
    "UserError": "core.errors",
    "blend": "generation.blend",
    "generate": "generation.generate",
    "generate_text": "generation.language",
    "inspect": "formats",
    "load_base": "bases",
    "load_lm": "bases",
    "train": "training",
    "train_text": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
