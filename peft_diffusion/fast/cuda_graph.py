"""Work that a GPU repeats, recorded once as a CUDA graph: the host then issues one call where it issued thousands."""

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor

Inputs: TypeAlias = Mapping[str, Tensor]
Shapes: TypeAlias = tuple[tuple[str, torch.Size, torch.dtype], ...]

_Result = TypeVar("_Result")
_WARM_UPS = 3  # runs before recording, in which libraries choose and allocate what a recording must not


def shapes(inputs: Inputs) -> Shapes:
    """Tell what a recording depends on.

    Args:
        inputs: Tensors by name.

    Returns:
        Names, shapes and dtypes.
    """
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(inputs.items()))


def to_device(inputs: Inputs, device: torch.device) -> dict[str, Tensor]:
    """Move tensors to a device. Those on their way to a GPU do not keep the host waiting.

    Args:
        inputs: Tensors by name.
        device: Where to.

    Returns:
        The tensors there.
    """
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in inputs.items()}
    return {name: _pinned(tensor).to(device, non_blocking=True) for name, tensor in inputs.items()}


class Recorder(Generic[_Result]):
    """Runs ``work`` from a recording for each shape of its inputs; all recordings share one pool of memory.

    ``work`` reads its inputs and tensors that stay where they are, and writes to tensors that stay: ``kept`` are those that
    a trial run must not change. ``assumes`` tells what else a recording depends on, known on the host: one that was made
    while that was otherwise is not run. What ``work`` gives stays where it is too, and the next run of the recording writes
    it anew.
    """

    def __init__(
        self,
        work: Callable[[Inputs], _Result],
        kept: Callable[[], list[Tensor]],
        device: torch.device,
        assumes: Callable[[], Hashable] = lambda: None,
    ) -> None:
        self.work = work
        self.assumes = assumes
        self.kept = kept
        self.device = device
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], _Result]] = {}
        self.pool: Any = None  # torch has no public name for its handle
        self.made = 0  # recordings, also those that were given up since

    def __call__(self, inputs: Inputs) -> _Result:
        """Do the work. Raises RuntimeError where it cannot be recorded, with everything as it was before."""
        key = shapes(inputs), self.assumes()
        if key not in self.graphs:
            self.graphs[key] = self._record(inputs)
            self.made += 1
        graph, places, result = self.graphs[key]
        for name, place in places.items():
            place.copy_(_pinned(inputs[name]), non_blocking=True)
        graph.replay()
        return result

    def drop(self, key: Hashable) -> None:
        """Give up one recording, whose memory others then use.

        Args:
            key: Shapes of its inputs, and what it assumes; one that is not there is no mistake.
        """
        self.graphs.pop(key, None)

    def forget(self) -> None:
        """Give up every recording, and the memory that they share."""
        self.graphs.clear()
        self.pool = None

    def _record(self, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor], _Result]:
        # Copies, as what a run was called with must stay when the next one writes its own there.
        places = {name: tensor.to(self.device, copy=True) for name, tensor in inputs.items()}
        before = [tensor.clone() for tensor in self.kept()]
        graph = torch.cuda.CUDAGraph()
        chance = torch.cuda.get_rng_state(self.device)  # trial runs draw too, which must not be seen in what follows
        stream, done = torch.cuda.current_stream(self.device), False
        try:
            side: torch.cuda.Stream = torch.cuda.Stream(self.device)
            side.wait_stream(stream)
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self.work(places)
            stream.wait_stream(side)
            with torch.cuda.graph(graph, pool=self.pool):
                result = self.work(places)
            done = True
        finally:
            torch.cuda.synchronize(self.device)
            if not done:
                torch.cuda.set_stream(stream)  # a recording that breaks off leaves its own
                _renew_generator(self.device)
            torch.cuda.set_rng_state(chance, self.device)
            with torch.no_grad():
                for tensor, value in zip(self.kept(), before, strict=True):
                    tensor.copy_(value)
        self.pool = graph.pool()
        return graph, places, result


def cause(error: BaseException) -> str:
    """Tell what stopped a recording: ending one that broke off raises another error, which says less.

    Args:
        error: What was raised.

    Returns:
        One line.
    """
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _renew_generator(device: torch.device) -> None:
    """Give the generator a state of its own again: a recording that broke off leaves it waiting for an end."""
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.default_generators[index].graphsafe_set_state(torch.Generator(device))


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in memory that a GPU reads by itself; the allocator keeps it until it has."""
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor
