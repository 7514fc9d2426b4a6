"""A stand-in for CUDA graphs on a CPU: what a step did is played again on the same memory, and nothing of Python with it.

As of a CUDA graph, whatever Python decided while it was recorded stays decided, inputs are read where they were, and results
are written to where they were.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as trees
from torch.utils._python_dispatch import TorchDispatchMode

from peft_diffusion.core import slot, strength
from peft_diffusion.fast import drawing, frozen_ops
from peft_diffusion.fast.cuda_graph import Inputs, Recorder, shapes


class Tape(TorchDispatchMode):
    """The operations that ran inside."""

    active = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], Mapping[str, Any], list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:  # which stays a view
            self.calls.append((func, args, kwargs or {}, _leaves(found)))
        return found

    def __enter__(self) -> Any:
        Tape.active = True
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *raised: Any) -> None:
        Tape.active = False
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def play(self) -> None:
        """Do all of it again, in the same places."""
        for func, args, kwargs, places in self.calls:
            for place, tensor in zip(places, _leaves(func(*args, **kwargs)), strict=True):
                if isinstance(place, Tensor) and place is not tensor:
                    place.copy_(tensor)


def _leaves(found: Any) -> list[Any]:
    """What an operation gave, one by one: nearly always a tensor, for which a tree is slow."""
    return [found] if isinstance(found, Tensor) else trees.tree_leaves(found)


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


def _layer_norm(x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    total = x if added is None else x + added
    return total, *torch.native_layer_norm(total, [x.shape[-1]], weight, bias, eps)


def _layer_norm_back(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, through: Tensor | None) -> Tensor:
    mask = [True, False, False]
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(dy, x, [x.shape[-1]], mean, rstd, weight, weight, mask)
    found: Tensor = dx if through is None else dx + through
    return found


def _gated(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def _gated_back(dy: Tensor, x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return torch.cat([dy * F.gelu(gate), torch.ops.aten.gelu_backward(dy * value, gate)], -1)


_IN_TORCH: dict[str, Callable[..., Any]] = {
    "group_norm": frozen_ops._group_norm_in_torch,
    "group_norm_back": frozen_ops._group_norm_back_in_torch,
    "layer_norm": _layer_norm,
    "layer_norm_back": _layer_norm_back,
    "gated": _gated,
    "gated_back": _gated_back,
    "sum_with_bias": lambda a, b, bias: a + b + bias[:, None, None],
}


class Collecting:
    """Kernels as torch computes them, which note what is compiled ahead and what is then run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ahead, self.inside = folder, 0, False
        self.noted: dict[bool, set[tuple[object, ...]]] = {True: set(), False: set()}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            told = [(tuple(one.shape), one.dtype) if isinstance(one, Tensor) else one for one in given]
            self.noted[self.inside].add((name, *told))
            return _IN_TORCH[name](*given)

        return run

    def compiling_ahead(self) -> bool:
        return self.inside

    @contextmanager
    def compiling(self, device: torch.device) -> Iterator[None]:
        self.ahead += 1
        self.inside = True
        yield
        self.inside = False

    def card(self, device: torch.device) -> str:
        return "a card"

    def compiled_before(self, digest: str) -> Path:
        return self.folder / digest
