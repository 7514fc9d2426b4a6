"""Training: what a run is told (`config`), what it minimizes (`objective`), the loop (`trainer`), all of it (`main`)."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy
from .settings.pictures import TrainConfig
from .settings.text import TextTrainConfig

if TYPE_CHECKING:
    from .language_main import TextTrainResult, find_text_rates, train_text
    from .loop.trainer import Interrupted
    from .main import TrainResult, find_rates, train
    from .watch.find_lr import FoundRates

__all__ = [
    "FoundRates",
    "Interrupted",
    "TextTrainConfig",
    "TextTrainResult",
    "TrainConfig",
    "TrainResult",
    "find_rates",
    "find_text_rates",
    "train",
    "train_text",
]

# The configuration is read by `--help`, which must not import torch.
__getattr__, __dir__ = lazy(
    __name__,
    {
        "FoundRates": "watch.find_lr",
        "Interrupted": "loop.trainer",
        "TextTrainResult": "language_main",
        "TrainResult": "main",
        "find_rates": "main",
        "find_text_rates": "language_main",
        "train": "main",
        "train_text": "language_main",
    },
)
