"""The one thread that owns the device: what is to be drawn waits here, and is drawn in order."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeAlias, TypeVar

from ..core.errors import Interrupted
from ..core.events import Event, Progress
from ..core.wording import number_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

More: TypeAlias = Callable[[int], "list[Job[Any]]"]
"""Gives jobs that have come since and can be done with those under way: for so many pictures at most."""
Shared: TypeAlias = Callable[[Sequence["Job[T]"], More], Iterator[tuple["Job[T]", T]]]
"""What does several jobs at once, and gives what comes of each as soon as it is there."""


class FullError(Exception):
    """Too many wait already, or the server ends."""


@dataclass(eq=False)
class Job(Generic[T]):
    """Something for the thread to do, how far it is, and wishes to end it.

    Attributes:
        name: What it is, as ``/sdapi/v1/progress`` says.
        work: What is done; is given the job.
        shared: What does it together with others that wait behind it and have the same; None for alone.
        joins: Whether ``shared`` is also for one, which others may join.
        pictures: How many it draws, where it can be done with others.
        future: What comes of it.
        rounds: How many batches there are.
        round: How many of them are done.
        done: Denoising steps of the present batch.
        total: Of how many.
        began: When it began, in seconds of `time.monotonic`; None before.
        timestamp: The same, as A1111 writes it.
        interrupted: Nothing more of it is wanted.
        skipped: The present batch is not wanted.
    """

    name: str
    work: "Callable[[Job[T]], T]"
    shared: "Shared[T] | None" = None
    joins: bool = False
    pictures: int = 1
    future: "Future[T]" = field(default_factory=Future)
    rounds: int = 0
    round: int = 0
    done: int = 0
    total: int = 0
    began: float | None = None
    timestamp: str = ""
    interrupted: bool = False
    skipped: bool = False

    def is_set(self) -> bool:
        """Whether it is to stop; a job is the wish to stop of what draws."""
        return self.interrupted or self.skipped

    def heed(self, event: Event) -> None:
        """Follow how far the batch is, and end it at the present step where that is wished; an observer.

        Args:
            event: What happened.

        Raises:
            Interrupted: It is wished, which is no Exception, so that no observer's failing hides it.
        """
        if isinstance(event, Progress):
            self.done, self.total = event.done, event.total
            if self.is_set():
                raise Interrupted("interrupted")

    def state(self) -> dict[str, Any]:
        """Tell of it as A1111 does."""
        return {
            "skipped": self.skipped,
            "interrupted": self.interrupted,
            "stopping_generation": self.interrupted,
            "job": self.name,
            "job_count": self.rounds,
            "job_timestamp": self.timestamp,
            "job_no": self.round,
            "sampling_step": self.done,
            "sampling_steps": self.total,
        }

    @property
    def progress(self) -> float:
        """The share that is done."""
        return (self.round + self.done / max(self.total, 1)) / max(self.rounds, 1)


class Company(Generic[T]):
    """Jobs that are done together: what is told of one is told of all, and they end early where all are to.

    Args:
        jobs: The jobs.
    """

    def __init__(self, jobs: Sequence[Job[T]]) -> None:
        self._jobs = tuple(jobs)

    def is_set(self) -> bool:
        """Whether none of them is wanted any more; this is the wish to stop of what draws."""
        return all(job.is_set() for job in self._jobs)

    def heed(self, event: Event) -> None:
        """Follow how far they are; an observer.

        Args:
            event: What happened.

        Raises:
            Interrupted: None of them is wanted any more.
        """
        if isinstance(event, Progress):
            for job in self._jobs:
                job.done, job.total = event.done, event.total
            if self.is_set():
                raise Interrupted("interrupted")


class Worker:
    """A thread that does jobs in order, those together that wait together and can be.

    Args:
        most: How many may wait.
        at_once: How many pictures are drawn at once.
    """

    def __init__(self, most: int, at_once: int = 1) -> None:
        self._jobs: deque[Job[Any]] = deque()
        self._most = most
        self._at_once = at_once
        self._changed = threading.Condition()
        self._closed = False
        self._present: tuple[Job[Any], ...] = ()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def present(self) -> Job[Any] | None:
        """What is done now; of several the first."""
        present = self._present
        return present[0] if present else None

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return len(self._jobs)

    def submit(self, job: Job[T]) -> Job[T]:
        """Put a job behind those that wait.

        Args:
            job: The job.

        Returns:
            The same.

        Raises:
            FullError: Too many wait, or the server ends.
        """
        with self._changed:
            if self._closed:
                raise FullError("the server ends")
            if len(self._jobs) >= self._most:
                raise FullError(f"{number_of(len(self._jobs), 'request')} waiting already; ask again later")
            self._jobs.append(job)
            self._changed.notify()
        return job

    def drop(self, job: Job[Any]) -> None:
        """Do without a job: it is not begun, or ends at the present step.

        Args:
            job: The job.
        """
        job.interrupted = True
        job.future.cancel()

    def interrupt(self) -> None:
        """Want no more of what is done now."""
        for job in self._present:
            job.interrupted = True

    def skip(self) -> None:
        """Do without the batch that is drawn now."""
        for job in self._present:
            job.skipped = True

    def close(self) -> None:
        """Take no more, and end what is drawn at the present step."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            for job in self._jobs:
                job.future.cancel()
            self._jobs.clear()
            self._changed.notify()
        self.interrupt()

    def join(self) -> None:
        """Wait until the thread has ended, after `close`."""
        self._thread.join()

    def _next(self) -> list[Job[Any]]:
        """The job that waited longest, with those behind it that can be done together with it; none at the end."""
        with self._changed:
            while not self._jobs and not self._closed:
                self._changed.wait()
            found: list[Job[Any]] = []
            pictures = 0
            while self._jobs:
                job = self._jobs[0]
                pictures += job.pictures
                if found and (job.shared is None or job.shared != found[0].shared or pictures > self._at_once):
                    break
                found.append(self._jobs.popleft())
            return found

    def _run(self) -> None:
        while found := self._next():
            self._do(found)

    def _do(self, found: list[Job[Any]]) -> None:
        """Do jobs. Nothing holds them afterwards: the error of one holds all that it met, such as a base."""
        jobs = [job for job in found if _begins(job)]
        if jobs and jobs[0].shared is not None and (len(jobs) > 1 or jobs[0].joins):
            self._together(jobs, jobs[0].shared)
        for job in jobs:
            if not job.future.done():
                self._alone(job)

    def _more(self, shared: Shared[Any], pictures: int) -> list[Job[Any]]:
        """The next ones, as long as they can be done with those under way and there is room; in order, so that none that
        cannot waits forever."""
        found: list[Job[Any]] = []
        with self._changed:
            while self._jobs and self._jobs[0].shared == shared and self._jobs[0].pictures <= pictures:
                job = self._jobs.popleft()
                if _begins(job):
                    found.append(job)
                    pictures -= job.pictures
        return found

    def _together(self, jobs: list[Job[Any]], shared: Shared[Any]) -> None:
        """Do several at once, and in ``jobs`` those that come meanwhile and join them. Where that fails they are left to be
        done by themselves, so that each gets its own error."""
        self._present = tuple(jobs)

        def more(pictures: int) -> list[Job[Any]]:
            came = self._more(shared, pictures)
            jobs.extend(came)
            self._present = (*self._present, *came)
            return came

        try:
            for job, found in shared(tuple(jobs), more):
                self._present = tuple(one for one in self._present if one is not job)
                job.future.set_result(found)
        except Exception:
            logger.debug("requests could not be drawn together", exc_info=True)
        except BaseException as error:
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(_raisable(error))
        finally:
            self._present = ()

    def _alone(self, job: Job[Any]) -> None:
        job.began, self._present = time.monotonic(), (job,)
        try:
            job.future.set_result(job.work(job))
        except BaseException as error:
            job.future.set_exception(_raisable(error))
        finally:
            self._present = ()


def _begins(job: Job[Any]) -> bool:
    """Begin with a job, if somebody still waits for it."""
    if not job.future.set_running_or_notify_cancel():
        return False
    job.began, job.timestamp = time.monotonic(), datetime.now().strftime("%Y%m%d%H%M%S")
    return True


def _raisable(error: BaseException) -> BaseException:
    """What a future may hold: a KeyboardInterrupt would end whoever asks for its result."""
    return RuntimeError(str(error)) if isinstance(error, KeyboardInterrupt) else error
