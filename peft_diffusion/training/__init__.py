"""Training: what a run is told (`config`), what it minimizes (`objective`), the loop (`trainer`), all of it (`main`)."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy
from .config import TrainConfig
from .language_config import TextTrainConfig

if TYPE_CHECKING:
    from .find_lr import FoundRates
    from .language_main import TextTrainResult, find_text_rates, train_text
    from .main import TrainResult, find_rates, train
    from .trainer import Interrupted

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
        "FoundRates": "find_lr",
        "Interrupted": "trainer",
        "TextTrainResult": "language_main",
        "TrainResult": "main",
        "find_rates": "main",
        "find_text_rates": "language_main",
        "train": "main",
        "train_text": "language_main",
    },
)
