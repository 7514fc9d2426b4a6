"""The training loop. It knows a task and an arena, and nothing of images or text."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ...core.arena import Arena
from ...core.errors import UserError
from ...core.events import Event, Never, Observer, Stop
from ...fast.cuda_graph import Inputs, Recorder, cause, to_device
from ..events import Data, Losses, Measured, Signals, Step, StepLeftOut, StepLoss, Unrecorded
from ..machine.processes import Processes
from ..settings.choices import OptimizerName, Scheduler
from .learning_rate import Shape, rate
from .loss_scale import LossScale
from .optimizers import OPTIMIZERS, FlatOptimizer

_SCALE = "loss_scale"  # among the tensors of a state


class Task(Protocol):
    """What is learned. All chance depends on the step and the micro-batch alone, so that a run can be resumed.

    What is prepared on the host is apart from what is computed from it on the device, so that the latter can be recorded.
    """

    def inputs(self, step: int, micro: int) -> Inputs:
        """What micro-batch ``micro`` of a step (both from 0) is computed from, on the CPU."""
        ...

    def seeded(self, step: int, micro: int) -> AbstractContextManager[object]:
        """What else chance decides of a micro-batch: torch's global generators, which dropout draws from, and whether
        adapters that it is trained beside take part."""
        ...

    def loss(self, inputs: Inputs) -> Tensor:
        """The scalar to minimize, from inputs on the device; it reads nothing else that changes but the weights."""
        ...

    def held_out(self) -> float | None:
        """The loss on what is never trained on, always by the same measure; None where nothing is kept apart."""
        ...

    def signals(self) -> Signals:
        """What else tells when to stop, on fixed noise."""
        ...


@dataclass(frozen=True)
class TrainerSettings:
    """How to minimize. ``rates`` has a learning rate per group of the arena; ``clip`` and ``ema`` 0 are off.

    ``patience`` is how many measurements may pass without a new lowest one before the run ends; 0 is any number. ``ends``
    has the step from which a group learns no more, for those that end before the run. ``cuda_graph`` runs the steps from
    CUDA graphs, on CUDA. ``loss_scaling`` is for gradients that are computed in float16. Groups among ``undecayed`` have no
    weight decay: embeddings are no changes, which 0 would undo.
    """

    steps: int
    rates: Mapping[str, float]
    accumulation: int = 1
    scheduler: Scheduler = "constant"
    warmup: int = 0
    cycles: int = 1
    power: float = 1.0
    decay: float = 0.2
    ends: Mapping[str, int] = field(default_factory=dict)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0
    log_every: int = 10
    save_every: int = 100
    patience: int = 0
    cuda_graph: bool = True
    undecayed: frozenset[str] = frozenset()
    optimizer: OptimizerName = "adamw"
    loss_scaling: bool = False


class Passes(Protocol):
    """What every pass forward and backward runs inside, such as a fast path of a method: `fast.low_rank.Working` is one."""

    def passing(self) -> AbstractContextManager[None]:
        """Give what a pass runs inside."""
        ...

    @property
    def full(self) -> bool:
        """Whether a recording of a pass still holds."""
        ...


class PlainPasses:
    """Passes with nothing around them."""

    full = True

    def passing(self) -> AbstractContextManager[None]:
        """Give nothing to run inside."""
        return nullcontext()


@dataclass
class Divergence:
    """Sees a running loss that leaves its early value behind."""

    early: float = 0.0
    running: float = 0.0
    seen: int = 0

    WINDOW = 20  # losses that the early value is a mean of
    TIMES = 4.0  # how often the early value is too much

    def add(self, loss: float) -> bool:
        """Take a loss in.

        Args:
            loss: Of a step.

        Returns:
            Whether the run diverges.
        """
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
    """Compute the loss of one micro-batch as a step computes it.

    Args:
        task: What is learned.
        step: From 0.
        micro: The micro-batch of the step, from 0.
        device: Where.

    Returns:
        A scalar with gradients to the adapter.
    """
    inputs = to_device(task.inputs(step, micro), device)
    with task.seeded(step, micro):
        return task.loss(inputs)


class Trainer:
    """An optimizer over the groups of an arena, with accumulation, clipping, schedule and average.

    On CUDA a step is two recordings: forward and backward of a micro-batch, one for each shape of its inputs, and what
    follows from the gradients. ``unrecorded`` says why not, where that cannot be.

    Args:
        task: What is learned.
        arena: The parameters, in groups, with their gradients.
        settings: How to minimize.
        observers: Are told of steps, losses and measurements.
        processes: The processes that train together.
        data: What is learned from, for those who read of measurements.
        keep: Is given a state to go on from now and then; its tensors change with the next step.
        after_step: Is done after each step, with the number of those done, such as drawing previews.
        passes: What every pass forward and backward runs inside.
        penalty: Gives what is added to the loss of each micro-batch and depends on the weights alone; None for nothing.
    """

    def __init__(
        self,
        task: Task,
        arena: Arena,
        settings: TrainerSettings,
        observers: Sequence[Observer] = (),
        *,
        processes: Processes = Processes(),  # noqa: B008 -- frozen
        data: Data = "pictures",
        keep: Callable[["TrainerState"], None] | None = None,
        after_step: Sequence[Callable[[int], None]] = (),
        passes: Passes = PlainPasses(),  # noqa: B008 -- has no state
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        self.task = task
        self.processes = processes
        self.arena = arena
        self.settings = settings
        self.observers = list(observers)
        self.data = data
        self.keep = keep
        self.after_step = list(after_step)
        self.passes = passes
        self.penalty = penalty
        self.step = 0
        self.saved = -1  # the step of the last checkpoint
        self.divergence = Divergence()
        self.measured: dict[int, float] = {}  # losses on what is kept apart, by step
        self.result_weights: Tensor | None = None  # weights that the run gives in place of its last ones
        self.unread: list[Tensor] = []
        self.average = arena.flat.clone() if settings.ema else None
        self.total = arena.beside[0]  # the loss of the step, over its micro-batches
        self.follow = torch.zeros((), device=arena.flat.device)  # how far the average moves to the weights
        self.unrecorded: str | None = None
        self.records = settings.cuda_graph and arena.flat.device.type == "cuda"
        self.loss_scale = LossScale(arena.flat.device) if settings.loss_scaling else None
        self.left_out: set[int] = set()  # steps whose losses were not read yet
        self.optimizer = self._optimizer()
        device = arena.flat.device
        self.gradients = Recorder(self._add_gradients, lambda: [arena.grad, self.total], device, lambda: self.passes.full)
        self.update = Recorder(self._update, self._updated, device)

    def run(self, until: int | None = None, stop: Stop = Never()) -> bool:  # noqa: B008 -- has no state
        """Train to the last step.

        Args:
            until: A step to end at before that.
            stop: Where it is set, the run ends after the present step, and saves.

        Returns:
            Whether it came to its end, by steps or by patience; False where it was stopped.

        Raises:
            UserError: The loss is not finite or runs away.
        """
        end = self.settings.steps if until is None else min(until, self.settings.steps)
        if self.step == 0:
            self._measure()
        given_up = self._gives_up()
        while self.step < end and not given_up and not self._stops(stop):
            self._step()
            saves = self.step % self.settings.save_every == 0 or self.step == self.settings.steps
            if saves or self.step % self.settings.log_every == 0:
                self._read()  # before previews are drawn: nothing is drawn with what diverged, and no pace counts it
            for action in self.after_step:
                action(self.step)
            if saves:
                self._measure()
                self._save()
                given_up = self._gives_up()
        if self.saved != self.step and self.step:
            self._save()
        return self.step >= end or given_up

    def tell(self, event: Event) -> None:
        """Tell an event to the observers.

        Args:
            event: What happened.
        """
        for observer in self.observers:
            observer(event)

    def _gives_up(self) -> bool:
        """Whether the patience is over; the processes that measure decide for all."""
        patience = self.settings.patience
        if not patience:
            return False
        best = min(self.measured, key=lambda step: self.measured[step], default=0)
        over = sum(step > best for step in self.measured) >= patience
        return over if self.processes.size == 1 else self.processes.any(over, self.arena.flat.device)

    def _stops(self, stop: Stop) -> bool:
        """Whether to end early. Of several processes, all have to: they agree when losses are read, which takes a while."""
        if self.processes.size == 1:
            return stop.is_set()
        return self.step % self.settings.log_every == 0 and self.processes.any(stop.is_set(), self.arena.flat.device)

    def state(self) -> TrainerState:
        """Where the run stands; views, not copies."""
        tensors = {"parameters": self.arena.flat, **self.optimizer.tensors()}
        if self.average is not None:
            tensors["average"] = self.average
        if self.loss_scale is not None:
            tensors[_SCALE] = self.loss_scale.kept
        return TrainerState(self.step, tensors, self.divergence)

    def held(self) -> list[Tensor]:
        """All that is held on the device for training, beside the base; views, not copies."""
        found = [*self.state().tensors.values(), *self.optimizer.counters(), self.arena.shared]
        if self.records:  # a recording keeps aside what its trial runs must not change
            found.append(torch.empty_like(self.arena.grad))
        return found

    def load(self, state: TrainerState) -> None:
        """Go on from a state of a run with these settings.

        Args:
            state: From `state`, or a checkpoint.
        """
        own = self.state().tensors
        for name, tensor in own.items():
            tensor.copy_(state.tensors[name])
        if self.loss_scale is not None:
            self.loss_scale.go_on()
        self.optimizer.go_on_from(state.step - (self.loss_scale.left_out if self.loss_scale else 0))
        self.step = self.saved = state.step
        self.divergence = state.divergence

    def given(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Find the weights that the run gives in a state.

        Args:
            tensors: Those of the state.

        Returns:
            The average, the optimizer's own, or the parameters.
        """
        if "average" in tensors:
            return tensors["average"]
        parameters = tensors["parameters"]
        own = self.optimizer.final(parameters, tensors)
        return parameters if own is None else own

    @contextmanager
    def final_weights(self) -> Iterator[None]:
        """The weights that the run gives, in the model: those chosen, else the average, or the optimizer's own."""
        given = self.given(self.state().tensors) if self.result_weights is None else self.result_weights
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
        self.processes.mean(self.arena.shared)
        rates = self._rates(self.step)
        self.arena.forget_gradients([name for name, rate in rates.items() if rate == 0])
        self.optimizer.set_rates(rates)
        if self.average is not None:
            # The first steps weigh little in a long average: it follows faster while it is young.
            self.follow.fill_(1 - min(settings.ema, (2 + self.step) / (11 + self.step)))
        if self.loss_scale is None or self.loss_scale.unscale(self.arena.grad):
            if self.optimizer.records:
                self._do(self.update, {})
            else:
                self._update({})
        else:
            self._leave_out(self.loss_scale)
        self.unread.append(self.total.clone())
        self.step += 1
        self.tell(Step(self.step, settings.steps))

    def _leave_out(self, scale: LossScale) -> None:
        """Go on without the update of a step whose gradients were not finite. Raises Diverged where none ever are."""
        self.left_out.add(self.step + 1)
        if scale.hopeless:
            raise self._lost(self.step + 1, "the gradients are not finite at any loss scale")
        self.tell(StepLeftOut(self.step + 1, scale.left_out, scale.scale))

    def _do(self, recorder: Recorder[None], inputs: Inputs) -> None:
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
                self.tell(Unrecorded(why))
        recorder.work(to_device(inputs, self.arena.flat.device))

    def _add_gradients(self, inputs: Inputs) -> None:
        """Forward and backward of a micro-batch."""
        with self.passes.passing():
            loss = self.task.loss(inputs)
            loss = (loss if self.penalty is None else loss + self.penalty()) / self.settings.accumulation
            (loss if self.loss_scale is None else loss * self.loss_scale.factor).backward()
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
        state = {name: tensor for name, tensor in self.state().tensors.items() if name != _SCALE}
        return [self.arena.grad, *state.values(), *self.optimizer.counters()]

    def _rates(self, step: int) -> dict[str, float]:
        settings = self.settings
        shape = Shape(settings.cycles, settings.power, settings.decay)
        factor = rate(settings.scheduler, step, settings.steps, settings.warmup, shape)
        ended = {name for name, end in settings.ends.items() if step >= end}
        return {name: 0.0 if name in ended else factor * settings.rates[name] for name in self.arena.groups}

    def _read(self) -> None:
        """Fetch the losses from the device, and stop where they are no good."""
        if not self.unread:
            return
        first = self.step - len(self.unread) + 1
        values = torch.stack(self.unread).tolist()
        self.unread.clear()
        read = [(step, loss) for step, loss in enumerate(values, first) if step not in self.left_out]
        losses = [StepLoss(step, loss, self._rates(step - 1)) for step, loss in read]
        self.left_out.clear()
        self.tell(Losses(tuple(itertools.takewhile(lambda loss: math.isfinite(loss.loss), losses))))
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
        if not self.processes.measures:
            return
        with self.final_weights():
            loss = self.processes.agreed(self.task.held_out())
            signals = self.task.signals()
        if loss is not None:
            self.measured[self.step] = loss
        self.tell(Measured(self.step, loss, signals, self.data))

    def _save(self) -> None:
        self._read_all()
        if self.keep is not None:
            self.keep(self.state())
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
