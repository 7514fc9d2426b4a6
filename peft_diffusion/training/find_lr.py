"""The learning-rate finder: short trials from the same start, judged by the loss on what they were not trained on.

Smith's range test (2017, https://arxiv.org/abs/1506.01186) raises the rate within one run and reads the training loss, which
tells where a run breaks and little of where it learns best. Here each rate has a trial of its own, a run in small with its
warm-up and schedule, and all are measured on the same fixed noise.
"""

import io
import json
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..core.arena import Arena
from ..core.errors import UserError
from .capture import Inputs
from .crew import Crew
from .progress import say_to
from .trainer import Diverged, Interrupted, Signals, Task, Trainer, TrainerSettings
from .writing import explained, write_bytes

_APART = 4.0  # between the rates of the first grid
_FIRST = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)  # times the rates that the settings have
_FARTHEST = 4.0**5
_LEAST, _SHARE = 20, 5  # a trial has a fifth of the run's steps, at least 20 where there are as many


@dataclass(frozen=True)
class Trial:
    """A trial at so many times the rates of the settings; the loss is infinite where it ran away."""

    factor: float
    rates: Mapping[str, float]
    loss: float


@dataclass(frozen=True)
class FoundRates:
    """What was found: rates by group, how many times those of the settings they are, all trials, and the loss without any.

    ``judged`` says what the loss was measured on, ``file`` is where all of this is written.
    """

    factor: float
    rates: Mapping[str, float]
    trials: tuple[Trial, ...]
    before: float
    judged: str
    steps: int
    file: Path


class _Unwatched:
    """A task without measurements in between."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def inputs(self, step: int, micro: int) -> Inputs:
        return self.task.inputs(step, micro)

    def seeded(self, step: int, micro: int) -> AbstractContextManager[None]:
        return self.task.seeded(step, micro)

    def loss(self, inputs: Inputs) -> Tensor:
        return self.task.loss(inputs)

    def held_out(self) -> float | None:
        return None

    def signals(self) -> Signals:
        return Signals()


def refuse_crew(crew: Crew) -> None:
    """Raise UserError where several processes were started: trials are short, and one is enough."""
    if crew.size > 1:
        raise UserError("--find-lr runs in one process; start it without the launcher")


def trial_steps(steps: int) -> int:
    """The steps of a trial for a run of so many."""
    return min(steps, max(_LEAST, steps // _SHARE))


def search(measure: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The factor with the lowest loss, and the loss at each that was tried.

    ``measure`` gives the loss at a factor. First a coarse grid, longer where the best is at its end; then the middles
    beside the best, in the logarithm; then the lowest point of a parabola through the best and its neighbours.
    """
    losses = {factor: measure(factor) for factor in _FIRST}
    while True:
        best = _best(losses)
        beyond = best * _APART if best == max(losses) else best / _APART
        if best not in (min(losses), max(losses)) or not 1 / _FARTHEST <= beyond <= _FARTHEST:
            break
        losses[beyond] = measure(beyond)
    if not math.isfinite(losses[best]):
        raise UserError("every trial ran away, whatever its learning rate; look at the data, or raise the precision")
    for factor in (best / math.sqrt(_APART), best * math.sqrt(_APART)):
        losses[factor] = measure(factor)
    return _lowest(dict(sorted(losses.items()))), dict(sorted(losses.items()))


def _best(losses: Mapping[float, float]) -> float:
    return min(losses, key=lambda factor: losses[factor])


def _lowest(losses: Mapping[float, float]) -> float:
    """The lowest point of the parabola through the best and its neighbours, which are a factor of two away."""
    best = _best(losses)
    step = math.log(2)
    below, above = (losses.get(factor, math.inf) for factor in (best / 2, best * 2))
    bend = below - 2 * losses[best] + above
    if not math.isfinite(bend) or bend <= 0:
        return best
    return best * math.exp(0.5 * step * (below - above) / bend)


