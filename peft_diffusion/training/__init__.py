"""Training: what a run is told (`config`), what it minimizes (`objective`), the loop (`trainer`), all of it (`main`)."""

from typing import TYPE_CHECKING, Any

from .config import TrainConfig

if TYPE_CHECKING:
    from .main import TrainResult, train
    from .trainer import Interrupted

__all__ = ["Interrupted", "TrainConfig", "TrainResult", "train"]


def __getattr__(name: str) -> Any:
    # The configuration is read by `--help`, which must not import torch.
    if name in __all__:
        from . import main

        return getattr(main, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
