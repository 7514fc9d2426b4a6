"""The learning-rate finder: trials from the same start, judged by the loss on what they were not trained on.

Smith's range test (2017, https://arxiv.org/abs/1506.01186) raises the rate within one run and reads the training loss, which
tells where a run breaks and little of where it learns best. Here each rate has a trial of its own, with warm-up and
schedule, and all are measured on the same fixed noise. Short trials alone suggest too much: where data are few, the best
rate falls about as the steps grow (three styles, 60, 150, 300 steps: 1.6e-3 to 2.9e-3, 6e-4 to 8e-4, 3e-4). They say where
to look, and trials as long as the run decide; in all it takes as long as about five runs.
"""

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import Tensor

from ...core.arena import Arena
from ...core.errors import Interrupted, UserError
from ...core.events import Observer, Stop
from ...core.files import explained, write_bytes
from ...fast.cuda_graph import Inputs
from ..events import RatesFound, SearchStarted, Signals, TrialEnded
from ..loop.trainer import Diverged, Task, Trainer, TrainerSettings
from ..machine.processes import Processes
from ..results import FoundRates, Trial

_FIRST = (1 / 16, 1 / 4, 1.0, 4.0, 16.0)  # rates of short trials, times those that the settings have
_FARTHEST = 4.0**5
_LEAST, _SHARE = 20, 5  # a short trial has a fifth of the run's steps, at least 20 where there are as many


