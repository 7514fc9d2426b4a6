"""Training: what a run is told (`settings`), its course (`run`) and loop (`loop`), what it learns (`tasks`) and leaves."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy
from .settings.pictures import TrainConfig
from .settings.text import TextTrainConfig

if TYPE_CHECKING:
    from .loop.trainer import Interrupted
    from .results import Outcome, TextTrainResult, TrainResult
    from .watch.find_lr import FoundRates

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
        "FoundRates": "watch.find_lr",
        "Interrupted": "loop.trainer",
        "Outcome": "results",
        "TextTrainResult": "results",
        "TrainResult": "results",
    },
)
