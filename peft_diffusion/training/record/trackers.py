"""Losses, measurements and previews of a run in TensorBoard, through accelerate's tracker."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...core.errors import UserError
from ..loop.trainer import Observer, Signals, StepLoss
from ..settings.choices import LogWith


def check_tracker(log_with: LogWith | None) -> None:
    """Raise UserError where the package of a tracker is missing."""
    if log_with is not None and importlib.util.find_spec(log_with) is None:
        raise UserError(f"--log-with {log_with} needs a package: pip install 'peft_diffusion[{log_with}]'")


class Tracker(Observer):
    """Tells TensorBoard of a run. What an earlier stretch logged after ``step``, from which the run goes on, is hidden."""

    def __init__(self, folder: Path, step: int) -> None:
        from accelerate.tracking import TensorBoardTracker

        self.tracker: Any = TensorBoardTracker("", folder, purge_step=step + 1 if step else None)
        self.tracker.start()

    def on_losses(self, losses: Sequence[StepLoss]) -> None:
        """Loss and learning rates of each step."""
        for one in losses:
            rates = {f"learning rate/{name}": value for name, value in one.rates.items()}
            self.tracker.log({"loss/training": one.loss, **rates}, step=one.step)

    def on_held_out(self, step: int, loss: float) -> None:
        """Beside the training loss."""
        self.tracker.log({"loss/unseen": loss}, step=step)

    def on_signals(self, step: int, signals: Signals) -> None:
        """What else tells when to stop, and how far each layer moved."""
        values = {"loss/seen": signals.seen, "leakage": signals.leakage}
        values |= {f"change/{layer}": value for layer, value in signals.changes.items()}
        self.tracker.log({name: value for name, value in values.items() if value is not None}, step=step)

    def on_pictures(self, step: int, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> None:
        """A preview for each prompt."""
        images = {
            f"previews/{number} {prompt}": np.asarray(picture.convert("RGB"))[None]
            for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True))
        }
        self.tracker.log_images(images, step=step, dataformats="NHWC")

    def finish(self) -> None:
        """Write what is left, and close the file."""
        self.tracker.finish()