def find(
    task: Task, arena: Arena, settings: TrainerSettings, folder: Path, console: Console, flags: Mapping[str, str]
) -> FoundRates:
    """Search, tell what was found, and write ``find_lr.json`` and ``find_lr.png`` into a folder.

    ``flags`` has the flag that sets a group's rate. The parameters are afterwards what they were. Raises UserError where
    every trial runs away, and Interrupted on a signal.
    """
    start = arena.flat.clone()
    steps = trial_steps(settings.steps)
    short = replace(settings, steps=steps, warmup=min(settings.warmup, steps // 10), save_every=steps, patience=0)
    say = say_to(console)
    before, judged = _score(task)
    say(f"learning-rate trials of {steps} steps, judged by the loss on {judged}: {before:.4f} before")

    def measure(factor: float) -> float:
        arena.load(start)
        rates = {name: factor * value for name, value in settings.rates.items()}
        trainer = Trainer(_Unwatched(task), arena, replace(short, rates=rates))
        try:
            if not trainer.run():
                raise Interrupted("stopped before a learning rate was found")
            with trainer.final_weights():
                loss = _score(task)[0]
        except Diverged:
            loss = math.inf
        say(f"  {_told(rates)}: {loss:.4f}" if math.isfinite(loss) else f"  {_told(rates)}: runs away")
        return loss if math.isfinite(loss) else math.inf

    try:
        factor, losses = search(measure)
    finally:
        arena.load(start)
    trials = tuple(
        Trial(one, {name: one * value for name, value in settings.rates.items()}, loss) for one, loss in losses.items()
    )
    rates = {name: float(f"{factor * value:.2g}") for name, value in settings.rates.items()}
    found = FoundRates(factor, rates, trials, before, judged, steps, folder / "find_lr.json")
    _write(found)
    _show(found, console, flags)
    return found


def _score(task: Task) -> tuple[float, str]:
    """The loss that judges, and what it is measured on."""
    unseen = task.held_out()
    if unseen is not None:
        return unseen, "what is kept apart"
    seen = task.signals().seen
    if seen is None:
        raise UserError("there is nothing to judge a learning rate by; keep some apart with --held-out 0.1")
    return seen, "what is trained on, as nothing is kept apart (take it as an upper limit)"


def _write(found: FoundRates) -> None:
    with explained(found.file):
        found.file.parent.mkdir(parents=True, exist_ok=True)
    told = asdict(found) | {"file": found.file.name}
    told["trials"] = [asdict(one) | {"loss": one.loss if math.isfinite(one.loss) else None} for one in found.trials]
    write_bytes(found.file, (json.dumps(told, indent=1) + "\n").encode())
    write_bytes(found.file.with_suffix(".png"), _plot(found))


def _plot(found: FoundRates) -> bytes:
    """The loss over the rate of the first group, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    group = next(iter(found.rates))
    good = [one for one in found.trials if math.isfinite(one.loss)]
    axes.plot([one.rates[group] for one in good], [one.loss for one in good], color="#2171b5", marker="o")
    axes.axvline(found.rates[group], color="#d94801", linestyle="--", label=f"suggested: {found.rates[group]:g}")
    axes.axhline(found.before, color="#888888", linewidth=1, label="before")
    # A trial that got worse than no training at all would flatten all others.
    lowest = min(one.loss for one in good)
    axes.set(xscale="log", xlabel=f"learning rate ({group})", ylabel="loss after the trial")
    axes.set_ylim(lowest - 0.1 * (found.before - lowest + 1e-9), max(found.before, lowest) * 1.05)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _show(found: FoundRates, console: Console, flags: Mapping[str, str]) -> None:
    table = Table(title="learning rates", title_justify="left")
    for name in found.rates:
        table.add_column(name, justify="right")
    table.add_column("loss after", justify="right")
    table.add_column("change", justify="right")
    best = min(one.loss for one in found.trials)
    for one in found.trials:
        finite = math.isfinite(one.loss)
        change = f"{one.loss / found.before - 1:+.1%}" if finite else "runs away"
        style = "bold green" if one.loss == best else None
        rates = (f"{value:.2g}" for value in one.rates.values())
        table.add_row(*rates, f"{one.loss:.4f}" if finite else "-", change, style=style)
    console.print(table)
    told = [f"{flags[name]} {value:g}" for name, value in found.rates.items() if name in flags]
    say_to(console)(f"suggested: {' '.join(dict.fromkeys(told)) or _told(found.rates)} (all of it is in {found.file})")


def _told(rates: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2g}" for name, value in rates.items())
