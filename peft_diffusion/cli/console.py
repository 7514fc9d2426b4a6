"""What a training tells the person in front of it: lines, a bar with loss, rate and time left, and a table of trials."""

import math
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table

from ..core.events import Ended, Event
from ..core.events import Progress as Reading
from ..training.events import Losses, Pace, Preview, RatesFound, Started, Step, Trained, duration
from ..training.results import FoundRates
from .screen import Screen

_SMOOTH = 0.9
_LINE_EVERY = 15.0  # seconds between lines where no bar can be drawn
_TELLING_FROM = 2.0  # seconds after which it can be told how long a preparation takes
_DAY = 20 * 3600.0  # seconds, after which a time of the day could be today's or tomorrow's


class TrainingConsole:
    """Shows a training on a console; an observer, and a context that leaves no bar behind.

    In a terminal there is a spinner while data is read and a bar while steps are done; elsewhere a line now and then.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Screen()
        self._spinner: Status | None = None
        self._bar: _Bar | None = None
        self._reading: _Reading | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Reading():
                self._read(event)
            case Started():
                self._stop()
            case Trained() | Ended():
                self._stop()
            case RatesFound():
                self.console.print(_table(event.found))
        for line in event.lines():
            # As it is: file names hold brackets, and long lines are not broken.
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        if isinstance(event, Started):
            self._bar = _Bar(self.console, event.steps, event.step)
        if self._bar is not None:
            self._bar.show(event)

    def _read(self, event: Reading) -> None:
        now = time.monotonic()
        if self._reading is None or self._reading.what != event.what or event.done < self._reading.done:
            self._reading = _Reading(event.what, event.done, now, now)
        told = self._reading.told(event, now)
        if not self.console.is_terminal:
            if event.done < event.total and now - self._reading.printed > _LINE_EVERY:
                self._reading.printed = now
                self.console.print(told, markup=False, highlight=False, soft_wrap=True)
            return
        if self._spinner is None:
            self._spinner = self.console.status("")
        self._spinner.update(told)
        if event.done < event.total:
            self._spinner.start()
        else:
            self._spinner.stop()

    def _stop(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
        if self._bar is not None:
            self._bar.stop()
        self._spinner = self._bar = None


@dataclass
class _Reading:
    """Something that is prepared: from how many done on, and since when it is watched."""

    what: str
    done: int
    began: float
    printed: float

    def told(self, event: Reading, now: float) -> str:
        """How far it is, how fast it goes and how long it will take, as soon as that can be told."""
        line = f"{event.what}: {event.done} of {event.total}"
        done, took = event.done - self.done, now - self.began
        if done < 1 or took < _TELLING_FROM or event.done >= event.total:
            return line
        rate = done / took
        return f"{line}, {rate:.3g}/s, {duration((event.total - event.done) / rate)} left"


def clock(seconds: float) -> str:
    """Tell at which time of this machine something ends.

    Args:
        seconds: From now on.

    Returns:
        The time, with the day where it is not within a day.
    """
    end = time.localtime(time.time() + seconds)
    return time.strftime("%H:%M" if seconds < _DAY else "%a %H:%M", end)


class _Bar:
    """The progress of the steps: a bar in a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self.console = console
        self.steps = steps
        self.done = self.first = done
        self.began = self.printed = time.monotonic()
        self.loss: float | None = None
        self.pace: Pace | None = None
        columns = (SpinnerColumn(), TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[told]}"))
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("", total=steps, completed=done, told="")
        self.progress.start()

    def stop(self) -> None:
        """Leave the bar as it is."""
        self.progress.stop()

    def show(self, event: Event) -> None:
        """Move the bar."""
        match event:
            case Step():
                self._step(event.step)
            case Losses():
                for one in event.losses:
                    self.loss = one.loss if self.loss is None else _SMOOTH * self.loss + (1 - _SMOOTH) * one.loss
                self.progress.update(self.task, told=self._told())
            case Pace():
                self.pace = event
                self.progress.update(self.task, told=self._told())
            case Preview() if self.done == self.first:  # the base's own, before the first step
                self.began = self.printed = time.monotonic()

    def _step(self, step: int) -> None:
        self.done = step
        self.progress.update(self.task, completed=step)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.printed > _LINE_EVERY:
            self.printed = now
            left = (now - self.began) / (step - self.first) * (self.steps - step)
            line = f"step {step} of {self.steps}: {self._told()}, {duration(left)} left"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _told(self) -> str:
        rate = (self.done - self.first) / max(1e-9, time.monotonic() - self.began)
        parts = [] if self.loss is None else [f"loss {self.loss:.4f}"]
        parts += [f"{rate:.2f} steps/s"] if self.pace is None else [str(self.pace), f"ends {clock(self.pace.left)}"]
        return ", ".join(parts)


def _table(found: FoundRates) -> Table:
    """The trials of a search for learning rates."""
    table = Table(title="learning rates", title_justify="left")
    table.add_column("steps", justify="right")
    for name in found.rates:
        table.add_column(name, justify="right")
    table.add_column("loss after", justify="right")
    table.add_column("change", justify="right")
    best = min(one.loss for one in found.trials if one.steps == found.steps)
    for one in found.trials:
        finite = math.isfinite(one.loss)
        change = f"{one.loss / found.before - 1:+.1%}" if finite else "runs away"
        style = "bold green" if one.loss == best and one.steps == found.steps else None
        rates = (f"{value:.2g}" for value in one.rates.values())
        table.add_row(str(one.steps), *rates, f"{one.loss:.4f}" if finite else "-", change, style=style)
    return table
