"""Teach Stable Diffusion a style from a folder of images, generate with it, blend several."""

from typing import TYPE_CHECKING

from .core.lazy import lazy

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import train, train_text
    from .bases import LanguageModel, load_base, load_lm
    from .core.errors import UserError
    from .core.plugins import load_plugin
    from .formats import Inspection, Spec, inspect
    from .generation import Adapters, Schedule
    from .generation.blend import Blend, blend
    from .generation.generate import Picture, generate
    from .generation.settings import BlendConfig, GenerateConfig
    from .generation.text import generate_text
    from .generation.text_settings import TextGenerateConfig
    from .tools.convert import Converted, convert
    from .tools.settings import ConvertConfig
    from .training import TextTrainConfig, TrainConfig

__all__ = [
    "Adapters",
    "Blend",
    "BlendConfig",
    "ConvertConfig",
    "Converted",
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
    "convert",
    "generate",
    "generate_text",
    "inspect",
    "load_base",
    "load_lm",
    "load_plugin",
    "train",
    "train_text",
]

if not TYPE_CHECKING:  # or a type checker takes any name for one of the package
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "Adapters": "generation",
            "Blend": "generation.blend",
            "BlendConfig": "generation.settings",
            "ConvertConfig": "tools.settings",
            "Converted": "tools.convert",
            "GenerateConfig": "generation.settings",
            "Inspection": "formats",
            "LanguageModel": "bases",
            "Picture": "generation.generate",
            "Schedule": "generation",
            "Spec": "formats",
            "TextGenerateConfig": "generation.text_settings",
            "TextTrainConfig": "training",
            "TrainConfig": "training",
            "UserError": "core.errors",
            "blend": "generation.blend",
            "convert": "tools.convert",
            "generate": "generation.generate",
            "generate_text": "generation.text",
            "inspect": "formats",
            "load_base": "bases",
            "load_lm": "bases",
            "load_plugin": "core.plugins",
            "train": "api",
            "train_text": "api",
        },
    )
