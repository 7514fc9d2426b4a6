"""Training: what a run is told (`config`), what it minimizes (`objective`), the loop (`trainer`), all of it (`main`)."""

from typing import TYPE_CHECKING

from ..core.lazy import lazy
from .config import TrainConfig
from .language_config import TextTrainConfig

if TYPE_CHECKING:
    from .language_main import TextTrainResult, train_text
    from .main import TrainResult, train
    from .trainer import Interrupted

__all__ = ["Interrupted", "TextTrainConfig", "TextTrainResult", "TrainConfig", "TrainResult", "train", "train_text"]

# The configuration is read by `--help`, which must not import torch.
__getattr__, __dir__ = lazy(
    __name__,
    {
        "Interrupted": "trainer",
        "TextTrainResult": "language_main",
        "TrainResult": "main",
        "train": "main",
        "train_text": "language_main",
    },
)
