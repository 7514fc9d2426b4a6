"""Training: what a run is told (`settings`), its course (`run`) and loop (`loop`), what it learns (`tasks`) and leaves."""

from typing import TYPE_CHECKING

from ..core.errors import Interrupted
from ..core.lazy import lazy

if TYPE_CHECKING:
    from .results import FoundRates, Outcome, TextTrainResult, TrainResult
    from .settings.composing import ComposeTrainConfig
    from .settings.datasets import Dataset
    from .settings.pictures import TrainConfig
    from .settings.text import TextTrainConfig

__all__ = [
    "ComposeTrainConfig",
    "Dataset",
    "FoundRates",
    "Interrupted",
    "Outcome",
    "TextTrainConfig",
    "TextTrainResult",
    "TrainConfig",
    "TrainResult",
]

# The settings of a command are read by its `--help`, which must not import torch, nor the settings of other commands.
if not TYPE_CHECKING:  # or a type checker takes any name for one of the package
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "ComposeTrainConfig": "settings.composing",
            "Dataset": "settings.datasets",
            "FoundRates": "results",
            "Outcome": "results",
            "TextTrainConfig": "settings.text",
            "TextTrainResult": "results",
            "TrainConfig": "settings.pictures",
            "TrainResult": "results",
        },
    )
