"""The record of a run: what happens in it, written down in its folder as it is told."""

import time
from contextlib import nullcontext, suppress
from typing import Any

from ...core.errors import UserError
from ...core.events import Ended, Event, Warned
from ...core.files import explained
from ..events import DataRead, Losses, Measured, Preview, Saved, Started
from ..results import RunResult
from . import report
from .facts import memory
from .plots import draw, draw_signals
from .run_folder import RunFolder

_SECONDS = 20.0  # between plots: both take half a second, and a short run saves a checkpoint more often than that


class Recorder:
    """Writes the measurements of a run, its plots and how it stands; an observer.

    The plots are drawn with the first checkpoint, then with those that come 20 s after the last plots, and at the end.

    Attributes:
        lines: What a person was told before the run began, in lines.
        warnings: What was wrong then, in words.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self.warnings: list[str] = []
        self._started = False
        self._plotted_at: float | None = None
        self._plotted: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        """Write down an event. Raises UserError where the disk refuses."""
        match event:
            case Started():
                self._started = True
            case Ended() if self.folder.facts:  # it had begun, here
                self._ended(event)
            case _ if not self._started:
                self._collect(event)
            case Losses():
                self.folder.append({"step": one.step, "loss": one.loss, "lr": dict(one.rates)} for one in event.losses)
            case Measured():
                self._measured(event)
            case Preview(nearest=nearest) if nearest is not None:
                self._nearest(event.step, nearest)
            case Saved(what="checkpoint"):
                if self._plotted_at is None or time.monotonic() - self._plotted_at >= _SECONDS:
                    self._plot()

    def _collect(self, event: Event) -> None:
        """Keep what is told of the preparation: the report has it."""
        self.lines += event.lines()
        match event:
            case Warned():
                self.warnings.append(event.message + "".join(f" {detail};" for detail in event.details))
            case DataRead(of_class=False):
                self.warnings += event.problems

    def _measured(self, event: Measured) -> None:
        signals = event.signals
        changes = dict(signals.changes) if event.step else None
        found = {"seen_loss": signals.seen, "leakage": signals.leakage, "changes": changes}
        known: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
        if known:
            self.folder.append([{"step": event.step, **known}])
        if event.held_out is not None:
            self.folder.held_out[event.step] = event.held_out
            self.folder.append([{"step": event.step, "held_out_loss": event.held_out}])

    def _nearest(self, step: int, nearest: float) -> None:
        """How near previews are to pictures that are trained on, once a step."""
        if not any(line["step"] == step and "preview_nearest" in line for line in self.folder.metrics()):
            self.folder.append([{"step": step, "preview_nearest": nearest}])

    def _plot(self) -> None:
        metrics = self.folder.metrics()
        if metrics != self._plotted:
            with explained(self.folder.path):
                draw(self.folder.path / "loss.png", metrics)
                draw_signals(self.folder.path / "signals.png", metrics)
        self._plotted_at, self._plotted = time.monotonic(), metrics

    def _ended(self, event: Ended) -> None:
        """However the run ended, its plots show all of it, and ``run.json`` says so."""
        if self._plotted_at is not None:
            with suppress(UserError) if event.result is None else nullcontext():
                self._plot()
        if isinstance(event.result, RunResult):
            outcome = event.result.outcome
            figures = {"seconds": event.result.seconds, **memory(), **(outcome.training() if outcome else {})}
            self.folder.note(state=event.state, figures=figures)
            return
        with suppress(UserError):  # that the disk is full is told already
            self.folder.note(state=event.state, **({"error": event.error} if event.state == "failed" else {}))


class ReportWriter:
    """Writes ``report.html`` of a run with every checkpoint and at its end; an observer, told after the `Recorder`."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder

    def __call__(self, event: Event) -> None:
        """Write the page anew, where there is something new on it. Raises UserError where the disk refuses."""
        match event:
            case Saved(what="checkpoint"):
                report.write(self.folder.path)
            case Ended() if self.folder.facts:
                with suppress(UserError) if event.result is None else nullcontext():
                    report.write(self.folder.path)
