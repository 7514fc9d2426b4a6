"""What happens while something runs, as data: whoever watches is told of it, and any thread can ask it to stop.

Imports no torch. The events of a training are in `training.events`, those of drawing and writing in `generation.events`.
"""

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Literal, Protocol, TypeAlias

from .errors import Interrupted

logger = logging.getLogger("peft_diffusion")
AT_ONCE = 1.0
"""Seconds within which one more signal of the same kind is taken for the same wish."""


@dataclass(frozen=True)
class Event:
    """Something that happened. Each kind is a dataclass of its own, with what is known of it as fields."""

    def lines(self) -> tuple[str, ...]:
        """Describe the event to a person.

        Returns:
            Lines of plain text; none for an event that a person need not read of.
        """
        return ()


Observer: TypeAlias = Callable[[Event], object]
"""Is called with each event, in the thread that runs, and should return at once. ``list.append``, ``queue.put`` and
``print`` are observers.

One that raises an Exception is told no more, and the run goes on: see `Observers`."""


@dataclass(frozen=True)
class Progress(Event):
    """How far something is that takes a while.

    Attributes:
        what: What is done, in words, such as "encoding pictures".
        done: How many are done.
        total: How many there are.
    """

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Noted(Event):
    """Something that the person may not have expected, though nothing is wrong."""

    message: str

    def lines(self) -> tuple[str, ...]:
        """Tell the message."""
        return (self.message,)


@dataclass(frozen=True)
class Warned(Event):
    """Something that is probably not as the person wants it.

    Attributes:
        message: What is wrong, and what to do.
        details: Where it is so, one line each.
    """

    message: str
    details: tuple[str, ...] = ()

    def lines(self) -> tuple[str, ...]:
        """Tell the message, and the details below it."""
        return (f"warning: {self.message}", *(f"  {detail}" for detail in self.details))


@dataclass(frozen=True)
class Stopping(Event):
    """A signal has asked what runs to stop, which it does after the present step."""

    def lines(self) -> tuple[str, ...]:
        """Tell that it was heard."""
        return ("stopping after the present step; Ctrl-C again, a second later, stops at once and saves nothing",)


State: TypeAlias = Literal["finished", "stopped", "failed"]
"""How something ended: it came to its end, it was stopped as somebody wished, or an error ended it."""


class Summary(Protocol):
    """What something gave, which can say so in lines."""

    def lines(self) -> tuple[str, ...]:
        """Tell what was made, and what to do next, in lines of plain text."""
        ...


@dataclass(frozen=True)
class Ended(Event):
    """It is over: always the last event, and a base that was passed in is as it was.

    Attributes:
        state: How it ended.
        result: What a training gave, where it came to its end; None for what gives its results by other events.
        error: What ended it otherwise, in words.
    """

    state: State
    result: Summary | None = None
    error: str | None = None

    def lines(self) -> tuple[str, ...]:
        """Tell what was made, and what to do next."""
        return self.result.lines() if self.result else ()


@dataclass(frozen=True)
class ObserverFailed(Event):
    """An observer raised, and is told no more.

    Attributes:
        observer: Which one.
        error: What it raised.
    """

    observer: str
    error: str


def untold(event: Event) -> None:
    """Ignore an event: the observer of what nobody watches.

    Args:
        event: What happened.
    """


def progress(tell: Observer, what: str) -> Callable[[int, int], None]:
    """Make what is called with how many are done, and of how many.

    Args:
        tell: Is told of `Progress`.
        what: What is done, in words.

    Returns:
        The function to call.
    """

    def tick(done: int, total: int) -> None:
        tell(Progress(what, done, total))

    return tick


class Observers:
    """Tells events to several observers; is itself one.

    ``own`` observers belong to what runs, such as the record of a training: what they raise ends it. ``others`` are those
    of whoever asked for it. One of these that raises an Exception is told no more, its error is logged, and the rest are
    told by `ObserverFailed`: a page that lost its connection shall not end a training of hours. What is no Exception, such
    as KeyboardInterrupt, ends what runs in any case.

    Where there are no ``others``, notes and warnings go to the log of ``peft_diffusion``, so that they are not lost.
    """

    def __init__(self, others: Sequence[Observer] = (), own: Sequence[Observer] = ()) -> None:
        self.own = list(own)
        self.others = list(others)

    def __call__(self, event: Event) -> None:
        """Tell an event to all: own observers first, so that the others find written what they are told of."""
        for observer in self.own:
            observer(event)
        self._tell_others(event)

    def last(self, event: Event) -> None:
        """Tell the event that ends what runs after an error: what an own observer raises now must not hide that error.

        Args:
            event: The last event.
        """
        for observer in self.own:
            try:
                observer(event)
            except Exception as error:
                _log_failure(observer, error)
        self._tell_others(event)

    def _tell_others(self, event: Event) -> None:
        if not self.others:
            _log(event)
        for observer in tuple(self.others):
            try:
                observer(event)
            except Exception as error:
                self.others.remove(observer)
                self._tell_others(ObserverFailed(_log_failure(observer, error), repr(error)))


