"""Training: what a run is told (`settings`), its course (`run`) and loop (`loop`), what it learns (`tasks`) and leaves."""

from typing import TYPE_CHECKING

from ..core.errors import Interrupted
from ..core.lazy import lazy
from .settings.pictures import TrainConfig
from .settings.text import TextTrainConfig

if TYPE_CHECKING:
    from .results import FoundRates, Outcome, TextTrainResult, TrainResult

__all__ = [
    "FoundRates",
    "Interrupted",
    "Outcome",
    "TextTrainConfig",
    "TextTrainResult",
    "TrainConfig",
    "TrainResult",
]

# The configuration is read by `--help`, which must not import torch.
__getattr__, __dir__ = lazy(
    __name__,
    {
        "FoundRates": "results",
        "Outcome": "results",
        "TextTrainResult": "results",
        "TrainResult": "results",
    },
)
