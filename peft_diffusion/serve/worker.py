"""The one thread that owns the device: what is to be drawn waits here, and is drawn in order."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

from ..core.errors import Interrupted
from ..core.events import Event, Progress

T = TypeVar("T")


class FullError(Exception):
    """Too many wait already, or the server ends."""


@dataclass(eq=False)
class Job(Generic[T]):
    """Something for the thread to do, how far it is, and wishes to end it.

    Attributes:
        name: What it is, as ``/sdapi/v1/progress`` says.
        work: What is done; is given the job.
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


class Worker:
    """A thread that does jobs one after the other.

    Args:
        most: How many may wait.
    """

    def __init__(self, most: int) -> None:
        self._jobs: queue.Queue[Job[Any] | None] = queue.Queue()
        self._most = most
        self._lock = threading.Lock()
        self._waiting = 0
        self._closed = False
        self.present: Job[Any] | None = None
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many jobs wait."""
        return self._waiting

    def submit(self, job: Job[T]) -> Job[T]:
        """Put a job behind those that wait.

        Args:
            job: The job.

        Returns:
            The same.

        Raises:
            FullError: Too many wait, or the server ends.
        """
        with self._lock:
            if self._closed:
                raise FullError("the server ends")
            if self._waiting >= self._most:
                raise FullError(f"{self._waiting} requests wait already; ask again later")
            self._waiting += 1
            self._jobs.put(job)
        return job

    def drop(self, job: Job[Any]) -> None:
        """Do without a job: it is not begun, or ends at the present step.

        Args:
            job: The job.
        """
        job.interrupted = True
        job.future.cancel()

    def close(self) -> None:
        """Take no more, and end what is drawn at the present step."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            while not self._jobs.empty():
                job = self._jobs.get_nowait()
                if job is not None:
                    job.future.cancel()
            self._jobs.put(None)
        present = self.present
        if present is not None:
            present.interrupted = True

    def join(self) -> None:
        """Wait until the thread has ended, after `close`."""
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            with self._lock:
                self._waiting -= 1
            if not job.future.set_running_or_notify_cancel():
                continue
            job.began, job.timestamp = time.monotonic(), datetime.now().strftime("%Y%m%d%H%M%S")
            self.present = job
            try:
                job.future.set_result(job.work(job))
            except BaseException as error:
                job.future.set_exception(RuntimeError(str(error)) if isinstance(error, KeyboardInterrupt) else error)
            finally:
                self.present = None
