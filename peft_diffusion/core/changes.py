"""One lock for everything that changes what a base carries: attaching, strengths, merging, taking off.

Threads that share a base then see whole changes of each other only. Drawing takes no lock: see ``generation.Adapters``.
"""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

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
        with _lock, _lasting():
            return change(*given, **named)

    return waiting


@contextmanager
def _lasting() -> Iterator[None]:
    """Leave ``torch.inference_mode``: a tensor that is made in it can never be written or trained outside of it."""
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            yield
    else:
        yield
