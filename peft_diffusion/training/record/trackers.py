"""Losses, measurements and previews of a run in TensorBoard, through accelerate's tracker."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import UserError
from ...core.events import Ended, Event
from ..events import Losses, Measured, Pace, Preview
from ..settings.choices import LogWith


def check_tracker(log_with: LogWith | None) -> None:
    """See that the package of a tracker is there.

    Args:
        log_with: The tracker.

    Raises:
        UserError: It is missing.
    """
    if log_with is not None and importlib.util.find_spec(log_with) is None:
        raise UserError(f"--log-with {log_with} needs a package: pip install 'peft_diffusion[{log_with}]'")


class Tracker:
    """Tells TensorBoard of a run; an observer.

    Args:
        folder: Where the logs go.
        step: The step that the run goes on from: what an earlier stretch logged after it is hidden.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from accelerate.tracking import TensorBoardTracker

        self.tracker: Any = TensorBoardTracker("", folder, purge_step=step + 1 if step else None)
        self.tracker.start()

    def __call__(self, event: Event) -> None:
        """Log losses and rates of each step, measurements, how fast it goes, and a preview for each prompt."""
        match event:
            case Losses():
                for one in event.losses:
                    rates = {f"learning rate/{name}": value for name, value in one.rates.items()}
                    self.tracker.log({"loss/training": one.loss, **rates}, step=one.step)
            case Measured():
                values = {"loss/seen": event.signals.seen, "leakage": event.signals.leakage, "loss/unseen": event.held_out}
                values |= {f"change/{layer}": value for layer, value in event.signals.changes.items()}
                self.tracker.log({name: value for name, value in values.items() if value is not None}, step=event.step)
            case Pace():
                speed = {f"speed/{event.data} a second": event.rate, "speed/minutes left": event.left / 60}
                held = {} if event.memory is None else {"memory/GiB on the device": event.memory / 2**30}
                self.tracker.log({**speed, **held}, step=event.step)
            case Preview():
                pairs = enumerate(zip(event.prompts, event.pictures, strict=True))
                images = {
                    f"previews/{number} {prompt}": np.asarray(picture.convert("RGB"))[None]
                    for number, (prompt, picture) in pairs
                }
                self.tracker.log_images(images, step=event.step, dataformats="NHWC")
            case Ended():
                self.tracker.finish()
