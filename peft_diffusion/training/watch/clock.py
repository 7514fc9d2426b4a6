"""How long a run will take."""

import time

import torch

from ...core.events import Observer
from ..events import TimePredicted

_WARM_UP = 2  # steps that are slower than others
_MEASURED = 5  # steps that the time of a run is predicted from, after those


class Clock:
    """Predicts how long a run takes, from its first steps after those that warm up.

    Args:
        steps: Steps of the whole run.
        device: Where it computes.
        tell: Is told the prediction.
    """

    def __init__(self, steps: int, device: torch.device, tell: Observer) -> None:
        self.steps = steps
        self.device = device
        self.tell = tell
        self.first: int | None = None
        self.began = 0.0

    def after_step(self, step: int) -> None:
        """Look at the clock twice in a run, to tell how long it will take.

        Args:
            step: The steps done.
        """
        if self.first is None:
            self.first = step
        if step == self.first + _WARM_UP:
            self.began = self._now()
        elif step == self.first + _WARM_UP + _MEASURED and step < self.steps:
            self.tell(TimePredicted((self._now() - self.began) / _MEASURED, self.steps - step))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()
