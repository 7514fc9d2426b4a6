"""Sites worked on at the same time, each on one core."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Given = TypeVar("Given")
Result = TypeVar("Result")

_MOST = 4  # sites at once: each holds the factors of its change in memory


def side_by_side(
    given: Iterable[Given], work: Callable[[Given], Result], take: Callable[[Result], None], *, threads: int | None = None
) -> None:
    """Work on several things at the same time, each in a thread that computes on one core.

    A decomposition of a few hundred ranks is a row of short steps. Split over cores, each step waits for the slowest core,
    and where another program is busy that takes ten times as long as one core alone.

    Args:
        given: What is worked on. It is taken by the calling thread, one ahead of what is done.
        work: Is called in another thread, and must draw no numbers from torch's own generator.
        take: Is called with each result by the calling thread, in the order of what was given.
        threads: How many at most; None: as many as torch computes with, up to 4.
    """
    number = min(torch.get_num_threads(), _MOST) if threads is None else threads
    if number == 1:
        for one in given:
            take(work(one))
        return
    waiting: deque[Future[Result]] = deque()
    with _on_one_core(), ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for one in given:
                waiting.append(pool.submit(work, one))
                if len(waiting) == number:  # and no more is in memory
                    take(waiting.popleft().result())
            while waiting:
                take(waiting.popleft().result())
        finally:
            for rest in waiting:
                rest.cancel()


@contextmanager
def _on_one_core() -> Iterator[None]:
    """The calling thread too computes on one core inside, and new threads of torch do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
