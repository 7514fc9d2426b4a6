"""One lock for everything that changes what a base carries: attaching, strengths, merging, taking off.

Threads that share a base then see whole changes of each other only. Drawing takes no lock: see ``generation.Adapters``.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch
from torch import nn

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


class _Walks(threading.local):
    """Of the change that this thread is making."""

    known: dict[nn.Module, list[tuple[str, nn.Module]]] | None = None


_walks = _Walks()


def walks() -> dict[nn.Module, list[tuple[str, nn.Module]]] | None:
    """Give the modules that were found in components since the present change began. A change moves none of them, and asks
    several times.

    Returns:
        Paths and modules by the component, to be looked up and added to; None where no change is being made.
    """
    return _walks.known


@contextmanager
def _looking() -> Iterator[None]:
    if _walks.known is not None:  # within another change
        yield
        return
    _walks.known = {}
    try:
        yield
    finally:
        _walks.known = None


@contextmanager
def _lasting() -> Iterator[None]:
    """Leave ``torch.inference_mode``: a tensor that is made in it can never be written or trained outside of it."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield
