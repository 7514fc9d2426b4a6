"""What drawing and writing tell the person in front of it: a bar on stderr where a person watches, and notes."""

from types import TracebackType
from typing import Self

from ..core.events import Event, Noted, Progress, Warned
from .terminal import say


def show_notes(event: Event) -> None:
    """Show on stderr what the person should know; an observer.

    Args:
        event: What happened.
    """
    match event:
        case Warned() | Noted():
            details = event.details if isinstance(event, Warned) else ()
            lines = [f"note: {line}" for line in event.message.splitlines()]
            say("\n".join([*lines, *(f"  {detail}" for detail in details)]), error=True)


class GenerationConsole:
    """Shows what is drawn or written on stderr; an observer, and a context whose end takes the bar away.

    In a terminal there is a bar; elsewhere, as in a log or a pipe, there are notes alone.

    Args:
        title: What stands before the bar.
    """

    def __init__(self, title: str) -> None:
        # Not above: what needs no bar need not wait for it.
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        from .screen import Screen

        console = Screen(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(title, total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case Progress():
                self._bar.update(self._task, completed=event.done, total=event.total)
            case _:
                show_notes(event)
