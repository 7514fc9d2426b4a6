"""How fast a run goes, how much memory it takes and when it will end."""

import time
from collections.abc import Callable

import torch

from ...core.events import Event, Observer
from ..events import Data, Losses, Measured, Pace, Preview, Saved


class PaceMeter:
    """Tells of a run's pace whenever losses are read, which is when the device has done all steps; an observer.

    How much is learned from in a second leaves out what is measured, drawn and written between steps. The time that is left
    does not: it is that of all steps so far, with all that came between, for those to come.

    Args:
        data: What is learned from.
        batch: Pictures or windows of a step, in all processes.
        steps: Steps of the whole run.
        first: Steps done before.
        device: Where it computes.
        tell: Is told.
        now: Gives the time in seconds.
    """

    def __init__(
        self,
        data: Data,
        batch: int,
        steps: int,
        first: int,
        device: torch.device,
        tell: Observer,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.data = data
        self.batch = batch
        self.steps = steps
        self.first = first
        self.device = device
        self.tell = tell
        self.now = now
        self.began = now()
        self.mark = (self.began, first)  # when the present stretch of steps began, and with which

    def __call__(self, event: Event) -> None:
        """Look at the clock."""
        match event:
            case Losses() if event.losses:
                self._read(event.losses[-1].step)
            case Measured() | Preview() | Saved():
                # Where losses were not read before previews, how long the steps before these took is not known.
                self.mark = (self.now(), max(event.step, self.mark[1]))
                if self.mark[1] == self.first:  # what is measured before the first step comes once
                    self.began = self.mark[0]

    def _read(self, step: int) -> None:
        now = self.now()
        since, before = self.mark
        self.mark = (now, step)
        if step <= before or now <= since:
            return
        left = (now - self.began) / (step - self.first) * (self.steps - step)
        rate = (step - before) * self.batch / (now - since)
        self.tell(Pace(step, self.steps, rate, left, device_memory(self.device), self.data))


def device_memory(device: torch.device) -> int | None:
    """Tell how much of an accelerator's memory this process holds.

    Args:
        device: The device.

    Returns:
        Bytes, with what its library keeps in reserve; None for a CPU, whose memory is everybody's.
    """
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    return None
