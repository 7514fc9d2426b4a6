"""How a run stands on its machine: what memory it takes, whether that is there, what is done to save it, and the time."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...bases.loading import first_line
from ...core.errors import UserError
from ...fast.cuda_graph import Inputs
from ..loop.trainer import Observer, Trainer
from ..settings.choices import Memory
from .low_memory import recomputed
from .preflight import Need, fits, mib, predict, room

_SMALL = 2**30  # bytes of weights up to which a run on a CPU is begun without a look at memory, which would take seconds
_MEASURED = 5  # steps that the time of a run is predicted from, after the first ones
_WARM_UP = 2


@dataclass(frozen=True)
class Footing:
    """What a run is weighed by. ``largest`` is its largest micro-batch; ``loaded`` is all that may lie on its device.

    ``drawing`` gives the bytes that previews take, where it draws any.
    ``chance`` says that dropout draws in the base's blocks; ``savings`` are flags that lower its need, in words.
    """

    memory: Memory
    trainer: Trainer
    parts: Sequence[nn.Module]
    loaded: Sequence[nn.Module]
    largest: Callable[[], Inputs]
    chance: bool
    savings: Sequence[str]
    drawing: Callable[[], int] | None = None

    @contextmanager
    def stand(self, say: Callable[[str], None]) -> Iterator[None]:
        """Train inside. Tells what the run takes; raises UserError where its device has not got it."""
        low = self._weigh(say)
        with recomputed(self.parts, self.chance) if low else nullcontext():
            yield

    def need(self, low: bool) -> Need:
        """What the run is predicted to take, with blocks computed again or not."""
        trainer = self.trainer
        arena, optimizer = trainer.arena, trainer.optimizer
        state = [*trainer.state().tensors.values(), *optimizer.counters(), arena.shared]
        if trainer.records:  # a recording keeps aside what its trial runs must not change
            state.append(torch.empty_like(arena.grad))
        with recomputed(self.parts, self.chance) if low else nullcontext():
            device = arena.flat.device
            need = predict(trainer.task.loss, self.largest(), self.loaded, state, device, trainer.records)
        return replace(need, drawing=self.drawing()) if self.drawing else need

    def _weigh(self, say: Callable[[str], None]) -> bool:
        """Whether blocks shall be computed again."""
        device, low = self.trainer.arena.flat.device, self.memory == "low"
        size = sum(parameter.nbytes for module in self.loaded for parameter in module.parameters())
        if device.type != "cuda" and (device.type != "cpu" or size < _SMALL):
            return low
        if self.trainer.crew.shares_base:
            hint = "" if low else "; should it not fit, --memory low takes less"
            say(f"memory: what the run takes is not predicted for a base that is sharded{hint}")
            return low
        there = room(device)
        try:
            need = self.need(low)
        except Exception as error:  # of tracing, for which torch has no public interface: no reason not to train
            say(f"memory: what the run takes cannot be told before it ({type(error).__name__}: {first_line(error)})")
            return low
        if not fits(need, there) and self.memory == "auto" and device.type == "cuda":
            plain, need, low = need, self.need(low=True), True
            say(f"memory: {mib(plain.total)} do not fit; as with --memory low, blocks of the base are computed twice")
        say(f"memory: {need}" + ("" if there is None else f"; {mib(there)} are there"))
        if not fits(need, there):
            savings = [*self.savings] if low else ["--memory low", *self.savings]
            savings += ["--preview-steps 0"] if need.total > replace(need, drawing=0).total else []
            raise UserError(
                f"this run needs {mib(need.total)} and {device} has {mib(there or 0)}; save memory with"
                f" {', '.join(savings)}, or free the device"
            )
        return low


class Clock(Observer):
    """Tells how long a run takes, from its first steps after those that warm up."""

    def __init__(self, steps: int, device: torch.device, say: Callable[[str], None]) -> None:
        self.steps = steps
        self.device = device
        self.say = say
        self.first: int | None = None
        self.began = 0.0

    def on_step(self, step: int) -> None:
        """Look at the clock twice."""
        if self.first is None:
            self.first = step
        if step == self.first + _WARM_UP:
            self.began = self._now()
        elif step == self.first + _WARM_UP + _MEASURED and step < self.steps:
            each = (self._now() - self.began) / _MEASURED
            left = each * (self.steps - step)
            self.say(f"time: {each:.3g} s a step, {_duration(left)} for the {self.steps - step} steps left")

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
