"""What memory a run takes, whether its device has it, and what is done to save some."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...core.errors import UserError, first_line
from ...core.events import Observer
from ...fast import frozen_ops
from ...fast.compiling import compile_ahead
from ...fast.cuda_graph import Inputs
from ..events import MemoryPredicted, MemorySaved, MemoryUnknown
from ..need import Need, fits, mib
from ..settings.choices import Memory
from .low_memory import recomputed
from .preflight import predict, room

SMALL = 2**30
"""Bytes of weights up to which a run on a CPU is begun without a look at memory, which would take seconds."""


@dataclass(frozen=True)
class Load:
    """What of a run takes memory, beside its trainer.

    Attributes:
        parts: The components that compute in a step.
        loaded: All modules that may lie on the device.
        largest: Gives the largest micro-batch.
        dropout: Whether dropout draws random numbers in the base's blocks.
        savings: Flags that lower what the run takes, in words.
        drawing: Gives the bytes that previews take; None where none are drawn.
    """

    parts: Sequence[nn.Module]
    loaded: Sequence[nn.Module]
    largest: Callable[[], Inputs]
    dropout: bool
    savings: Sequence[str]
    drawing: Callable[[], int] | None = None


@dataclass(frozen=True)
class MemoryPlan:
    """How a run uses the memory of its device.

    Attributes:
        memory: What was asked for.
        load: What takes memory.
        loss: Computes the loss of inputs on the device.
        held: Gives all tensors that training holds on the device, beside the base.
        device: Where the run computes.
        records: Whether steps are recorded as CUDA graphs.
        sharded: Whether the base is sharded over several processes.
    """

    memory: Memory
    load: Load
    loss: Callable[[Inputs], Tensor]
    held: Callable[[], list[Tensor]]
    device: torch.device
    records: bool
    sharded: bool

    @contextmanager
    def applied(self, tell: Observer) -> Iterator[None]:
        """Train inside, with blocks of the base computed twice where that is decided.

        Args:
            tell: Is told what the run takes.

        Raises:
            UserError: The device has not got what the run takes.
        """
        low = self.recomputes(tell)
        with recomputed(self.load.parts, self.load.dropout) if low else nullcontext():
            yield

    def need(self, low: bool) -> Need:
        """Predict what the run takes.

        Args:
            low: Whether blocks of the base are computed twice.

        Returns:
            The bytes.
        """
        load, held = self.load, self.held()
        with recomputed(load.parts, load.dropout) if low else nullcontext():
            need = predict(self.loss, load.largest(), load.loaded, held, self.device, self.records)
        return replace(need, drawing=load.drawing()) if load.drawing else need

    def recomputes(self, tell: Observer) -> bool:
        """Decide whether blocks of the base are computed twice, to hold less of them.

        Args:
            tell: Is told what the run takes.

        Returns:
            Whether they are.

        Raises:
            UserError: The device has not got what the run takes.
        """
        device, low = self.device, self.memory == "low"
        size = sum(parameter.nbytes for module in self.load.loaded for parameter in module.parameters())
        if device.type != "cuda" and (device.type != "cpu" or size < SMALL):
            return low
        if self.sharded:
            tell(MemoryUnknown(None, low))
            return low
        there = room(device)
        try:
            need = self.need(low)
        except Exception as error:  # of tracing, for which torch has no public interface: no reason not to train
            tell(MemoryUnknown(f"{type(error).__name__}: {first_line(error)}", low))
            return low
        if not fits(need, there) and self.memory == "auto" and device.type == "cuda":
            plain, need, low = need, self.need(low=True), True
            tell(MemorySaved(plain))
        tell(MemoryPredicted(need, there))
        if not fits(need, there):
            raise self._too_small(need, there or 0, low)
        self.compile()
        return low

    def compile(self) -> None:
        """Compile what a step launches on a GPU, if this machine has not compiled it before."""
        norms = [one for part in self.load.parts for one in part.modules() if isinstance(one, (nn.GroupNorm, nn.LayerNorm))]
        if not any(isinstance(one, nn.GroupNorm) for one in norms):
            return  # what has none runs as it is
        kernels = frozen_ops.kernels_on(self.device)
        if kernels is None:
            return
        dtypes = {parameter.dtype for part in self.load.parts for parameter in part.parameters()}

        def step(given: Inputs) -> None:
            with torch.autograd.set_multithreading_enabled(False):  # modes do not reach another thread
                self.loss(given).backward()

        what = "a training step", str(norms), sorted(map(str, dtypes))
        compile_ahead(kernels, what, self.load.largest(), self.device, step)

    def _too_small(self, need: Need, there: int, low: bool) -> UserError:
        savings = [*self.load.savings] if low else ["--memory low", *self.load.savings]
        savings += ["--preview-steps 0"] if need.total > replace(need, drawing=0).total else []
        return UserError(
            f"this run needs {mib(need.total)} and {self.device} has {mib(there)}; save memory with"
            f" {', '.join(savings)}, or free the device"
        )
