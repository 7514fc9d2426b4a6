"""What a run tells the person in front of it: lines, and a bar with loss, rate and time left."""

import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from .loop.trainer import Observer, StepLoss

IMPATIENT = "warning: --patience ends nothing where nothing is kept apart to measure on; --held-out 0.1 keeps a tenth"
_SMOOTH = 0.9
_LINE_EVERY = 15.0  # seconds between lines where no bar can be drawn


def say_to(console: Console) -> Callable[[str], None]:
    """A function that prints a line as it is: file names hold brackets, and long lines are not broken."""

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    return say


def noted(say: Callable[[str], None], lines: list[str]) -> Callable[[str], None]:
    """The same, which also keeps the lines."""

    def both(line: str) -> None:
        lines.append(line)
        say(line)

    return both


class Reading:
    """A spinner with a count, for work before the first step; leaving the context takes it away."""

    def __init__(self, console: Console) -> None:
        self.status = console.status("") if console.is_terminal else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.status is not None:
            self.status.stop()

    def __call__(self, what: str) -> Callable[[int, int], None]:
        """A function to call with what is done and its total."""

        def tick(done: int, total: int) -> None:
            if self.status is None:
                return
            self.status.update(f"{what}: {done} of {total}")
            if done < total:
                self.status.start()
            else:
                self.status.stop()

        return tick


class Bar(Observer):
    """The progress of the steps: a bar in a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, steps: int, done: int, apart: Callable[[float], str]) -> None:
        self.console = console
        self.apart = apart  # a measurement on what is kept apart, in words
        self.steps = steps
        self.done = done
        self.began = self.printed = time.monotonic()
        self.first = done
        self.loss: float | None = None
        self.say = say_to(console)
        columns = (SpinnerColumn(), TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[told]}"))
        self.progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self.task = self.progress.add_task("", total=steps, completed=done, told="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def on_step(self, step: int) -> None:
        """Move the bar."""
        self.done = step
        self.progress.update(self.task, completed=step)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.printed > _LINE_EVERY:
            self.printed = now
            left = (now - self.began) / (step - self.first) * (self.steps - step)
            self.say(f"step {step} of {self.steps}: {self._told()}, {left:.0f} s left")

    def on_losses(self, losses: Sequence[StepLoss]) -> None:
        """Show the running loss, and steps per second."""
        for one in losses:
            self.loss = one.loss if self.loss is None else _SMOOTH * self.loss + (1 - _SMOOTH) * one.loss
        self.progress.update(self.task, told=self._told())

    def on_unrecorded(self, why: str) -> None:
        """Say why steps are slower than they could be."""
        self.say(f"steps run one operation after the other, which is slower: no CUDA graph of them can be made ({why})")

    def on_held_out(self, step: int, loss: float) -> None:
        """A line for each measurement."""
        self.say(f"step {step}: {self.apart(loss)}")

    def _told(self) -> str:
        rate = (self.done - self.first) / max(1e-9, time.monotonic() - self.began)
        return f"loss {self.loss:.4f}, {rate:.2f} steps/s" if self.loss is not None else f"{rate:.2f} steps/s"
