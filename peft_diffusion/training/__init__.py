"""Training: what a run is told (`config`), what it minimizes (`objective`), the loop (`trainer`), all of it (`main`)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import TrainConfig
from .language_config import TextTrainConfig

if TYPE_CHECKING:
    from .language_main import TextTrainResult, train_text
    from .main import TrainResult, train
    from .trainer import Interrupted

__all__ = ["Interrupted", "TextTrainConfig", "TextTrainResult", "TrainConfig", "TrainResult", "train", "train_text"]

_HOMES = {
    "Interrupted": "trainer",
    "TextTrainResult": "language_main",
    "TrainResult": "main",
    "train": "main",
    "train_text": "language_main",
}


def __getattr__(name: str) -> Any:
    # The configuration is read by `--help`, which must not import torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