class _Unwatched:
    """A task without measurements in between."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def inputs(self, step: int, micro: int) -> Inputs:
        return self.task.inputs(step, micro)

    def seeded(self, step: int, micro: int) -> AbstractContextManager[object]:
        return self.task.seeded(step, micro)

    def loss(self, inputs: Inputs) -> Tensor:
        return self.task.loss(inputs)

    def held_out(self) -> float | None:
        return None

    def signals(self) -> Signals:
        return Signals()


def refuse_several_processes(processes: Processes) -> None:
    """Refuse a search that several processes were started for: trials are short, and one is enough.

    Args:
        processes: Those that a launcher started.

    Raises:
        UserError: There are several.
    """
    if processes.size > 1:
        raise UserError("--find-lr runs in one process; start it without the launcher")


def trial_steps(steps: int) -> int:
    """Tell the steps of a short trial.

    Args:
        steps: Those of the run.

    Returns:
        Fewer.
    """
    return min(steps, max(_LEAST, steps // _SHARE))


def search(measure: Callable[[int, float], float], steps: int) -> float:
    """Find the factor of the rate with the lowest loss.

    First a coarse grid of short trials. From what they say, moved by the ratio of the steps, whole ones go on by doubling or
    halving until the best has a worse neighbour on both sides.

    Args:
        measure: Gives the loss after so many steps at a factor.
        steps: Those of the run.

    Returns:
        The factor.

    Raises:
        UserError: Every trial ran away.
    """
    short = trial_steps(steps)
    coarse = _valley(lambda factor: measure(short, factor), _FIRST)
    start = _lowest(coarse)
    if short < steps:
        start *= short / steps
    return _lowest(_valley(lambda factor: measure(steps, factor), (start / 2, start, start * 2)))


def _valley(measure: Callable[[float], float], factors: Sequence[float]) -> dict[float, float]:
    """The loss at each factor and, for as long as the best is at an end, at one more beyond, as far apart as the others."""
    losses = {factor: measure(factor) for factor in factors}
    apart = factors[1] / factors[0]
    while True:
        best = _best(losses)
        beyond = best * apart if best == max(losses) else best / apart
        if best not in (min(losses), max(losses)) or not 1 / _FARTHEST <= beyond <= _FARTHEST:
            break
        losses[beyond] = measure(beyond)
    if not math.isfinite(losses[best]):
        raise UserError("every trial ran away, whatever its learning rate; look at the data, or raise the precision")
    return losses


def _best(losses: Mapping[float, float]) -> float:
    """The factor with the lowest loss; where all ran away, the lowest factor."""
    return min(sorted(losses), key=lambda factor: losses[factor])


def _lowest(losses: Mapping[float, float]) -> float:
    """The lowest point of the parabola, in the logarithm, through the best and its neighbours, all equally far apart."""
    factors = sorted(losses)
    place = factors.index(_best(losses))
    best = factors[place]
    if place in (0, len(factors) - 1):
        return best
    below, above = losses[factors[place - 1]], losses[factors[place + 1]]
    bend = below - 2 * losses[best] + above
    if not math.isfinite(bend) or bend <= 0:
        return best
    return best * math.exp(0.5 * math.log(factors[place + 1] / best) * (below - above) / bend)


@dataclass(frozen=True)
class Search:
    """A search for learning rates.

    Attributes:
        task: What is learned.
        arena: The parameters; afterwards they are what they were.
        settings: How the run would minimize.
        trainer: Makes the trainer of a trial, with other settings.
        folder: Where ``find_lr.json`` and ``find_lr.png`` go.
        flags: The flag that sets the rate of a component.
        tell: Is told of each trial, and of what is found.
        stop: Where it is set, the search ends after the present step.
    """

    task: Task
    arena: Arena
    settings: TrainerSettings
    trainer: Callable[[Task, TrainerSettings], Trainer]
    folder: Path
    flags: Mapping[str, str]
    tell: Observer
    stop: Stop

    def run(self) -> FoundRates:
        """Search, and write what was found.

        Returns:
            What was found.

        Raises:
            UserError: Every trial runs away, or there is nothing to judge by.
            Interrupted: The search was stopped.
        """
        settings, start = self.settings, self.arena.flat.clone()
        before, judged = _score(self.task)
        self.tell(SearchStarted(trial_steps(settings.steps), settings.steps, judged, before))
        trials: list[Trial] = []

        def measure(steps: int, factor: float) -> float:
            self.arena.load(start)
            trials.append(self._trial(steps, factor))
            self.tell(TrialEnded(trials[-1]))
            return trials[-1].loss

        try:
            factor = search(measure, settings.steps)
        finally:
            self.arena.load(start)
        trials.sort(key=lambda one: (one.steps, one.factor))
        rates = {name: float(f"{factor * value:.2g}") for name, value in settings.rates.items()}
        file = self.folder / "find_lr.json"
        found = FoundRates(factor, rates, tuple(trials), before, judged, settings.steps, file)
        _write(found)
        self.tell(RatesFound(found, self.flags))
        return found

    def _trial(self, steps: int, factor: float) -> Trial:
        settings = self.settings
        rates = {name: factor * value for name, value in settings.rates.items()}
        warmup = settings.warmup if steps == settings.steps else min(settings.warmup, steps // 10)
        own = replace(settings, steps=steps, warmup=warmup, save_every=steps, patience=0, rates=rates)
        trainer = self.trainer(_Unwatched(self.task), own)
        try:
            if not trainer.run(stop=self.stop):
                raise Interrupted("stopped before a learning rate was found")
            with trainer.final_weights():
                loss = _score(self.task)[0]
        except Diverged:
            loss = math.inf
        return Trial(steps, factor, rates, loss if math.isfinite(loss) else math.inf)


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
    for steps in sorted({one.steps for one in good}):
        curve = [(one.rates[group], one.loss) for one in good if one.steps == steps]
        colour = "#2171b5" if steps == found.steps else "#9ecae1"
        axes.plot(*zip(*curve, strict=True), color=colour, marker="o", label=f"after {steps} steps")
    axes.axvline(found.rates[group], color="#d94801", linestyle="--", label=f"suggested: {found.rates[group]:g}")
    axes.axhline(found.before, color="#888888", linewidth=1, label="before")
    # A trial that got worse than no training at all would flatten all others.
    lowest = min(one.loss for one in good)
    axes.set(xscale="log", xlabel=f"learning rate ({group})", ylabel=f"loss on {found.judged}")
    axes.set_ylim(lowest - 0.1 * (found.before - lowest + 1e-9), max(found.before, lowest) * 1.05)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()
