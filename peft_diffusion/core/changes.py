"""One lock for everything that changes what a base carries: attaching, strengths, merging, taking off.

Threads that share a base then see whole changes of each other only. Drawing takes no lock: see ``generation.Adapters``.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from .component import ComponentState

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
_lock = threading.RLock()  # one for all bases, as these share components


def one_at_a_time(change: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Let a function run in one thread at a time, and none of the others of its kind beside it.

    Args:
        change: What changes the adapters of a base. It may call others of its kind.

    Returns:
        The function, which waits for its turn.
    """

    @functools.wraps(change)
    def waiting(*given: _Given.args, **named: _Given.kwargs) -> _Result:
        with _lock, _lasting(), _looking():
            return change(*given, **named)

    return waiting


@dataclass
class Seen:
    """What was found in components since a change began, which asks several times.

    Attributes:
        modules: Paths and modules by the component. A change moves none.
        states: What components carry, None for nothing; forgotten whenever a module gets a slot or loses it.
    """

    modules: dict[nn.Module, list[tuple[str, nn.Module]]] = field(default_factory=dict)
    states: "dict[nn.Module, ComponentState | None]" = field(default_factory=dict)


class _Changes(threading.local):
    """The change that this thread is making."""

    seen: Seen | None = None


_changes = _Changes()


def seen() -> Seen | None:
    """Give what the present change has seen, to be looked up and added to.

    Returns:
        That; None where no change is being made.
    """
    return _changes.seen


@contextmanager
def _looking() -> Iterator[None]:
    if _changes.seen is not None:  # within another change
        yield
        return
    _changes.seen = Seen()
    try:
        yield
    finally:
        _changes.seen = None


@contextmanager
def _lasting() -> Iterator[None]:
    """Leave ``torch.inference_mode``: a tensor that is made in it can never be written or trained outside of it."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield
