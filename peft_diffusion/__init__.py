"""Teach Stable Diffusion a style from a folder of images, generate with it, blend several."""

from typing import TYPE_CHECKING

from .core.lazy import lazy

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import train, train_composition, train_text
    from .bases import LanguageModel, load_base, load_lm
    from .core.errors import UserError
    from .core.plugins import load_plugin
    from .data.caption_settings import CaptionConfig
    from .data.captioning import Captioned, caption
    from .evaluation.evaluate import evaluate
    from .evaluation.measured import Evaluation
    from .evaluation.picture_losses import PictureLosses
    from .evaluation.settings import EvaluateConfig
    from .formats import Inspection, Spec, inspect
    from .generation import Adapters, ByPart, Schedule
    from .generation.batching import Request
    from .generation.blend import Blend, blend
    from .generation.generate import Picture, generate
    from .generation.grid import Grid, grid
    from .generation.grid_settings import GridConfig
    from .generation.joining import Queue, Ticket
    from .generation.region_settings import Region
    from .generation.settings import BlendConfig, GenerateConfig, Sampling
    from .generation.text import generate_text
    from .generation.text_settings import TextGenerateConfig
    from .library import Found, Library
    from .tools.convert import Converted, convert
    from .tools.extraction import extract
    from .tools.labels import metadata, remove_metadata, rename_trigger, set_metadata
    from .tools.merging import merge
    from .tools.parting import join, split
    from .tools.resizing import resize
    from .tools.results import Made
    from .tools.scaling import strength
    from .tools.settings import ConvertConfig
    from .tools.tool_settings import (
        ExtractConfig,
        JoinConfig,
        MergeConfig,
        RenameTriggerConfig,
        ResizeConfig,
        SplitConfig,
        StrengthConfig,
    )
    from .training import ComposeTrainConfig, Dataset, TextTrainConfig, TrainConfig
    from .training.exporting import export
    from .training.settings.export import ExportConfig
    from .training.settings.imported import ImportConfig, import_config

__all__ = [
    "Adapters",
    "Blend",
    "BlendConfig",
    "ByPart",
    "CaptionConfig",
    "Captioned",
    "ComposeTrainConfig",
    "ConvertConfig",
    "Converted",
    "Dataset",
    "EvaluateConfig",
    "Evaluation",
    "ExportConfig",
    "ExtractConfig",
    "Found",
    "GenerateConfig",
    "Grid",
    "GridConfig",
    "ImportConfig",
    "Inspection",
    "JoinConfig",
    "LanguageModel",
    "Library",
    "Made",
    "MergeConfig",
    "Picture",
    "PictureLosses",
    "Queue",
    "Region",
    "RenameTriggerConfig",
    "Request",
    "ResizeConfig",
    "Sampling",
    "Schedule",
    "Spec",
    "SplitConfig",
    "StrengthConfig",
    "TextGenerateConfig",
    "TextTrainConfig",
    "Ticket",
    "TrainConfig",
    "UserError",
    "blend",
    "caption",
    "convert",
    "evaluate",
    "export",
    "extract",
    "generate",
    "generate_text",
    "grid",
    "import_config",
    "inspect",
    "join",
    "load_base",
    "load_lm",
    "load_plugin",
    "merge",
    "metadata",
    "remove_metadata",
    "rename_trigger",
    "resize",
    "set_metadata",
    "split",
    "strength",
    "train",
    "train_composition",
    "train_text",
]

if not TYPE_CHECKING:  # or a type checker takes any name for one of the package
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "Adapters": "generation",
            "Blend": "generation.blend",
            "BlendConfig": "generation.settings",
            "ByPart": "generation",
            "CaptionConfig": "data.caption_settings",
            "Captioned": "data.captioning",
            "EvaluateConfig": "evaluation.settings",
            "Evaluation": "evaluation.measured",
            "evaluate": "evaluation.evaluate",
            "ExportConfig": "training.settings.export",
            "ImportConfig": "training.settings.imported",
            "import_config": "training.settings.imported",
            "ExtractConfig": "tools.tool_settings",
            "ComposeTrainConfig": "training",
            "ConvertConfig": "tools.settings",
            "Converted": "tools.convert",
            "GenerateConfig": "generation.settings",
            "Grid": "generation.grid",
            "GridConfig": "generation.grid_settings",
            "Inspection": "formats",
            "JoinConfig": "tools.tool_settings",
            "LanguageModel": "bases",
            "Found": "library",
            "Library": "library",
            "Made": "tools.results",
            "MergeConfig": "tools.tool_settings",
            "Picture": "generation.generate",
            "PictureLosses": "evaluation.picture_losses",
            "Queue": "generation.joining",
            "RenameTriggerConfig": "tools.tool_settings",
            "Region": "generation.region_settings",
            "Request": "generation.batching",
            "ResizeConfig": "tools.tool_settings",
            "Sampling": "generation.settings",
            "Schedule": "generation",
            "Spec": "formats",
            "SplitConfig": "tools.tool_settings",
            "StrengthConfig": "tools.tool_settings",
            "TextGenerateConfig": "generation.text_settings",
            "Dataset": "training",
            "TextTrainConfig": "training",
            "Ticket": "generation.joining",
            "TrainConfig": "training",
            "UserError": "core.errors",
            "blend": "generation.blend",
            "caption": "data.captioning",
            "export": "training.exporting",
            "extract": "tools.extraction",
            "convert": "tools.convert",
            "generate": "generation.generate",
            "generate_text": "generation.text",
            "grid": "generation.grid",
            "inspect": "formats",
            "join": "tools.parting",
            "load_base": "bases",
            "load_lm": "bases",
            "load_plugin": "core.plugins",
            "merge": "tools.merging",
            "metadata": "tools.labels",
            "remove_metadata": "tools.labels",
            "rename_trigger": "tools.labels",
            "resize": "tools.resizing",
            "set_metadata": "tools.labels",
            "split": "tools.parting",
            "strength": "tools.scaling",
            "train": "api",
            "train_composition": "api",
            "train_text": "api",
        },
    )
