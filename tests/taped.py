"""A stand-in for CUDA graphs on a CPU: what a step did is played again on the same memory, and nothing of Python with it.

As of a CUDA graph, whatever Python decided while it was recorded stays decided, inputs are read where they were, and results
are written to where they were.
"""

from collections.abc import Mapping
from typing import Any

import pytest
from torch import Tensor
from torch.utils import _pytree as trees
from torch.utils._python_dispatch import TorchDispatchMode

from peft_diffusion.core import slot, strength
from peft_diffusion.fast import drawing
from peft_diffusion.fast.cuda_graph import Inputs, Recorder, shapes


class Tape(TorchDispatchMode):
    """The operations that ran inside."""

    active = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], Mapping[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:  # which stays a view
            self.calls.append((func, args, kwargs or {}, found))
        return found

    def __enter__(self) -> Any:
        Tape.active = True
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        Tape.active = False
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def play(self) -> None:
        """Do all of it again, in the same places."""
        for func, args, kwargs, before in self.calls:
            found = func(*args, **kwargs)
            for place, tensor in zip(trees.tree_leaves(before), trees.tree_leaves(found), strict=True):
                if isinstance(place, Tensor) and place is not tensor:
                    place.copy_(tensor)


class Taped(Recorder[Any]):
    """A recorder that records so."""

    tapes: dict[Any, tuple[Tape, dict[str, Tensor], Any]]

    def __call__(self, inputs: Inputs) -> Any:
        """Do the work, from the tape."""
        self.__dict__.setdefault("tapes", {})
        key = shapes(inputs), self.assumes()
        if key not in self.graphs:
            places, tape = {name: tensor.clone() for name, tensor in inputs.items()}, Tape()
            self.work(places)
            with tape:
                self.tapes[key] = tape, places, self.work(places)
            self.graphs[key] = None  # type: ignore[assignment]
            self.made += 1
        tape, places, result = self.tapes[key]
        for name, place in places.items():
            place.copy_(inputs[name])
        tape.play()
        return result


def tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines record, on a CPU too."""
    monkeypatch.setattr(drawing, "Recorder", Taped)
    monkeypatch.setattr(drawing, "records_on", lambda device: True)
    for module in (slot, strength):
        monkeypatch.setattr(module, "recording", lambda: Tape.active)
