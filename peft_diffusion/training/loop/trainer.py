"""The training loop. It knows a task and an arena, and nothing of images or text."""

import itertools
import math
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ...core.arena import Arena
from ...core.errors import UserError
from ...fast.cuda_graph import Inputs, Recorder, cause, to_device
from ...fast.low_rank import Working
from ..machine.processes import Crew
from ..settings.choices import OptimizerName, Scheduler
from .learning_rate import rate
from .optimizers import OPTIMIZERS, FlatOptimizer


class Task(Protocol):
    """What is learned. All chance depends on the step and the micro-batch alone, so that a run can be resumed.

    What is prepared on the host is apart from what is computed from it on the device, so that the latter can be recorded.
    """

    def inputs(self, step: int, micro: int) -> Inputs:
        """What micro-batch ``micro`` of a step (both from 0) is computed from, on the CPU."""
        ...

    def seeded(self, step: int, micro: int) -> AbstractContextManager[None]:
        """torch's global generators as they shall be for a micro-batch: dropout draws from them."""
        ...

    def loss(self, inputs: Inputs) -> Tensor:
        """The scalar to minimize, from inputs on the device; it reads nothing else that changes but the weights."""
        ...

    def held_out(self) -> float | None:
        """The loss on what is never trained on, always by the same measure; None where nothing is kept apart."""
        ...

    def signals(self) -> "Signals":
        """What else tells when to stop, on fixed noise."""
        ...


@dataclass(frozen=True)
class Signals:
    """Beside the loss on what is kept apart. None is what cannot be measured.

    ``seen`` is the same loss on a few of those that are trained on. ``leakage`` is how far the base's answers moved that
    the adapter should leave alone (0 is not at all): for pictures the rms of the difference over that of the base's, for
    text the Kullback-Leibler divergence in nats per token. ``changes`` has how far each layer moved, see
    `signals.layer_changes`.
    """

    seen: float | None = None
    leakage: float | None = None
    changes: Mapping[str, float] = field(default_factory=dict)


class Observer:
    """What may be watched; every method does nothing unless overridden. ``step`` counts the steps done."""

    def on_step(self, step: int) -> None:
        """After each step, without waiting for the device."""

    def on_losses(self, losses: Sequence["StepLoss"]) -> None:
        """The losses since the last call, in order."""

    def on_held_out(self, step: int, loss: float) -> None:
        """A measurement on what is kept apart."""

    def on_signals(self, step: int, signals: Signals) -> None:
        """What was measured beside it, before or after that."""

    def on_pictures(self, step: int, prompts: Sequence[str], pictures: Sequence[Image.Image]) -> None:
        """Previews were drawn: one for each prompt, with the weights after so many steps."""

    def on_unrecorded(self, why: str) -> None:
        """Steps cannot be recorded as CUDA graphs, and run one operation after the other."""

    def on_checkpoint(self, state: "TrainerState") -> None:
        """A good state to go on from; its tensors change with the next step."""


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step, and the learning rates that it was made with."""

    step: int
    loss: float
    rates: Mapping[str, float]


@dataclass(frozen=True)
class TrainerSettings:
    """How to minimize. ``rates`` has a learning rate per group of the arena; ``clip`` and ``ema`` 0 are off.

    ``patience`` is how many measurements may pass without a new lowest one before the run ends; 0 is any number.
    ``cuda_graph`` runs the steps from CUDA graphs, on CUDA. Groups among ``undecayed`` have no weight decay: embeddings are
    no changes, which 0 would undo.
    """

    steps: int
    rates: Mapping[str, float]
    accumulation: int = 1
    scheduler: Scheduler = "constant"
    warmup: int = 0
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0
    log_every: int = 10
    save_every: int = 100
    patience: int = 0
    cuda_graph: bool = True
    undecayed: frozenset[str] = frozenset()
    optimizer: OptimizerName = "adamw"


@dataclass
class Divergence:
    """Sees a running loss that leaves its early value behind."""

    early: float = 0.0
    running: float = 0.0
    seen: int = 0

    WINDOW = 20  # losses that the early value is a mean of
    TIMES = 4.0  # how often the early value is too much

    def add(self, loss: float) -> bool:
        """Take a loss in; whether the run diverges."""
        self.seen += 1
        if self.seen <= self.WINDOW:
            self.early += (loss - self.early) / self.seen
            self.running = self.early
            return False
        self.running += (loss - self.running) / self.WINDOW
        return self.running > self.TIMES * self.early


@dataclass(frozen=True)
class TrainerState:
    """All that a run goes on from: steps done, flat tensors by name, and what was seen of the loss."""

    step: int
    tensors: dict[str, Tensor]
    divergence: Divergence = field(default_factory=Divergence)


def loss_at(task: Task, step: int, micro: int, device: torch.device) -> Tensor:
    """The loss of one micro-batch, computed as a step computes it."""
    inputs = to_device(task.inputs(step, micro), device)
    with task.seeded(step, micro):
        return task.loss(inputs)


class Trainer:
    """An optimizer over the groups of an arena, with accumulation, clipping, schedule and average.

    On CUDA a step is two recordings: forward and backward of a micro-batch, one for each shape of its inputs, and what
    follows from the gradients. ``unrecorded`` says why not, where that cannot be.
    """

    def __init__(
        self,
        task: Task,
        arena: Arena,
        settings: TrainerSettings,
        observers: Sequence[Observer] = (),
        crew: Crew = Crew(),  # noqa: B008 -- frozen
    ) -> None:
        self.task = task
        self.crew = crew
        self.arena = arena
        self.settings = settings
        self.observers = list(observers)
        self.step = 0
        self.saved = -1  # the step of the last checkpoint
        self.divergence = Divergence()
        self.measured: dict[int, float] = {}  # losses on what is kept apart, by step
        self.chosen: Tensor | None = None  # weights that the run gives in place of its last ones
        self.unread: list[Tensor] = []
        self.average = arena.flat.clone() if settings.ema else None
        self.total = arena.beside[0]  # the loss of the step, over its micro-batches
        self.follow = torch.zeros((), device=arena.flat.device)  # how far the average moves to the weights
        self.unrecorded: str | None = None
        self.records = settings.cuda_graph and arena.flat.device.type == "cuda"
        self.optimizer = self._optimizer()
        self.working = Working(arena.flat, arena.grad)
        device = arena.flat.device
        self.gradients = Recorder(self._add_gradients, lambda: [arena.grad, self.total], device, lambda: self.working.full)
        self.update = Recorder(self._update, self._updated, device)

    def run(self, until: int | None = None) -> bool:
        """Train to the last step, or to ``until``; False where Ctrl-C (SIGINT) or SIGTERM ended it early, after saving.

        Where patience ends it, it has come to its end.

        Raises UserError where the loss is not finite or runs away.
        """
        end = self.settings.steps if until is None else min(until, self.settings.steps)
        with _stop_on_signal() as stop:
            if self.step == 0:
                self._measure()
            given_up = self._gives_up()
            while self.step < end and not given_up and not self._stops(stop):
                self._step()
                if self.step % self.settings.log_every == 0:
                    self._read()
                if self.step % self.settings.save_every == 0 or self.step == self.settings.steps:
                    self._measure()
                    self._save()
                    given_up = self._gives_up()
            if self.saved != self.step and self.step:
                self._save()
        return self.step >= end or given_up

    def _gives_up(self) -> bool:
        """Whether the patience is over; the processes that measure decide for all."""
        patience = self.settings.patience
        if not patience:
            return False
        best = min(self.measured, key=lambda step: self.measured[step], default=0)
        over = sum(step > best for step in self.measured) >= patience
        return over if self.crew.size == 1 else self.crew.any(over, self.arena.flat.device)

    def _stops(self, stop: threading.Event) -> bool:
        """Whether to end early. Of several processes, all have to: they agree when losses are read, which takes a while."""
        if self.crew.size == 1:
            return stop.is_set()
        return self.step % self.settings.log_every == 0 and self.crew.any(stop.is_set(), self.arena.flat.device)

    def state(self) -> TrainerState:
        """Where the run stands; views, not copies."""
        tensors = {"parameters": self.arena.flat, **self.optimizer.tensors()}
        if self.average is not None:
            tensors["average"] = self.average
        return TrainerState(self.step, tensors, self.divergence)

    def load(self, state: TrainerState) -> None:
        """Go on from a state of a run with these settings."""
        own = self.state().tensors
        for name, tensor in own.items():
            tensor.copy_(state.tensors[name])
        self.optimizer.go_on_from(state.step)
        self.step = self.saved = state.step
        self.divergence = state.divergence

    def given(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weights that the run gives in a state of these tensors."""
        if "average" in tensors:
            return tensors["average"]
        parameters = tensors["parameters"]
        own = self.optimizer.final(parameters, tensors)
        return parameters if own is None else own

    @contextmanager
    def final_weights(self) -> Iterator[None]:
        """The weights that the run gives, in the model: those chosen, else the average, or the optimizer's own."""
        given = self.given(self.state().tensors) if self.chosen is None else self.chosen
        if given is self.arena.flat:
            yield
            return
        present = self.arena.flat.clone()
        self.arena.load(given)
        try:
            yield
        finally:
            self.arena.load(present)

    def _optimizer(self) -> FlatOptimizer:
        settings = self.settings
        decays = {name: 0.0 if name in settings.undecayed else settings.weight_decay for name in self.arena.groups}
        return OPTIMIZERS[settings.optimizer](self.arena, settings.rates, decays, self.records)

    def _step(self) -> None:
        settings = self.settings
        self.arena.zero_grad()
        self.total.zero_()
        for micro in range(settings.accumulation):
            inputs = self.task.inputs(self.step, micro)
            with self.task.seeded(self.step, micro):
                self._do(self.gradients, inputs)
        self.crew.mean(self.arena.shared)
        self.optimizer.set_rates(self._rates(self.step))
        if self.average is not None:
            # The first steps weigh little in a long average: it follows faster while it is young.
            self.follow.fill_(1 - min(settings.ema, (2 + self.step) / (11 + self.step)))
        if self.optimizer.records:
            self._do(self.update, {})
        else:
            self._update({})
        self.unread.append(self.total.clone())
        self.step += 1
        for observer in self.observers:
            observer.on_step(self.step)

    def _do(self, recorder: Recorder, inputs: Inputs) -> None:
        """Work of a step, from its recording where there can be one."""
        if self.records:
            try:
                recorder(inputs)
                return
            except RuntimeError as error:  # of CUDA, and of code that asks the device in between
                why = cause(error)
                if "out of memory" in f"{error} {why}".lower():
                    raise
                self.records = False
                self.unrecorded = why
                for observer in self.observers:
                    observer.on_unrecorded(self.unrecorded)
        recorder.work(to_device(inputs, self.arena.flat.device))

    def _add_gradients(self, inputs: Inputs) -> None:
        """Forward and backward of a micro-batch."""
        with self.working.passing():
            loss = self.task.loss(inputs) / self.settings.accumulation
            loss.backward()  # type: ignore[no-untyped-call]
        self.total.add_(loss.detach())

    def _update(self, _: Inputs) -> None:
        """What follows from a step's gradients."""
        if self.settings.clip:
            self.arena.clip(self.settings.clip)
        self.optimizer.optimizer.step()
        if self.average is not None:
            self.average.lerp_(self.arena.flat, self.follow)

    def _updated(self) -> list[Tensor]:
        """All that ``_update`` changes."""
        state = self.state().tensors
        return [self.arena.grad, *state.values(), *self.optimizer.counters()]

    def _rates(self, step: int) -> dict[str, float]:
        factor = rate(self.settings.scheduler, step, self.settings.steps, self.settings.warmup)
        return {name: factor * self.settings.rates[name] for name in self.arena.groups}

    def _read(self) -> None:
        """Fetch the losses from the device, and stop where they are no good."""
        if not self.unread:
            return
        first = self.step - len(self.unread) + 1
        values = torch.stack(self.unread).tolist()
        self.unread.clear()
        losses = [StepLoss(step, loss, self._rates(step - 1)) for step, loss in enumerate(values, first)]
        good = list(itertools.takewhile(lambda loss: math.isfinite(loss.loss), losses))
        for observer in self.observers:
            observer.on_losses(good)
        for loss in losses:
            if not math.isfinite(loss.loss):
                raise self._lost(loss.step, f"the loss is {loss.loss}")
            if self.divergence.add(loss.loss):
                seen = f"{self.divergence.running:.3g}, from {self.divergence.early:.3g} at first"
                raise self._lost(loss.step, f"the loss runs away: {seen}")

    def _read_all(self) -> None:
        """Read the losses, and look at the weights: a loss tells only of those before its step."""
        self._read()
        if not bool(self.arena.flat.isfinite().all()):
            raise self._lost(self.step, "weights are not finite")

    def _measure(self) -> None:
        self._read_all()
        if not self.crew.measures:
            return
        with self.final_weights():
            loss = self.crew.agreed(self.task.held_out())
            signals = self.task.signals()
        for observer in self.observers:
            observer.on_signals(self.step, signals)
        if loss is not None:
            self.measured[self.step] = loss
            for observer in self.observers:
                observer.on_held_out(self.step, loss)

    def _save(self) -> None:
        self._read_all()
        for observer in self.observers:
            observer.on_checkpoint(self.state())
        self.saved = self.step

    def _lost(self, step: int, what: str) -> "Diverged":
        rates = ", ".join(f"{name} {value:g}" for name, value in self.settings.rates.items())
        kept = f"the checkpoint of step {self.saved} is kept" if self.saved > 0 else "no checkpoint was made before"
        return Diverged(
            f"step {step}: {what}; {kept}. Lower the learning rate ({rates}), lengthen the warm-up"
            f" ({self.settings.warmup} steps), or raise the precision"
        )


class Diverged(UserError):
    """A loss or weights that are no good any more."""


class Interrupted(KeyboardInterrupt):
    """A run that was stopped by a signal, after it saved a checkpoint; the message says how to go on."""


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; a second signal acts as it always does."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