def _log_failure(observer: Observer, error: Exception) -> str:
    """Log that an observer failed; returns its name."""
    name: str = getattr(observer, "__qualname__", type(observer).__qualname__)
    trace = logger.isEnabledFor(logging.DEBUG)
    logger.warning(f"the observer {name} failed, and is told no more: {error!r}", exc_info=trace)
    return name


def _log(event: Event) -> None:
    match event:
        case Warned():
            logger.warning("\n".join((event.message, *(f"  {detail}" for detail in event.details))))
        case Noted():
            logger.info(event.message)


@contextmanager
def observed(observers: Sequence[Observer]) -> Iterator[Observers]:
    """Something inside that observers are told of, to its end: where it is left by an error, this tells of it last.

    What is inside tells of its good end itself.

    Args:
        observers: Those of whoever asked for it.

    Yields:
        What tells them.
    """
    tell = Observers(observers)
    try:
        yield tell
    except (KeyboardInterrupt, GeneratorExit) as error:  # the latter where nobody wants the rest
        tell.last(Ended("stopped", error=str(error)))
        raise
    except BaseException as error:
        tell.last(Ended("failed", error=str(error)))
        raise


class Stop(Protocol):
    """A wish to stop, which any thread may set: a ``threading.Event``, or whatever else has ``is_set``."""

    def is_set(self) -> bool:
        """Tell whether to stop."""
        ...


class Never:
    """A wish to stop that nobody has."""

    def is_set(self) -> bool:
        """Tell False."""
        return False


def check_stop(stop: Stop, message: str) -> None:
    """End what runs where someone asked for it.

    Args:
        stop: Is set to end it; None where nothing can.
        message: What to say then.

    Raises:
        Interrupted: It is set.
    """
    if stop.is_set():
        raise Interrupted(message)


class _Signals:
    """When this process last got a signal to stop: whichever handler there was, the next has to know."""

    def __init__(self) -> None:
        self.last = -math.inf

    def are_one(self) -> bool:
        """Tell whether the one that came now belongs to the one before."""
        now = time.monotonic()
        soon, self.last = now - self.last < AT_ONCE, now
        return soon


_signals = _Signals()
_HANG_UPS = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # Windows has none
_Handler: TypeAlias = Callable[[int, FrameType | None], object]


@contextmanager
def stop_on_signal(tell: Observer) -> Iterator[Stop]:
    """A wish to stop that SIGINT (Ctrl-C), SIGTERM or SIGHUP (a terminal that is gone) sets inside.

    Another signal acts as it always does, but not within a second of the one before: who is impatient, or whose terminal
    repeats a key, does not lose what was learned. A SIGHUP that is ignored already, as with nohup, stays so.
    In a thread that is not the main one, where Python handles no signals, nothing sets it.

    Args:
        tell: Is told of the first signal at once.

    Yields:
        The wish.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    numbers = [signal.SIGINT, signal.SIGTERM]  # the first also where it is ignored, as shells do for what they start with &
    numbers += [number for number in _HANG_UPS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}

    def request(number: int, _: FrameType | None) -> None:
        soon = _signals.are_one()
        if not stop.is_set():
            stop.set()
            tell(Stopping())
        elif not soon:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupts_apart() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt once a second at most inside: another one would meet what ends it all.

    A handler that is put in place inside stays. Nothing is done where somebody handles SIGINT already, or in a thread that
    is not the main one.
    """

    def interrupt(_: int, __: FrameType | None) -> None:
        if not _signals.are_one():
            raise KeyboardInterrupt

    with _handled({signal.SIGINT: signal.default_int_handler}, interrupt):
        yield


@contextmanager
def terminations_cleaned_up() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt inside, so that half-written files are removed.

    Afterwards the process ends by the signal, as whoever sent it expects. A second signal ends it at once. Nothing is done
    for a signal that somebody handles or ignores already, as with nohup, or in a thread that is not the main one.
    """
    came: list[int] = []

    def interrupt(number: int, _: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    try:
        with _handled(dict.fromkeys((signal.SIGTERM, *_HANG_UPS), signal.SIG_DFL), interrupt):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


@contextmanager
def _handled(usual: Mapping[int, _Handler | signal.Handlers], handler: _Handler) -> Iterator[None]:
    """Handle those signals inside that have their usual handlers, in the main thread, which get these back afterwards.

    A handler that somebody else puts in place inside stays.
    """
    here = threading.current_thread() is threading.main_thread()
    ours = [number for number, own in usual.items() if here and signal.getsignal(number) is own]
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) is handler:
                signal.signal(number, usual[number])
