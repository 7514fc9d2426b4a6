"""Python's search for garbage, held off while many objects are made that all stay."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collecting() -> Iterator[None]:
    """Hold off the search for cyclic garbage, which Python begins after so many new objects; also a decorator.

    An adapter is some thousand objects, of which none is garbage. On a large base the search looks through all that there
    is each time: of eight SDXL LoRAs, one took three times as long as the others for it. What is due is searched for after.
    Where the collector is off already, as by the host's own choice, it stays so.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
